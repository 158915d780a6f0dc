// The optimiser ops and scatter_add_ on CUDA tensors. Schemas are in mfp/schemas.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "cuda/optim.h"
#include "cuda/scatter.h"
#include "cuda/tensors.h"
#include "cuda/upload.h"

namespace mfp::cuda {
namespace {

// The table's entries. A tensor that is laid out unlike its parameter goes through a copy, which `finish` writes back:
// rare (a gradient in another memory format) and not fast.
class ParameterTable {
 public:
  ParameterTable(at::TensorList params, at::TensorList grads, at::TensorList first, at::TensorList second,
                 const std::optional<at::Tensor>& keep, at::IntArrayRef offsets, at::IntArrayRef rows) {
    for (size_t i = 0; i < params.size(); ++i) {
      if (params[i].numel() == 0) continue;
      const bool masked = keep.has_value() && offsets[i] >= 0;
      TORCH_CHECK(!masked || (rows[i] > 0 && params[i].size(0) % rows[i] == 0 && offsets[i] + rows[i] <= keep->numel()),
                  "mfp: parameter ", i, " ", params[i].sizes(), " does not fit ", rows[i], " filters at ", offsets[i]);
      like_ = params[i];
      dense_ = params[i].is_non_overlapping_and_dense() &&
               (!masked || params[i].size(0) <= 1 || params[i].stride(0) * params[i].size(0) == params[i].numel());
      Parameter entry = {};
      entry.values = write(params[i], "a parameter");
      entry.gradient = block(grads[i], "a gradient").const_data_ptr();
      if (!first.empty()) entry.first = write(first[i], "a momentum");
      if (!second.empty()) entry.second = write(second[i], "a mean of squares");
      entry.numel = params[i].numel();
      entry.row_size = masked ? entry.numel / rows[i] : entry.numel;
      entry.keep_offset = masked ? offsets[i] : -1;
      entry.dtype = dtype_of(params[i]);
      entries.push_back(entry);
    }
  }
  void finish() {
    for (auto& [tensor, memory] : written_) {
      if (!memory.is_same(tensor)) tensor.copy_(memory);
    }
  }
  std::vector<Parameter> entries;

 private:
  at::Tensor block(const at::Tensor& tensor, const char* what) {
    TORCH_CHECK(tensor.sizes() == like_.sizes() && tensor.scalar_type() == like_.scalar_type() &&
                    tensor.device() == like_.device() && tensor.layout() == at::kStrided,
                "mfp: ", what, " is ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device(),
                ", its parameter ", like_.scalar_type(), " ", like_.sizes(), " on ", like_.device(),
                "; expected a dense tensor of the same kind");
    if (dense_ && tensor.strides() == like_.strides()) return tensor;
    at::Tensor copy = dense_ ? at::empty_strided(like_.sizes(), like_.strides(), like_.options())
                             : at::empty(like_.sizes(), like_.options());
    copies_.push_back(copy.copy_(tensor));
    return copy;
  }
  void* write(const at::Tensor& tensor, const char* what) {
    written_.emplace_back(tensor, block(tensor, what));
    return written_.back().second.mutable_data_ptr();
  }

  at::Tensor like_;
  bool dense_ = true;
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
};

template <class Step, class Launch>
void run(ParameterTable table, const std::optional<at::Tensor>& keep, c10::Device device, Step step, Launch launch) {
  const int64_t items = plan_step(table.entries);
  if (items == 0) return;
  TORCH_CHECK(!keep.has_value() || keep->device() == device, "mfp: the mask is on ", keep->device(),
              ", the parameters on ", device);
  const Uploaded uploaded = upload(table.entries.data(), table.entries.size() * sizeof(Parameter), device);
  C10_CUDA_CHECK(launch(static_cast<const Parameter*>(uploaded.data), static_cast<int32_t>(table.entries.size()), items,
                        keep.has_value() ? keep->const_data_ptr<bool>() : nullptr, step,
                        c10::cuda::getCurrentCUDAStream()));
  table.finish();
}

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 const std::optional<at::Tensor>& keep, at::IntArrayRef offsets, at::IntArrayRef rows, double lr,
                 double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                 bool first_step) {
  if (params.empty()) return;
  const c10::cuda::CUDAGuard guard(params[0].device());
  check_device("masked_sgd_", "params", params, params[0].device());
  SgdStep step = {};
  step.lr = static_cast<float>(lr);
  step.momentum = static_cast<float>(momentum);
  step.dampening_rest = static_cast<float>(1 - dampening);
  step.weight_decay = static_cast<float>(weight_decay);
  step.nesterov = nesterov;
  step.maximize = maximize;
  step.first_step = first_step;
  run({params, grads, momentum_buffers, {}, keep, offsets, rows}, keep, params[0].device(), step, launch_sgd);
}

void masked_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   const std::optional<at::Tensor>& keep, at::IntArrayRef offsets, at::IntArrayRef rows, double lr,
                   double beta1, double beta2, double eps, double weight_decay, bool maximize, int64_t steps) {
  if (params.empty()) return;
  const c10::cuda::CUDAGuard guard(params[0].device());
  check_device("masked_adamw_", "params", params, params[0].device());
  AdamwStep step = {};
  step.decay = static_cast<float>(1 - lr * weight_decay);
  step.beta1_rest = static_cast<float>(1 - beta1);
  step.beta2 = static_cast<float>(beta2);
  step.beta2_rest = static_cast<float>(1 - beta2);
  step.correction2_root = static_cast<float>(std::sqrt(1 - std::pow(beta2, static_cast<double>(steps))));
  step.eps = static_cast<float>(eps);
  step.step_size = static_cast<float>(lr / (1 - std::pow(beta1, static_cast<double>(steps))));
  step.maximize = maximize;
  run({params, grads, exp_avgs, exp_avg_sqs, keep, offsets, rows}, keep, params[0].device(), step, launch_adamw);
}

TORCH_LIBRARY_IMPL(mfp, CUDA, library) {
  library.impl("masked_sgd_", &masked_sgd_);
  library.impl("masked_adamw_", &masked_adamw_);
}

}  // namespace
}  // namespace mfp::cuda
