// The optimiser ops on CPU tensors. Schemas are in mfp/schemas.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "cpu/optim/optim.h"
#include "dtype_of.h"

namespace mfp::cpu {
namespace {

// Hands out the memory of tensors in one layout per parameter. Tensors laid out otherwise go through a copy, which
// `finish` writes back; that is rare (a gradient in another memory format, a transposed parameter) and not fast.
class Memory {
 public:
  // Later tensors are to be laid out like this parameter, whose rows must be blocks if they are masked.
  void begin(const at::Tensor& parameter, bool masked) {
    like_ = &parameter;
    const bool rows_first =
        !masked || parameter.size(0) <= 1 || parameter.stride(0) * parameter.size(0) == parameter.numel();
    dense_ = rows_first && parameter.is_non_overlapping_and_dense();
  }
  const void* read(const at::Tensor& tensor, const char* what) {
    check(tensor, what);
    return block(tensor).const_data_ptr();
  }
  void* write(const at::Tensor& tensor, const char* what) {
    check(tensor, what);
    const at::Tensor memory = block(tensor);
    written_.push_back({tensor, memory});
    return memory.mutable_data_ptr();
  }
  // Autograd notices by the version that a tensor was changed in place.
  void finish() {
    for (auto& [tensor, memory] : written_) {
      if (!memory.is_same(tensor)) tensor.copy_(memory);
      if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
    }
  }

 private:
  void check(const at::Tensor& tensor, const char* what) const {
    TORCH_CHECK(tensor.sizes() == like_->sizes() && tensor.scalar_type() == like_->scalar_type() && tensor.is_cpu() &&
                    tensor.layout() == at::kStrided,
                "mfp: ", what, " is ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device(),
                ", its parameter ", like_->scalar_type(), " ", like_->sizes(), " on ", like_->device(),
                "; expected a dense tensor of the same kind");
  }
  at::Tensor block(const at::Tensor& tensor) {
    if (dense_ && tensor.strides() == like_->strides()) return tensor;
    at::Tensor copy = dense_ ? at::empty_strided(like_->sizes(), like_->strides(), like_->options())
                             : at::empty(like_->sizes(), like_->options());
    copies_.push_back(copy.copy_(tensor));
    return copy;
  }

  const at::Tensor* like_ = nullptr;
  bool dense_ = true;
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
};

std::vector<Parameter> parameters_of(Memory& memory, at::TensorList params, at::TensorList grads, at::TensorList first,
                                     at::TensorList second, const std::optional<at::Tensor>& keep,
                                     at::IntArrayRef offsets, at::IntArrayRef rows) {
  const bool* mask = keep ? keep->const_data_ptr<bool>() : nullptr;
  std::vector<Parameter> found;
  found.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].numel() == 0) continue;
    const bool masked = mask != nullptr && offsets[i] >= 0;
    TORCH_CHECK(!masked || (rows[i] > 0 && params[i].size(0) % rows[i] == 0 && offsets[i] + rows[i] <= keep->numel()),
                "mfp: parameter ", i, " ", params[i].sizes(), " does not fit ", rows[i], " filters at ", offsets[i]);
    memory.begin(params[i], masked);
    Parameter p = {};
    p.values = memory.write(params[i], "a parameter");
    p.gradient = memory.read(grads[i], "a gradient");
    if (!first.empty()) p.first = memory.write(first[i], "a momentum");
    if (!second.empty()) p.second = memory.write(second[i], "a mean of squares");
    p.dtype = dtype_of(params[i]);
    p.keep = masked ? mask + offsets[i] : nullptr;
    p.rows = masked ? rows[i] : params[i].numel();
    p.row_size = params[i].numel() / p.rows;
    found.push_back(p);
  }
  return found;
}

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 const std::optional<at::Tensor>& keep, at::IntArrayRef offsets, at::IntArrayRef rows, double lr,
                 double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                 bool first_step) {
  SgdStep step = {};
  step.lr = lr, step.momentum = momentum, step.dampening_rest = 1 - dampening, step.weight_decay = weight_decay;
  step.nesterov = nesterov, step.maximize = maximize, step.first_step = first_step;
  Memory memory;
  sgd_step(parameters_of(memory, params, grads, momentum_buffers, {}, keep, offsets, rows), step, at::get_num_threads(),
           current_isa());
  memory.finish();
}

void masked_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   const std::optional<at::Tensor>& keep, at::IntArrayRef offsets, at::IntArrayRef rows, double lr,
                   double beta1, double beta2, double eps, double weight_decay, bool maximize, int64_t steps) {
  AdamwStep step = {};
  step.decay = 1 - lr * weight_decay, step.beta1_rest = 1 - beta1, step.beta2 = beta2, step.beta2_rest = 1 - beta2;
  step.correction2_root = std::sqrt(1 - std::pow(beta2, steps)), step.eps = eps;
  step.step_size = lr / (1 - std::pow(beta1, steps)), step.maximize = maximize;
  Memory memory;
  adamw_step(parameters_of(memory, params, grads, exp_avgs, exp_avg_sqs, keep, offsets, rows), step,
             at::get_num_threads(), current_isa());
  memory.finish();
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) {
  m.impl("masked_sgd_", &masked_sgd_);
  m.impl("masked_adamw_", &masked_adamw_);
}

}  // namespace mfp::cpu
