// Whether a call of a network can be served by a recording of it (tape.cpp), and by which. In C++ because it is asked
// in every call, over all modules, and with cold caches: the network's weights have just gone through them.
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

namespace py = pybind11;

namespace mfp {
namespace {

constexpr size_t kMost = 8;  // recordings of one network, each for some sizes of the inputs

// The names of a module's attributes, made once.
struct Names {
  static py::str interned(const char* name) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name)); }
  py::str forward_hooks = interned("_forward_hooks"), forward_pre_hooks = interned("_forward_pre_hooks");
  py::str training = interned("training"), modules = interned("_modules");
  py::str parameters = interned("_parameters"), buffers = interned("_buffers");
};

// Looks at a network, and remembers where it has read: once the weights have pushed all of that out of the caches, the
// next look has it fetched at once instead of waiting for one address after the other.
class NetworkState {
 public:
  // What changes when a parameter, a buffer or a mode does; nothing where the network cannot be replayed.
  std::optional<std::vector<int64_t>> look(py::handle network) {
    static const Names* const names = new Names;  // for good: they must not outlive the interpreter
    for (const char* address : read_) __builtin_prefetch(address);
    read_.clear(), found_.clear();
    return add_state(network.ptr(), *names) ? std::optional(found_) : std::nullopt;
  }

 private:
  // Adds a module's mode, its parameters' and buffers' places, versions and devices, and those of its parts; false
  // where there is a hook, or a kind of module that has no dicts of them.
  bool add_state(PyObject* module, const Names& names) {
    will_read(reinterpret_cast<const char*>(module) - 32, 2);
    const py::object attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!attributes) throw py::error_already_set();
    const auto dict_of = [&](const py::str& name) {
      PyObject* const dict = PyDict_GetItem(attributes.ptr(), name.ptr());
      return dict != nullptr && PyDict_Check(dict) ? dict : nullptr;
    };
    will_read_dict(attributes.ptr());
    for (const py::str& name : {names.forward_hooks, names.forward_pre_hooks}) {
      PyObject* const hooks = dict_of(name);
      if (hooks == nullptr || PyDict_Size(hooks) > 0) return false;
      will_read(hooks, 1);
    }
    found_.push_back(PyDict_GetItem(attributes.ptr(), names.training.ptr()) == Py_True);
    PyObject *key, *value;
    for (const py::str& name : {names.parameters, names.buffers}) {
      PyObject* const tensors = dict_of(name);
      if (tensors == nullptr) return false;
      will_read_dict(tensors);
      for (Py_ssize_t next = 0; PyDict_Next(tensors, &next, &key, &value);) {
        if (THPVariable_Check(value)) add_tensor(value);  // else None
      }
    }
    PyObject* const parts = dict_of(names.modules);
    if (parts == nullptr) return false;
    will_read_dict(parts);
    for (Py_ssize_t next = 0; PyDict_Next(parts, &next, &key, &value);) {
      if (value != Py_None && !add_state(value, names)) return false;
    }
    return true;
  }

  void add_tensor(PyObject* object) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    found_.push_back(tensor.has_storage() ? reinterpret_cast<int64_t>(tensor.const_data_ptr()) : 0);
    found_.push_back(tensor.is_inference() ? 0 : tensor._version());
    found_.push_back(static_cast<int64_t>(tensor.device().type()));
    will_read(object, 1);
    will_read(tensor.unsafeGetTensorImpl(), 4);
    will_read(*reinterpret_cast<void* const*>(&tensor.unsafeGetTensorImpl()->version_counter()), 1);
    if (tensor.has_storage()) will_read(tensor.storage().unsafeGetStorageImpl(), 2);
  }

  void will_read_dict(PyObject* object) {
    const PyDictObject* const dict = reinterpret_cast<PyDictObject*>(object);
    will_read(dict, 1);
    const bool apart = dict->ma_values != nullptr;  // the keys are those of all modules of a kind
    will_read(apart ? static_cast<void*>(dict->ma_values) : dict->ma_keys,
              1 + std::min<Py_ssize_t>(dict->ma_used / 3, 8));
  }

  void will_read(const void* address, int lines) {
    for (int i = 0; i < lines; i++) read_.push_back(static_cast<const char*>(address) + 64 * i);
  }

  std::vector<const char*> read_;
  std::vector<int64_t> found_;
};

