// Distances whose powers would leave the range of float32 or have an exponent other than 1 and 2: each pair is scaled
// by its largest difference, in two passes over the weights. Slower than the direct way.
#pragma once

#include "cuda/norms.h"
#include "cuda/pairs.h"

namespace mfp::cuda {

struct Square {
  __device__ float raise(float x) const { return x * x; }
  __device__ float root(float x) const { return sqrtf(x); }
};

struct Power {
  float p;
  __device__ float raise(float x) const { return power(x, p); }
  __device__ float root(float x) const { return power(x, 1.0f / p); }
};

// Calls add(i, j, |a - b|) for the pairs of a stage, one k at a time: the code of a power is too long to unroll
// further.
template <class Add>
__device__ inline void for_each_difference(const float* rows, const float* columns, Add add) {
#pragma unroll 1
  for (int k = 0; k < kDepth; ++k) {
    float b[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) b[j] = columns[Tile::column(j) * kStride + k];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float a = rows[Tile::row(i) * kStride + k];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) add(i, j, fabsf(a - b[j]));
    }
  }
}

template <class Exponent>
__device__ inline void scaled_distances(const ScoredLayer& layer, const Tile& tile, BlockMemory& memory,
                                        Exponent exponent, Sums& distance) {
  Sums scale, part;
  scale.clear();
  for_each_stage(layer, tile, memory, [&](const float* rows, const float* columns, int64_t) {
    for_each_difference(rows, columns, [&](int i, int j, float d) { scale.at[i][j] = fmaxf(scale.at[i][j], d); });
  });
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) scale.at[i][j] = 1.0f / fmaxf(scale.at[i][j], 1e-37f);
  }
  distance.clear();
  part.clear();
  for_each_stage(layer, tile, memory, [&](const float* rows, const float* columns, int64_t) {
    for_each_difference(rows, columns,
                        [&](int i, int j, float d) { part.at[i][j] += exponent.raise(d * scale.at[i][j]); });
    distance.take(part);
  });
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) distance.at[i][j] = exponent.root(distance.at[i][j]) / scale.at[i][j];
  }
}

// Whether a tile's squared distances may have left the range of float32: one of them is huge or not a number, or all
// are tiny. One tiny distance among others is harmless: if some pair of the tile is 1e-12 apart, then every filter of
// the tile is at least half as far from one of that pair, and what underflows does not show in its sum.
__device__ inline bool out_of_range(const Tile& tile, const Sums& square) {
  bool huge = false, plain = false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (!tile.counts(Tile::row(i), Tile::column(j))) continue;
      huge |= !(square.at[i][j] <= kLargestSquare);
      plain |= square.at[i][j] >= 1e-24f;
    }
  }
  const bool any_huge = __syncthreads_or(huge) != 0, any_plain = __syncthreads_or(plain) != 0;
  return any_huge || !any_plain;
}

}  // namespace mfp::cuda
