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
  py::str forward_hooks = "_forward_hooks", forward_pre_hooks = "_forward_pre_hooks", training = "training";
  py::str parameters = "_parameters", buffers = "_buffers", modules = "_modules";
};

// Adds a module's mode, its parameters' and buffers' places, versions and devices, and those of its parts; false where
// there is a hook, or a kind of module that has no dicts of them.
bool add_state(py::handle module, const Names& names, std::vector<int64_t>& found) {
  for (const py::str& hooks : {names.forward_hooks, names.forward_pre_hooks}) {
    if (py::bool_(module.attr(hooks))) return false;
  }
  found.push_back(module.attr(names.training).cast<bool>());
  PyObject *key, *value;
  for (const py::str& name : {names.parameters, names.buffers}) {
    const py::object tensors = module.attr(name);
    if (!PyDict_Check(tensors.ptr())) return false;
    for (Py_ssize_t next = 0; PyDict_Next(tensors.ptr(), &next, &key, &value);) {
      if (!THPVariable_Check(value)) continue;  // None
      const at::Tensor& tensor = THPVariable_Unpack(value);
      found.push_back(tensor.has_storage() ? reinterpret_cast<int64_t>(tensor.const_data_ptr()) : 0);
      found.push_back(tensor.is_inference() ? 0 : tensor._version());
      found.push_back(static_cast<int64_t>(tensor.device().type()));
    }
  }
  const py::object parts = module.attr(names.modules);
  if (!PyDict_Check(parts.ptr())) return false;
  for (Py_ssize_t next = 0; PyDict_Next(parts.ptr(), &next, &key, &value);) {
    if (value != Py_None && !add_state(value, names, found)) return false;
  }
  return true;
}

// bytes that change when a parameter, a buffer or a mode does; None where the network cannot be replayed.
py::object network_state(py::handle network) {
  static const Names* const names = new Names;  // for good: they must not outlive the interpreter
  std::vector<int64_t> found;
  if (!add_state(network, *names, found)) return py::none();
  return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(int64_t));
}

}  // namespace

void define_network_state(py::module& module) {
  module.def("network_state", &network_state,
             "changes when a parameter, a buffer or a mode does; None where there are hooks");
}

}  // namespace mfp
