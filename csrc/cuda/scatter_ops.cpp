// scatter_add_ on CUDA tensors. The schema is in mfp/schemas.py.
#include <torch/library.h>

#include "cuda/scatter.h"
#include "cuda/tensors.h"

namespace mfp::cuda {
namespace {

void scatter_add_(const at::Tensor& residual, const at::Tensor& branch, const at::Tensor& index, bool relu) {
  const c10::cuda::CUDAGuard guard(residual.device());
  check_device("scatter_add_", "branch, index", {branch, index}, residual.device());
  TORCH_CHECK(residual.dim() >= 2 && branch.dim() == residual.dim() && branch.size(1) == index.numel(),
              "scatter_add_: residual is ", residual.sizes(), ", branch ", branch.sizes(), ", index ", index.sizes());
  TORCH_CHECK(
      branch.scalar_type() == residual.scalar_type() && index.scalar_type() == at::kLong && index.is_contiguous(),
      "scatter_add_: branch is ", branch.scalar_type(), ", residual ", residual.scalar_type(), ", index ",
      index.scalar_type(), "; expected two of one dtype and a contiguous int64 vector");
  const bool last = !residual.is_contiguous() && residual.stride(1) == 1;
  // not suggest_memory_format(), which looks at the strides of dimensions of size 1
  const auto format = residual.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(residual.is_contiguous() || (last && residual.dim() > 3 && residual.is_contiguous(format)),
              "scatter_add_: residual has strides ", residual.strides(), "; expected contiguous or channels_last");
  const at::Tensor source = last ? branch.contiguous(format) : branch.contiguous();
  ScatterAdd arguments = {};
  arguments.residual = residual.mutable_data_ptr();
  arguments.branch = source.const_data_ptr();
  arguments.index = index.const_data_ptr<int64_t>();
  arguments.channels = residual.size(1);
  arguments.branch_channels = branch.size(1);
  arguments.outer = last ? residual.numel() / std::max<int64_t>(residual.size(1), 1) : residual.size(0);
  arguments.inner = last ? 1 : residual.numel() / std::max<int64_t>(residual.size(0) * residual.size(1), 1);
  arguments.dtype = dtype_of(residual);
  arguments.relu = relu;
  C10_CUDA_CHECK(launch_scatter_add(arguments, c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(mfp, CUDA, library) { library.impl("scatter_add_", &scatter_add_); }

}  // namespace
}  // namespace mfp::cuda
