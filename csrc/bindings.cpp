// The Python module mfp._C: importing it registers the compiled ops (their static registrars run), and it tells how it
// was built. The ops themselves are reached through torch.ops.mfp, never through pybind11.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "cpu/limits/limits.h"

namespace py = pybind11;

namespace mfp {
void define_replays(py::module& module);  // replays.cpp
void define_tape(py::module& module);     // tape.cpp
}  // namespace mfp

static py::dict build_info() {
  py::dict info;
  info["torch"] = MFP_TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#ifdef MFP_WITH_CUDA
  info["cuda_architectures"] = MFP_CUDA_ARCHITECTURES;
#else
  info["cuda_architectures"] = py::none();
#endif
  info["cpu_isa"] = mfp::cpu::isa_name(mfp::cpu::current_isa());
  return info;
}

static py::dict measure_limits(int num_threads) {
  const mfp::cpu::Limits limits = mfp::cpu::measure_limits(num_threads, mfp::cpu::current_isa());
  py::dict rates;
  rates["adds"] = limits.adds;
  rates["fmas"] = limits.fmas;
  rates["adds_and_fmas"] = limits.adds_and_fmas;
  return rates;
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled kernels of mfp";
  module.def("build_info", &build_info, "torch, compiler, CUDA architectures and CPU instruction set of this build");
  module.def("measure_limits", &measure_limits, py::arg("num_threads"),
             "float operations per second of this machine: adds, fmas, and pairs of both");
  mfp::define_replays(module);
  mfp::define_tape(module);
}
