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

// Waiting for other blocks: thread 0 polls, and all threads see what was written before the counter was raised.
__device__ inline void wait_for(const int32_t* counter, int32_t target) {
  if (threadIdx.x == 0) {
    while (*static_cast<const volatile int32_t*>(counter) < target) __nanosleep(100);
    __threadfence();
  }
  __syncthreads();
}

// True in all threads of the block whose arrival is number `target`; that block sees what the others wrote before.
__device__ inline bool arrive(int32_t* counter, int32_t target, int32_t* broadcast) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *broadcast = atomicAdd(counter, 1) == target - 1;
  __syncthreads();
  const bool last = *broadcast != 0;
  if (last) __threadfence();
  return last;
}

// 16 or 4 bytes from global to shared memory without passing through registers; zeros if not `valid`.
__device__ inline void copy_async_16(float* shared, const float* global, bool valid) {
#ifdef MFP_CUDA_ON_CPU
  shim::copy_async(shared, global, valid, 16);
#else
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
#endif
}

__device__ inline void copy_async_4(float* shared, const float* global, bool valid) {
#ifdef MFP_CUDA_ON_CPU
  shim::copy_async(shared, global, valid, 4);
#else
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(valid ? 4 : 0) : "memory");
#endif
}

// This thread's copies are there; a barrier must follow before other threads read them.
__device__ inline void wait_for_copies() {
#ifdef MFP_CUDA_ON_CPU
  shim::wait_for_copies();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace mfp::cuda
