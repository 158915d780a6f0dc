// Small device functions that several kernel files share.
#pragma once

#include "cuda/runtime.h"
#ifndef MFP_CUDA_ON_CPU
#include <cuda_fp16.h>
#endif

namespace mfp::cuda {

// Index of the last entry of a table whose first_item is not beyond `item`: which tensor a block works on.
template <class Entry>
__device__ inline int32_t find_entry(const Entry* entries, int32_t count, int64_t item) {
  int32_t low = 0, high = count - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (entries[middle].first_item <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ inline float load_as_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  if (dtype == DType::float16) return __half2float(__ushort_as_half(bits));
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

}  // namespace mfp::cuda
