// What a recording of a network (tape.cpp) depends on: it holds as long as this is the same. In C++ because it is
// looked at in every call, over all modules.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace py = pybind11;

namespace mfp {
namespace {

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
  // bytes that change when a parameter, a buffer or a mode does; None where the network cannot be replayed.
  py::object look(py::handle network) {
    static const Names* const names = new Names;  // for good: they must not outlive the interpreter
    for (const char* address : read_) __builtin_prefetch(address);
    read_.clear(), found_.clear();
    if (!add_state(network.ptr(), *names)) return py::none();
    return py::bytes(reinterpret_cast<const char*>(found_.data()), found_.size() * sizeof(int64_t));
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

}  // namespace

void define_network_state(py::module& module) {
  py::class_<NetworkState>(module, "NetworkState")
      .def(py::init<>())
      .def("look", &NetworkState::look,
           "changes when a parameter, a buffer or a mode does; None where there are hooks");
}

}  // namespace mfp
