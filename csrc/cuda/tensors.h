// From torch tensors to what the kernels' tables hold.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/runtime.h"

namespace mfp::cuda {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kBFloat16: return DType::bfloat16;
    case at::kHalf: return DType::float16;
    default: TORCH_CHECK(false, "mfp: expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

inline void check_device(const char* op, const char* argument, at::TensorList tensors, c10::Device device) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors[i].device() == device, op, ": ", argument, "[", i, "] is on ", tensors[i].device(),
                ", expected ", device, " like the others");
  }
}

}  // namespace mfp::cuda
