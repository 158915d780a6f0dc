// Just enough of CUDA for g++ to compile and run the kernels of csrc/cuda on a CPU: it proves indexing and logic, and
// that barriers and waits suffice for the orders tried; not the memory model of a GPU.
//
// A thread is a fiber (ucontext). All fibers of all blocks take turns, in an order that `seed` shuffles, so that blocks
// that wait for each other make progress. An asynchronous copy happens at the wait for it, never earlier, and shared
// memory starts as garbage: a missing wait or a missing initialisation shows. A launch in which no fiber can go on, or
// which takes too many turns, ends the process with a message.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

inline unsigned seed = 0;                             // of the order in which fibers take turns; 0: in order
inline int processors = 1, blocks_per_processor = 2;  // what the "device" says of itself
constexpr size_t kStack = 128 * 1024;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Block {
  std::vector<unsigned char> shared;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> exchange;               // one word a thread, for shuffles and votes
  std::vector<std::array<uint32_t, 6>> matrix;  // a thread's part of two matrices
  int live = 0;
  std::vector<int> live_in_warp;
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread, block_index;
  Block* block = nullptr;
  bool done = false;
  const unsigned* waits_for = nullptr;  // runs again once this generation has moved on from `seen`
  unsigned seen = 0;
  std::vector<Copy> copies;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", why);
  std::abort();
}

inline void yield() {
  Fiber* const me = current;
  swapcontext(&me->context, &scheduler);
}

inline void arrive_and_wait(Barrier& barrier, int needed) {
  if (++barrier.arrived == needed) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->waits_for = &barrier.generation;
  current->seen = barrier.generation;
  yield();
}

inline unsigned lane() { return threadIdx.x % 32; }
inline unsigned warp() { return threadIdx.x / 32; }
inline void sync_warp() { arrive_and_wait(current->block->warps[warp()], current->block->live_in_warp[warp()]); }

inline void run_fiber() {
  body();
  current->done = true;
  --current->block->live;
  --current->block->live_in_warp[warp()];
  if (!current->copies.empty()) fail("a thread ended with copies under way");
}

template <class Body>
void launch(dim3 grid, dim3 threads, size_t shared_bytes, Body call) {
  const unsigned per_block = threads.x * threads.y * threads.z, blocks = grid.x * grid.y * grid.z;
  if (per_block == 0 || blocks == 0) fail("an empty launch");
  gridDim = grid;
  blockDim = threads;
  body = call;
  std::vector<Block> states(blocks);
  while (fibers.size() < size_t{blocks} * per_block) fibers.push_back(std::make_unique<Fiber>());
  std::vector<Fiber*> order;
  for (unsigned b = 0; b < blocks; ++b) {
    Block& state = states[b];
    state.shared.assign(shared_bytes + 1, 0xff);
    state.warps.resize((per_block + 31) / 32);
    state.live_in_warp.assign((per_block + 31) / 32, 0);
    state.exchange.assign(per_block, 0);
    state.matrix.assign(per_block, {});
    state.live = static_cast<int>(per_block);
    for (unsigned t = 0; t < per_block; ++t) {
      ++state.live_in_warp[t / 32];
      Fiber& fiber = *fibers[size_t{b} * per_block + t];
      fiber.thread = dim3(t % threads.x, t / threads.x % threads.y, t / threads.x / threads.y);
      fiber.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
      fiber.block = &state;
      fiber.done = false;
      fiber.waits_for = nullptr;
      fiber.copies.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, run_fiber, 0);
      order.push_back(&fiber);
    }
  }
  unsigned random = seed;
  for (long sweep = 0; !order.empty(); ++sweep) {
    if (sweep > 50'000'000) fail("no end: a block waits for what never comes");
    if (seed != 0) {
      for (size_t i = order.size() - 1; i > 0; --i) {
        random = random * 1664525u + 1013904223u;
        std::swap(order[i], order[(random >> 8) % (i + 1)]);
      }
    }
    bool any = false, ended = false;
    for (Fiber* fiber : order) {
      if (fiber->waits_for != nullptr && *fiber->waits_for == fiber->seen) continue;
      any = true;
      fiber->waits_for = nullptr;
      current = fiber;
      threadIdx = fiber->thread;
      blockIdx = fiber->block_index;
      swapcontext(&scheduler, &fiber->context);
      ended |= fiber->done;
    }
    if (!any) fail("deadlock: every thread waits at a barrier");
    if (ended) {
      std::vector<Fiber*> left;
      for (Fiber* fiber : order) {
        if (!fiber->done) left.push_back(fiber);
      }
      order.swap(left);
    }
  }
}

