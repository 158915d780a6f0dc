// What the last block of a layer does: add the layer's partial sums in a fixed order, rank its filters, write its mask.
#pragma once

#include "cuda/pairs.h"

namespace mfp::cuda {

__device__ inline void add_partial_sums(const ScoreArguments& arguments, const ScoredLayer& layer, int32_t index) {
  const Request request = arguments.requests[index];
  const int64_t width = int64_t{layer.tiles} * kTile;
  const float* sums = arguments.partial + request.channel * arguments.slots + layer.slots;
  for (int64_t first = 4 * int64_t{threadIdx.x}; first < layer.filters; first += 4 * kThreads) {
    double total[4] = {};
#pragma unroll 8
    for (int32_t slot = 0; slot < layer.tiles; ++slot) {
      const float4 part = __ldcg(reinterpret_cast<const float4*>(sums + slot * width + first));
      total[0] += static_cast<double>(part.x);
      total[1] += static_cast<double>(part.y);
      total[2] += static_cast<double>(part.z);
      total[3] += static_cast<double>(part.w);
    }
    for (int e = 0; e < 4 && first + e < layer.filters; ++e) {
      const int64_t filter = layer.offset + first + e;
      if (request.kind == Kind::weighted_hybrid) {
        const float2 norm = __ldcg(arguments.norms + filter);
        total[e] *= static_cast<double>(norm.x) + static_cast<double>(norm.y);
      }
      arguments.scores[index * arguments.filters + filter] = static_cast<float>(total[e]);
    }
  }
}

// Order-preserving map of float scores to integers; -0 is 0.
__device__ inline uint32_t rank_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// In the first warp: the bin in which the running count reaches `wanted`; `wanted` loses what lies in lower bins.
__device__ inline uint32_t find_bin(const int32_t* histogram, int32_t& wanted) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int32_t sum = 0;
  for (int bin = 8 * lane; bin < 8 * lane + 8; ++bin) sum += histogram[bin];
  int32_t below = sum;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, below, distance);
    if (lane >= distance) below += other;
  }
  below -= sum;
  const bool mine = below < wanted && wanted <= below + sum;
  uint32_t bin = 8 * static_cast<uint32_t>(lane);
  if (mine) {
    while (below + histogram[bin] < wanted) below += histogram[bin++];
  }
  const uint32_t owner = __ballot_sync(0xffffffffu, mine);
  const int source = __ffs(static_cast<int>(owner)) - 1;
  wanted -= __shfl_sync(0xffffffffu, below, source);
  return __shfl_sync(0xffffffffu, bin, source);
}

// keep = false for the num_pruned lowest scores, the lower index first among equals: the key of the last one to go is
// found byte by byte (counts of integers: the order of the additions does not matter), then the equals by index.
__device__ inline void select_lowest(const ScoreArguments& arguments, const ScoredLayer& layer, BlockMemory& memory) {
  const float* scores = arguments.scores + arguments.chosen * arguments.filters + layer.offset;
  bool* keep = arguments.keep + layer.offset;
  int32_t* histogram = reinterpret_cast<int32_t*>(memory.stages[0]);
  int32_t* shared_wanted = histogram + 256;
  uint32_t* shared_key = reinterpret_cast<uint32_t*>(histogram + 257);
  int32_t wanted = layer.num_pruned;
  uint32_t key = 0;
  for (int shift = 24; shift >= 0 && layer.num_pruned > 0; shift -= 8) {
    for (int bin = static_cast<int>(threadIdx.x); bin < 256; bin += kThreads) histogram[bin] = 0;
    __syncthreads();
    const uint32_t known = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    for (int64_t filter = threadIdx.x; filter < layer.filters; filter += kThreads) {
      const uint32_t candidate = rank_key(__ldcg(scores + filter));
      if ((candidate & known) == key) atomicAdd(histogram + (candidate >> shift & 255u), 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const uint32_t bin = find_bin(histogram, wanted);
      if (threadIdx.x == 0) {
        *shared_wanted = wanted;
        *shared_key = key | bin << shift;
      }
    }
    __syncthreads();
    wanted = *shared_wanted;
    key = *shared_key;
  }
  // `wanted` of the filters whose key is `key` go, the first ones; the first warp counts them off.
  if (threadIdx.x >= 32) return;
  const int lane = static_cast<int>(threadIdx.x);
  int32_t seen = 0;
  for (int64_t first = 0; first < layer.filters; first += 32) {
    const int64_t filter = first + lane;
    const bool inside = filter < layer.filters;
    const uint32_t candidate = inside ? rank_key(__ldcg(scores + filter)) : 0;
    const bool equal = inside && layer.num_pruned > 0 && candidate == key;
    const uint32_t equals = __ballot_sync(0xffffffffu, equal);
    const int32_t before = seen + __popc(equals & ((1u << lane) - 1));
    if (inside) keep[filter] = layer.num_pruned == 0 || !(candidate < key || (equal && before < wanted));
    seen += __popc(equals);
  }
}

__device__ inline bool has_bad_score(const ScoreArguments& arguments, const ScoredLayer& layer) {
  bool bad = false;
  for (int32_t index = 0; index < arguments.num_requests; ++index) {
    const float* scores = arguments.scores + index * arguments.filters + layer.offset;
    for (int64_t filter = threadIdx.x; filter < layer.filters; filter += kThreads) {
      bad |= !(fabsf(__ldcg(scores + filter)) <= 3.402823466e38f);
    }
  }
  return __syncthreads_or(bad) != 0;
}

// The last layer decides: one score that is not finite, anywhere, and nothing is pruned at all.
__device__ inline void open_zeroing(const ScoreArguments& arguments, BlockMemory& memory) {
  if (arrive(arguments.counters + kLayersDone, arguments.num_layers, &memory.flag)) {
    if (*static_cast<const volatile int32_t*>(arguments.counters + kNotFinite) != 0) {
      for (int64_t filter = threadIdx.x; filter < arguments.filters; filter += kThreads) arguments.keep[filter] = true;
    }
    raise(arguments.counters + kMaskReady);
  }
}

__device__ inline void finish_layer(const ScoreArguments& arguments, const ScoredLayer& layer, BlockMemory& memory) {
  for (int32_t index = 0; index < arguments.num_requests; ++index) {
    if (arguments.requests[index].channel >= 0) add_partial_sums(arguments, layer, index);
  }
  if (arguments.chosen < 0) return;
  __syncthreads();
  if (has_bad_score(arguments, layer) && threadIdx.x == 0) atomicExch(arguments.counters + kNotFinite, 1);
  select_lowest(arguments, layer, memory);
  open_zeroing(arguments, memory);
}

}  // namespace mfp::cuda
