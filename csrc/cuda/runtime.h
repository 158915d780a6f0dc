// The CUDA runtime, or, in tests that compile the same files with g++ and MFP_CUDA_ON_CPU, what stands in for it
// (tests/cuda_on_cpu.h: threads are fibers).
#pragma once

#include <cstdint>

#ifdef MFP_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

// All shared memory is dynamic: one block of bytes that each kernel lays out itself.
#define MFP_SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#define MFP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

#include "dtype.h"

namespace mfp::cuda {

// Whether a grid can have so many blocks; a launch would take the number modulo 2^32.
inline bool fits_grid(int64_t blocks) { return blocks <= INT32_MAX; }

}  // namespace mfp::cuda
