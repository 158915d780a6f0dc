// Squared distances of a tile through the tensor cores: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, for Euclidean distances
// alone.
//
// TF32 keeps 11 bits of a float32's 24: each number is split in two, x = high + low, and a product takes three matrix
// products (the fourth, low by low, is 2^-22 of it). Where the sum of the three terms cancels, the tile is computed
// again by differences.
#pragma once

#include "cuda/cosine.h"

namespace mfp::cuda {

// Below this share of |a|^2 + |b|^2, a squared distance has lost too many digits.
constexpr float kProductCancelled = 1.0f / 16;

struct Split {
  uint32_t high, low;
  __device__ explicit Split(float x) {
    high = round(x);
    low = round(x - __uint_as_float(high));
  }
  __device__ static uint32_t round(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }
};

// c += a b for a [16, 8] and b [8, 8], spread over a warp: with g = lane / 4 and t = lane % 4, a thread has
// a (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4), b (t, g) (t + 4, g), c (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t +
// 1).
__device__ inline void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
#ifdef MFP_CUDA_ON_CPU
  shim::multiply_add_tf32(c0, c1, c2, c3, a, b);
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// a.b of this thread's pairs. The tile's columns are the rows of the matrix product, so that its result lies in the
// threads as Tile::row and Tile::column say.
__device__ inline void sum_products(const ScoredLayer& layer, const Tile& tile, BlockMemory& memory, Sums& dot) {
  Sums part;
  dot.clear();
  part.clear();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int column_at = (32 * Tile::warp_column() + lane / 4) * kStride + lane % 4;
  const int row_at = (32 * Tile::warp_row() + lane / 4) * kStride + lane % 4;
  for_each_stage(layer, tile, memory, [&](const float* rows, const float* columns, int64_t stage) {
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 8) {
      uint32_t a_high[2][4], a_low[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Split split(columns[column_at + (16 * m + 8 * (e % 2)) * kStride + k + 4 * (e / 2)]);
          a_high[m][e] = split.high;
          a_low[m][e] = split.low;
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const Split first(rows[row_at + 8 * n * kStride + k]), second(rows[row_at + 8 * n * kStride + k + 4]);
        const uint32_t b_high[2] = {first.high, second.high}, b_low[2] = {first.low, second.low};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float &c0 = part.at[2 * n][2 * m], &c1 = part.at[2 * n + 1][2 * m];
          float &c2 = part.at[2 * n][2 * m + 1], &c3 = part.at[2 * n + 1][2 * m + 1];
          multiply_add(c0, c1, c2, c3, a_low[m], b_high);
          multiply_add(c0, c1, c2, c3, a_high[m], b_low);
          multiply_add(c0, c1, c2, c3, a_high[m], b_high);
        }
      }
    }
    if (stage % kStagesPerBlock == kStagesPerBlock - 1) dot.take(part);
  });
  dot.take(part);
}

// False in all threads if some pair cancels and `square` is not to be used.
__device__ inline bool squares_from_products(const ScoreArguments& arguments, const ScoredLayer& layer,
                                             const Tile& tile, BlockMemory& memory, Sums& square) {
  sum_products(layer, tile, memory, square);
  wait_for(arguments.norm_arrivals(layer), layer.norm_items);
  load_norms(arguments, layer, tile, memory);
  bool cancelled = false;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Direction a = direction(memory, Tile::row(i));
    const float a_square = fmaf(a.high, a.high, 2.0f * a.high * a.low);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Direction b = direction(memory, kTile + Tile::column(j));
      const float both = a_square + fmaf(b.high, b.high, 2.0f * b.high * b.low);
      square.at[i][j] = fmaf(-2.0f, square.at[i][j], both);
      cancelled |= square.at[i][j] < kProductCancelled * both && tile.counts(Tile::row(i), Tile::column(j));
    }
  }
  return __syncthreads_or(cancelled) == 0;
}

}  // namespace mfp::cuda