inline void copy_async(void* to, const void* from, bool valid, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (valid && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    fail("a copy that is not aligned to its size");
  }
  current->copies.push_back({to, from, valid, bytes});
}

inline void wait_for_copies() {
  for (const Copy& copy : current->copies) {
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    } else {
      std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    }
  }
  current->copies.clear();
}

template <class T>
T from_lane(T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  std::vector<uint64_t>& words = current->block->exchange;
  std::memcpy(&words[threadIdx.x], &value, sizeof value);
  sync_warp();
  T result = value;
  if (source < 32) std::memcpy(&result, &words[32 * warp() + source], sizeof result);
  sync_warp();
  return result;
}

// The tensor cores' product of TF32 matrices, laid out over a warp as PTX says of mma.m16n8k8. Sums are rounded towards
// zero, as bad as any GPU's.
inline void multiply_add_tf32(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                              const uint32_t (&b)[2]) {
  std::vector<std::array<uint32_t, 6>>& parts = current->block->matrix;
  parts[threadIdx.x] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  for (uint32_t bits : parts[threadIdx.x]) {
    if ((bits & 0x1fffu) != 0 && (bits & 0x7f800000u) != 0x7f800000u) fail("a number that TF32 does not have");
  }
  sync_warp();
  const auto number = [&](unsigned lane, unsigned which) {
    float value;
    std::memcpy(&value, &parts[32 * warp() + lane][which], 4);
    return static_cast<double>(value);
  };
  float* results[4] = {&c0, &c1, &c2, &c3};
  for (unsigned r = 0; r < 4; ++r) {
    const unsigned row = lane() / 4 + 8 * (r / 2), column = 2 * (lane() % 4) + r % 2;
    double sum = static_cast<double>(*results[r]);
    for (unsigned k = 0; k < 8; ++k) {
      sum += number(row % 8 * 4 + k % 4, row / 8 + 2 * (k / 4)) * number(column * 4 + k % 4, 4 + k / 4);
    }
    float rounded = static_cast<float>(sum);
    if (fabs(static_cast<double>(rounded)) > fabs(sum)) rounded = nextafterf(rounded, 0.0f);
    *results[r] = rounded;
  }
  sync_warp();
}

}  // namespace shim

#define MFP_SHARED_BYTES(name) unsigned char* const name = shim::current->block->shared.data()
#define MFP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), shim::launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { shim::arrive_and_wait(shim::current->block->all, shim::current->block->live); }
inline int __syncthreads_or(int value) {
  shim::current->block->exchange[threadIdx.x] = value != 0;
  __syncthreads();
  int any = 0;
  for (uint64_t word : shim::current->block->exchange) any |= word != 0;
  __syncthreads();
  return any;
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return shim::from_lane(value, static_cast<unsigned>(source));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::from_lane(value, shim::lane() ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const unsigned lane = shim::lane(), d = static_cast<unsigned>(distance);
  return shim::from_lane(value, lane >= d ? lane - d : lane);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  std::vector<uint64_t>& words = shim::current->block->exchange;
  words[threadIdx.x] = value;
  shim::sync_warp();
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    bits |= static_cast<unsigned>(words[32 * shim::warp() + lane] != 0) << lane;
  shim::sync_warp();
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { shim::yield(); }
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
template <class T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }  // the tests compile with -ffp-contract=off
struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half half) { return half.bits; }
inline float __half2float(__half half) {
  _Float16 value;
  std::memcpy(&value, &half.bits, 2);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result.bits, &half, 2);
  return result;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = shim::processors;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = shim::blocks_per_processor;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
