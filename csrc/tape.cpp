// A recorded list of operator calls, run again on other tensors of the same sizes without Python in between.
//
// Python records it (mfp/serving/network.py): every operator that a network has called is added with its arguments.
// What an earlier call of the list, or the network's input, has made is remembered as a slot, all else (weights, sizes,
// flags) as it is. A slot is emptied after its last use, so that its memory serves the next result.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <unordered_map>

#include "memory_pool.h"

namespace py = pybind11;

namespace mfp {
namespace {

constexpr int kConstant = -1, kList = -2;

// What the tapes of one network share: the memory of their results, kept for the tape that ran last.
struct Memory {
  Memory() { PoolAllocator::install(); }
  std::shared_ptr<Pool> pool = std::make_shared<Pool>();
  std::atomic<const void*> user = nullptr;
};

struct UsePool {
  explicit UsePool(Pool* pool) { current_pool() = pool; }
  ~UsePool() { current_pool() = nullptr; }
};

class Tape {
 public:
  Tape(std::shared_ptr<Memory> memory, const std::vector<at::Tensor>& inputs) : memory_(std::move(memory)) {
    for (const at::Tensor& input : inputs) add_slot(input);
    inputs_ = inputs.size();
  }

  // A call that was just made, and what came out of it.
  void add(const std::string& op, const std::string& overload, const py::tuple& args, const py::dict& kwargs,
           const std::vector<at::Tensor>& results) {
    Call call = {c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), overload.c_str()), {}, {}};
    const py::kwargs named(kwargs);
    for (c10::IValue& value : torch::jit::createStackForSchema(call.op.schema(), args, named, std::nullopt)) {
      call.arguments.push_back(argument_of(std::move(value)));
    }
    for (const at::Tensor& result : results) call.results.push_back(add_slot(result));
    calls_.push_back(std::move(call));
  }

  // What the network has returned. After it the tape does not change any more.
  void finish(const std::vector<at::Tensor>& results) {
    std::vector<bool> used(slots_);
    for (const at::Tensor& result : results) results_.push_back(tensor_of(result));
    for (const Argument& result : results_) {
      if (result.slot >= 0) used[result.slot] = true;
    }
    for (size_t i = calls_.size(); i-- > 0;) {
      const auto last_use = [&](int slot) {
        if (slot >= 0 && !used[slot]) calls_[i].empty_after.push_back(slot), used[slot] = true;
      };
      for (const Argument& argument : calls_[i].arguments) {
        last_use(argument.slot);
        for (const Argument& part : argument.parts) last_use(part.slot);
      }
      for (int slot : calls_[i].results) last_use(slot);
    }
    recorded_.clear(), places_.clear();
  }

  // The same calls on other inputs. Several threads may run one tape.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs, std::vector<double>* seconds) const {
    TORCH_CHECK(inputs.size() == inputs_, "a tape of ", inputs_, " inputs was given ", inputs.size());
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    if (memory_->user.exchange(this) != this) memory_->pool->clear();
    const UsePool use(memory_->pool.get());
    std::vector<c10::IValue> slots(slots_);
    std::copy(inputs.begin(), inputs.end(), slots.begin());
    torch::jit::Stack stack;
    auto before = std::chrono::steady_clock::now();
    for (const Call& call : calls_) {
      stack.clear();
      for (const Argument& argument : call.arguments) stack.push_back(value_of(argument, slots));
      call.op.callBoxed(stack);
      store(call, stack, slots);
      for (int slot : call.empty_after) slots[slot] = c10::IValue();
      if (seconds != nullptr) {
        const auto now = std::chrono::steady_clock::now();
        seconds->push_back(std::chrono::duration<double>(now - before).count());
        before = now;
      }
    }
    std::vector<at::Tensor> results;
    for (const Argument& result : results_) results.push_back(value_of(result, slots).toTensor());
    return results;
  }

 private:
  struct Argument {
    int slot;  // or kConstant, or kList: a list of tensors
    c10::IValue constant;
    std::vector<Argument> parts;
  };
  struct Call {
    c10::OperatorHandle op;
    std::vector<Argument> arguments;
    std::vector<int> results, empty_after;
  };

  int add_slot(const at::Tensor& tensor) {
    recorded_.push_back(tensor);  // as long as it lives no other tensor has its address
    places_[tensor.unsafeGetTensorImpl()] = slots_;
    return slots_++;
  }

  Argument tensor_of(const at::Tensor& tensor) const {
    const auto found = places_.find(tensor.unsafeGetTensorImpl());
    return found == places_.end() ? Argument{kConstant, tensor, {}} : Argument{found->second, {}, {}};
  }

  Argument argument_of(c10::IValue value) const {
    if (value.isTensor() && value.toTensor().defined()) return tensor_of(value.toTensor());
    const bool optional = value.isList() && value.toListRef().size() > 0 && value.isOptionalTensorList();
    if (!value.isTensorList() && !optional) return {kConstant, std::move(value), {}};
    Argument list = {kList, std::move(value), {}};
    for (const c10::IValue& part : list.constant.toListRef()) {
      list.parts.push_back(part.isTensor() ? tensor_of(part.toTensor()) : Argument{kConstant, part, {}});
    }
    return list;
  }

  static c10::IValue value_of(const Argument& argument, const std::vector<c10::IValue>& slots) {
    if (argument.slot >= 0) return slots[argument.slot];
    if (argument.slot == kConstant) return argument.constant;
    c10::impl::GenericList list(argument.constant.toList().elementType());
    for (const Argument& part : argument.parts) list.push_back(value_of(part, slots));
    return list;
  }

  static void store(const Call& call, torch::jit::Stack& stack, std::vector<c10::IValue>& slots) {
    size_t next = 0;
    for (c10::IValue& value : stack) {
      if (value.isTensor()) {
        if (value.toTensor().defined()) slots[call.results.at(next++)] = std::move(value);
      } else if (value.isTensorList()) {
        for (const c10::IValue& part : value.toListRef()) slots[call.results.at(next++)] = part;
      }
    }
  }

  std::shared_ptr<Memory> memory_;
  size_t inputs_ = 0;
  int slots_ = 0;
  std::vector<Call> calls_;
  std::vector<Argument> results_;
  std::vector<at::Tensor> recorded_;
  std::unordered_map<const c10::TensorImpl*, int> places_;
};

}  // namespace

void define_tape(py::module& module) {
  py::class_<Memory, std::shared_ptr<Memory>>(module, "Memory", "of the results of a network's tapes").def(py::init());
  py::class_<Tape>(module, "Tape", "operator calls of a network, run again without Python in between")
      .def(py::init<std::shared_ptr<Memory>, const std::vector<at::Tensor>&>())
      .def("add", &Tape::add)
      .def("finish", &Tape::finish)
      .def(
          "run", [](const Tape& tape, const std::vector<at::Tensor>& inputs) { return tape.run(inputs, nullptr); },
          py::call_guard<py::gil_scoped_release>())
      .def("seconds", [](const Tape& tape, const std::vector<at::Tensor>& inputs) {
        std::vector<double> seconds;
        {
          py::gil_scoped_release release;
          tape.run(inputs, &seconds);
        }
        return seconds;
      });
}

}  // namespace mfp
