// From torch tensors to what the kernels' tables hold.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/runtime.h"
#include "dtype_of.h"

namespace mfp::cuda {

inline void check_device(const char* op, const char* argument, at::TensorList tensors, c10::Device device) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors[i].device() == device, op, ": ", argument, "[", i, "] is on ", tensors[i].device(),
                ", expected ", device, " like the others");
  }
}

}  // namespace mfp::cuda
