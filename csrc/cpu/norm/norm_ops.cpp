// batch_norm on CPU tensors. The schema is in mfp/schemas.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/norm/norm.h"
#include "cpu/tasks.h"

namespace mfp::cpu {
namespace {

constexpr int64_t kGrain = 1 << 13;  // numbers of a task

at::Tensor batch_norm(at::TensorList inputs, const at::Tensor& scale, const at::Tensor& shift,
                      const std::string& activation) {
  TORCH_CHECK(!inputs.empty(), "batch_norm: no inputs");
  const at::Tensor& first = inputs[0];
  Norm norm = {};
  norm.activation = activation_of(activation);
  std::vector<at::Tensor> kept;  // as long as the kernel reads them
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat && input.is_cpu() && first.dim() == 4 &&
                    input.size(0) == first.size(0) && input.size(2) == first.size(2) && input.size(3) == first.size(3),
                "batch_norm: an input is ", input.sizes(), " ", input.scalar_type(), " on ", input.device(),
                ", the first one ", first.sizes(),
                "; expected float32 [B, C, H, W] on the CPU, which differ in C alone");
    kept.push_back(in_order(input));
    norm.parts.push_back({kept.back().const_data_ptr<float>(), input.size(1)});
    norm.channels += input.size(1);
  }
  for (const at::Tensor& vector : {scale, shift}) {
    TORCH_CHECK(vector.dim() == 1 && vector.size(0) == norm.channels && vector.scalar_type() == at::kFloat &&
                    vector.is_cpu() && vector.is_contiguous(),
                "batch_norm: scale or shift is ", vector.sizes(), " ", vector.scalar_type(), " on ", vector.device(),
                "; expected contiguous float32 [", norm.channels, "] on the CPU");
  }
  norm.scale = scale.const_data_ptr<float>(), norm.shift = shift.const_data_ptr<float>();
  const at::Tensor output = at::empty({first.size(0), norm.channels, first.size(2), first.size(3)},
                                      first.options().memory_format(at::MemoryFormat::ChannelsLast));
  norm.output = output.mutable_data_ptr<float>();
  const int64_t rows = first.size(0) * first.size(2) * first.size(3);
  if (output.numel() == 0) return output;
  const Isa isa = current_isa();
  const auto compute = MFP_OF_ISA(isa, norm_rows);
  const int64_t tasks = std::clamp<int64_t>(output.numel() / kGrain, 1, rows);
  run_phase(tasks, [=](int64_t task) { compute(norm, rows * task / tasks, rows * (task + 1) / tasks); });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) { m.impl("batch_norm", &batch_norm); }

}  // namespace mfp::cpu
