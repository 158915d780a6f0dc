// A recorded list of operator calls, run again on other tensors of the same sizes without Python in between.
//
// Python records it (mfp/serving/network.py): every operator that a network has called is added with its arguments.
// What an earlier call of the list, or the network's input, has made is remembered as a slot, all else (weights, sizes,
// flags) as it is.
//
// The first run calls the operators, and lays out the memory: all results but the network's own get addresses that stay
// (arena.h). Our operators' calls on such memory are written down as phases (cpu/tasks.h). Later runs do the phases,
// those of one call after the other by one team of threads, with nothing done between them; torch's operators, and
// those that read the network's input or make its results, are called as before.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <ATen/ops/empty.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "prepared.h"

namespace py = pybind11;

namespace mfp {
namespace {

constexpr int kConstant = -1, kList = -2;

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
    for_slots(results_, [&](int slot) { used[slot] = true; });
    for (size_t i = calls_.size(); i-- > 0;) {
      const auto last_use = [&](int slot) {
        if (!used[slot]) calls_[i].empty_after.push_back(slot), used[slot] = true;
      };
      for_slots(calls_[i].arguments, last_use);
      for (int slot : calls_[i].results) last_use(slot);
    }
    find_passing();
    recorded_.clear(), places_.clear();
  }

  // The same calls on other inputs. Several threads may run one tape.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs, std::vector<double>* seconds) const {
    TORCH_CHECK(inputs.size() == inputs_, "a tape of ", inputs_, " inputs was given ", inputs.size());
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    if (!plain_) return run_calls(inputs, nullptr, seconds);
    const int threads = at::get_num_threads();
    const cpu::Isa isa = cpu::current_isa();
    std::vector<at::Tensor> results;
    std::unique_ptr<Prepared> prepared = memory_->take(number_, threads, isa);
    if (prepared) {
      results = run_steps(inputs, *prepared, seconds);
    } else {
      prepared = std::make_unique<Prepared>();
      prepared->tape = number_, prepared->threads = threads, prepared->isa = isa;
      results = run_calls(inputs, prepared.get(), seconds);
    }
    memory_->give_back(std::move(prepared));
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
    bool passes = false;        // reads or makes what is passed in or out, or reads numbers that decide where others go
    bool makes_passed = false;  // makes some of it
    bool views = false;         // other views of its arguments, and nothing else
  };

  // Calls all operators. Where there is something to prepare, also writes down what the next run needs.
  std::vector<at::Tensor> run_calls(const std::vector<at::Tensor>& inputs, Prepared* made,
                                    std::vector<double>* seconds) const {
    std::vector<c10::IValue> slots(inputs.begin(), inputs.end());
    slots.resize(slots_);
    if (made) made->slots.resize(slots_);
    torch::jit::Stack stack;
    Clock clock(seconds);
    for (const Call& call : calls_) {
      cpu::Notes noted;
      {
        if (made) made->arena.begin_call();
        const Watch watch(made && !call.makes_passed ? &made->arena : nullptr, made ? &noted : nullptr);
        make(call, slots, stack);
      }
      for_results(call, stack, [&](int slot, const at::Tensor& result) {
        slots[slot] = result;
        if (made && !passed_[slot]) made->slots[slot] = at_its_place(result);
      });
      stack.clear();
      for (int slot : call.empty_after) slots[slot] = c10::IValue();
      if (made) {
        const bool repeats = !call.passes && noted.complete && (call.views || !noted.phases.empty());
        const size_t first = made->phases.size();
        if (repeats) std::move(noted.phases.begin(), noted.phases.end(), std::back_inserter(made->phases));
        made->steps.push_back({first, made->phases.size(), !repeats});
        made->arena.end_call();
      }
      clock.tick();
    }
    return results_of(slots);
  }

  std::vector<at::Tensor> run_steps(const std::vector<at::Tensor>& inputs, Prepared& prepared,
                                    std::vector<double>* seconds) const {
    std::vector<c10::IValue>& slots = prepared.slots;
    std::copy(inputs.begin(), inputs.end(), slots.begin());
    torch::jit::Stack stack;
    Clock clock(seconds);
    for (size_t i = 0; i < calls_.size();) {
      const Step& step = prepared.steps[i];
      if (step.calls) {
        call_again(i, prepared, stack);
        ++i;
      } else {
        size_t last_phase = step.last_phase;
        for (++i; i < calls_.size() && !prepared.steps[i].calls && seconds == nullptr; ++i) {
          last_phase = prepared.steps[i].last_phase;
        }
        cpu::Phase* const phases = prepared.phases.data();
        cpu::run_phases(phases + step.first_phase, phases + last_phase, prepared.threads);
      }
      clock.tick();
    }
    std::vector<at::Tensor> results = results_of(slots);
    for (int i = 0; i < slots_; ++i) {
      if (passed_[i]) slots[i] = c10::IValue();
    }
    return results;
  }

  void call_again(size_t i, Prepared& prepared, torch::jit::Stack& stack) const {
    const Call& call = calls_[i];
    prepared.arena.repeat_call(i);
    const Watch watch(call.makes_passed ? nullptr : &prepared.arena, nullptr);
    make(call, prepared.slots, stack);
    std::vector<std::pair<at::Tensor, at::Tensor>> elsewhere;  // places, and copies of what should lie there
    for_results(call, stack, [&](int slot, const at::Tensor& result) {
      if (passed_[slot]) {
        prepared.slots[slot] = result;
      } else if (const at::Tensor& place = prepared.slots[slot].toTensor();
                 place.data_ptr() != result.data_ptr() || place.strides() != result.strides()) {
        elsewhere.emplace_back(place, result.clone());
      }
    });
    for (const auto& [place, copy] : elsewhere) place.copy_(copy);
    stack.clear();
    for (int slot : call.empty_after) {
      if (passed_[slot]) prepared.slots[slot] = c10::IValue();
    }
  }

  static int64_t next_number() {
    static std::atomic<int64_t> next = 0;
    return next++;
  }

  // How long each call takes, where that is asked.
  struct Clock {
    std::vector<double>* seconds;
    std::chrono::steady_clock::time_point before = std::chrono::steady_clock::now();
    explicit Clock(std::vector<double>* seconds) : seconds(seconds) {}
    void tick() {
      if (seconds == nullptr) return;
      const auto now = std::chrono::steady_clock::now();
      seconds->push_back(std::chrono::duration<double>(now - before).count());
      before = now;
    }
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

  static void make(const Call& call, const std::vector<c10::IValue>& slots, torch::jit::Stack& stack) {
    for (const Argument& argument : call.arguments) stack.push_back(value_of(argument, slots));
    call.op.callBoxed(stack);
  }

  template <class Use>
  static void for_results(const Call& call, const torch::jit::Stack& stack, Use use) {
    size_t next = 0;
    for (const c10::IValue& value : stack) {
      if (value.isTensor()) {
        if (value.toTensor().defined()) use(call.results.at(next++), value.toTensor());
      } else if (value.isTensorList()) {
        for (const c10::IValue& part : value.toListRef()) use(call.results.at(next++), part.toTensor());
      }
    }
  }

  std::vector<at::Tensor> results_of(const std::vector<c10::IValue>& slots) const {
    std::vector<at::Tensor> results;
    for (const Argument& result : results_) results.push_back(value_of(result, slots).toTensor());
    return results;
  }

  // The tensor without a hold on its memory if that is an arena's, which may use it for others at other times.
  static at::Tensor at_its_place(const at::Tensor& tensor) {
    const c10::Storage& storage = tensor.storage();
    if (!Arena::made(storage.data_ptr())) return tensor;
    const c10::Storage borrowed(c10::Storage::use_byte_size_t(), storage.nbytes(),
                                at::DataPtr(storage.mutable_data(), storage.device()));
    return at::empty({0}, tensor.options()).set_(borrowed, tensor.storage_offset(), tensor.sizes(), tensor.strides());
  }

  template <class Use>
  static void for_slots(const std::vector<Argument>& arguments, Use use) {
    for (const Argument& argument : arguments) {
      if (argument.slot >= 0) use(argument.slot);
      for (const Argument& part : argument.parts) {
        if (part.slot >= 0) use(part.slot);
      }
    }
  }

  // Whether it is an operator that keeps none of the memory that it gets, and calls none of ours.
  static bool is_known(const std::string& name) {
    const std::string library = name.substr(0, name.find("::"));
    return library == "aten" || library == "mkldnn" || library == "mfp";
  }

  // Which slots lie in memory that the network is given or returns, and what that means for the calls.
  void find_passing() {
    const auto storage = [&](int slot) { return recorded_[slot].storage().unsafeGetStorageImpl(); };
    for (const at::Tensor& tensor : recorded_) {
      plain_ = plain_ && tensor.layout() == at::kStrided && tensor.is_cpu() && tensor.has_storage() &&
               !tensor.is_quantized() && !tensor.is_conj() && !tensor.is_neg();
    }
    for (const Call& call : calls_) plain_ = plain_ && is_known(call.op.schema().name());
    if (!plain_) return;
    std::unordered_set<const void*> passed;
    for (size_t i = 0; i < inputs_; ++i) passed.insert(storage(static_cast<int>(i)));
    for_slots(results_, [&](int slot) { passed.insert(storage(slot)); });
    for (size_t before = 0; before != passed.size();) {  // a call that makes some of it gets none of our memory
      before = passed.size();
      for (Call& call : calls_) {
        for (int slot : call.results) call.makes_passed = call.makes_passed || passed.count(storage(slot)) > 0;
        if (!call.makes_passed) continue;
        for (int slot : call.results) passed.insert(storage(slot));
      }
    }
    for (int slot = 0; slot < slots_; ++slot) passed_.push_back(passed.count(storage(slot)) > 0);
    for (Call& call : calls_) {
      std::unordered_set<const void*> read;
      call.passes = call.makes_passed;
      for_slots(call.arguments, [&](int slot) {
        call.passes = call.passes || passed_[slot] || !recorded_[slot].is_floating_point();
        read.insert(storage(slot));
      });
      call.views = !call.op.schema().is_mutable() && !call.results.empty();
      for (int slot : call.results) call.views = call.views && read.count(storage(slot)) > 0;
    }
  }

  std::shared_ptr<Memory> memory_;
  size_t inputs_ = 0;
  int slots_ = 0;
  std::vector<Call> calls_;
  std::vector<Argument> results_;
  std::vector<at::Tensor> recorded_;
  std::unordered_map<const c10::TensorImpl*, int> places_;
  std::vector<bool> passed_;  // per slot: in memory that the network is given or returns
  bool plain_ = true;         // nothing but plain tensors on the CPU, and operators of torch's and ours
  const int64_t number_ = next_number();
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
