// Distances with an exponent other than 1 and 2. Each pair is scaled by its largest difference, so that no power
// overflows or vanishes: two passes over the weights. Slower than the two fast ones by the cost of log2 and exp2.
#pragma once

#include "cuda/norms.h"
#include "cuda/pairs.h"

namespace mfp::cuda {

// Calls add(i, j, |a - b|) for the pairs of a stage, one k at a time: the code of a power is too long to unroll further.
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

__device__ inline void sum_powers(const ScoredLayer& layer, const Tile& tile, BlockMemory& memory, float p,
                                  Sums& distance) {
  Sums largest, part;
  largest.clear();
  for_each_stage(layer, tile, memory, [&](const float* rows, const float* columns, int64_t) {
    for_each_difference(rows, columns,
                        [&](int i, int j, float d) { largest.at[i][j] = fmaxf(largest.at[i][j], d); });
  });
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (largest.at[i][j] == 0.0f) largest.at[i][j] = 1.0f;
    }
  }
  distance.clear();
  part.clear();
  for_each_stage(layer, tile, memory, [&](const float* rows, const float* columns, int64_t) {
    for_each_difference(rows, columns,
                        [&](int i, int j, float d) { part.at[i][j] += power(d / largest.at[i][j], p); });
    distance.take(part);
  });
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      distance.at[i][j] = largest.at[i][j] * power(distance.at[i][j], 1.0f / p);
    }
  }
}

}  // namespace mfp::cuda
