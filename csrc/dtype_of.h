// A tensor's dtype as the kernels know it.
#pragma once

#include <ATen/core/Tensor.h>

#include "dtype.h"

namespace mfp {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kBFloat16: return DType::bfloat16;
    case at::kHalf: return DType::float16;
    default: TORCH_CHECK(false, "mfp: expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

}  // namespace mfp
