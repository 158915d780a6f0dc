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

// A 16-bit number of either format as a float, exactly, and back, rounded to nearest, ties to even.
struct Bfloat16 {
  uint16_t bits;
  __device__ float widen() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  __device__ static Bfloat16 narrow(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
  }
};

struct Float16 {
  uint16_t bits;
  __device__ float widen() const { return __half2float(__ushort_as_half(bits)); }
  __device__ static Float16 narrow(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
};

struct Float32 {
  float value;
  __device__ float widen() const { return value; }
  __device__ static Float32 narrow(float x) { return {x}; }
};

__device__ inline float load_as_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[index];
  if (dtype == DType::float16) return static_cast<const Float16*>(data)[index].widen();
  return static_cast<const Bfloat16*>(data)[index].widen();
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
//
// The fences are those of the thread that has the atomic, and stand between it and the barriers, as in the grid barrier
// of cooperative groups: fences are cumulative, so they order the writes and reads of all of the block's threads.
__device__ inline bool arrive(int32_t* counter, int32_t target, int32_t* broadcast) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *broadcast = atomicAdd(counter, 1) == target - 1;
    __threadfence();
  }
  __syncthreads();
  return *broadcast != 0;
}

// Raises a flag that wait_for(flag, 1) waits for; who has waited sees what this block wrote before.
__device__ inline void raise(int32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicExch(flag, 1);
  }
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