// The recordings of one network, those used last. The interpreter's lock is enough: recordings are let go (whose ends
// might run Python code) when everything else is in order again.
class Replays {
 public:
  // The recording for these arguments; true where one is to be made now, since their sizes were seen before; None where
  // the graph is to run: something other than results of plain tensors on the CPU is asked, or the sizes are new. (What
  // layers keep from call to call, packed weights and maps, is made in the first one.)
  py::object find(py::handle network, const py::tuple& arguments) {
    std::vector<int64_t> sizes;
    if (!is_plain_call(arguments, sizes)) return py::none();
    std::optional<std::vector<int64_t>> state = state_of(network);
    if (!state) return py::none();
    std::vector<Recording> old;
    if (*state != state_) {
      old.swap(recordings_);
      state_ = std::move(*state);
    }
    const auto found = std::find_if(recordings_.begin(), recordings_.end(),
                                    [&](const Recording& recording) { return recording.sizes == sizes; });
    if (found == recordings_.end()) {
      if (recordings_.size() == kMost) {
        old.push_back(std::move(recordings_.front()));
        recordings_.erase(recordings_.begin());
      }
      recordings_.push_back({std::move(sizes), py::bool_(true)});
      return py::none();
    }
    std::rotate(found, found + 1, recordings_.end());
    return recordings_.back().recording;
  }

  // The recording that `find` asked for, or None where the graph is always to run. `find` tells the network's state;
  // where it is another one by now, the recording is of weights that are no more.
  void keep(py::handle network, const py::tuple& arguments, py::object recording, const std::string& state) {
    std::vector<int64_t> sizes;
    if (!is_plain_call(arguments, sizes) || state != bytes_of(state_) || state_of(network) != state_) {
      return;
    }
    for (Recording& other : recordings_) {
      if (other.sizes == sizes) return std::swap(other.recording, recording);
    }
  }

  py::bytes state() const { return bytes_of(state_); }

  py::list all() const {
    py::list found;
    for (const Recording& recording : recordings_) found.append(recording.recording);
    return found;
  }

 private:
  struct Recording {
    std::vector<int64_t> sizes;  // and strides and dtypes, of all arguments
    py::object recording;
  };

  static bool is_plain_call(const py::tuple& arguments, std::vector<int64_t>& sizes) {
    const char* const backend = std::getenv("MFP_BACKEND");
    if (at::GradMode::is_enabled() || torch::jit::tracer::isTracing() || c10::impl::TorchDispatchModeTLS::stack_len() ||
        c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
        at::autocast::is_autocast_enabled(at::kCPU) || (backend != nullptr && std::string("cpu") != backend) ||
        arguments.empty()) {
      return false;
    }
    for (size_t i = 0; i < arguments.size(); ++i) {
      const py::handle argument = arguments[i];
      for (size_t before = 0; before < i; ++before) {
        if (py::handle(arguments[before]).is(argument)) return false;  // a recording would take them for one for good
      }
      if (reinterpret_cast<PyObject*>(Py_TYPE(argument.ptr())) != THPVariableClass) return false;
      const at::Tensor& tensor = THPVariable_Unpack(argument.ptr());
      if (!tensor.is_cpu() || tensor.layout() != at::kStrided) return false;
      sizes.push_back(static_cast<int64_t>(tensor.scalar_type())), sizes.push_back(tensor.dim());
      sizes.insert(sizes.end(), tensor.sizes().begin(), tensor.sizes().end());
      sizes.insert(sizes.end(), tensor.strides().begin(), tensor.strides().end());
    }
    return true;
  }

  static std::string bytes_of(const std::vector<int64_t>& numbers) {
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t)};
  }

  std::optional<std::vector<int64_t>> state_of(py::handle network) {
    std::optional<std::vector<int64_t>> state = look_.look(network);
    const char* const winograd = std::getenv("MFP_WINOGRAD");
    for (const char* c = winograd ? winograd : "unset"; state && *c; ++c) state->push_back(*c);
    return state;
  }

  NetworkState look_;
  std::vector<int64_t> state_;
  std::vector<Recording> recordings_;
};

}  // namespace

void define_replays(py::module& module) {
  py::class_<Replays>(module, "Replays")
      .def(py::init<>())
      .def("find", &Replays::find, "a recording, True where one is to be made now, or None: run the graph")
      .def("keep", &Replays::keep, "a recording for arguments of such sizes; None: there can be none")
      .def("state", &Replays::state, "of the network, as it was when `find` looked last")
      .def("all", &Replays::all);
}

}  // namespace mfp
