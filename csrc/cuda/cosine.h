// Cosine distances of a tile, from its squared distances and the norms:
//   1 - cos = (|a - b|^2 - (|a| - |b|)^2) / (2 |a| |b|).
// Where that difference cancels (norms far apart, or parallel filters of different norm), from the products instead,
// and where these cancel too, from the directions in double, pair by pair.
#pragma once

#include "cuda/pairs.h"

namespace mfp::cuda {

struct Direction {
  float high, low, inverse;  // the norm as high + low, and 1 / norm (0 for an all-zero filter)
};

__device__ inline Direction direction(const BlockMemory& memory, int index) {
  return {memory.high[index], memory.low[index], memory.inverse[index]};
}

__device__ inline void load_norms(const ScoreArguments& arguments, const ScoredLayer& layer, const Tile& tile,
                                  BlockMemory& memory) {
  const int t = static_cast<int>(threadIdx.x), index = t % kTile;
  const bool row = t < kTile;
  float2 norm = make_float2(0, 0);
  if (index < (row ? tile.rows : tile.columns)) {
    norm = __ldcg(arguments.norms + layer.offset + int64_t{row ? tile.i : tile.j} * kTile + index);
  }
  memory.high[t] = norm.x;
  memory.low[t] = norm.y;
  memory.inverse[t] = norm.x > 0 ? 1.0f / norm.x : 0.0f;
  __syncthreads();
}

// 1 - |cos| of a pair in `share`, and whether cos < 0 in a bit of `obtuse`: one register a pair for both criteria, and
// 1 - cos = 2 - share of an obtuse pair is exact enough, being at least 1.
struct Cosines {
  Sums share;
  uint32_t obtuse = 0;

  __device__ void set(int i, int j, float distance) {
    const bool beyond = distance > 1.0f;
    share.at[i][j] = beyond ? 2.0f - distance : distance;
    set_obtuse(i, j, beyond);
  }
  __device__ void set_obtuse(int i, int j, bool beyond) {
    const uint32_t bit = 1u << (i * kColumns + j);
    obtuse = beyond ? obtuse | bit : obtuse & ~bit;
  }
  __device__ float distance(int i, int j) const {
    return obtuse >> (i * kColumns + j) & 1u ? 2.0f - share.at[i][j] : share.at[i][j];
  }
};

// Pairs that have to be computed again, one bit a pair: from their products, or from their directions.
struct Lost {
  uint32_t products = 0, directions = 0;
};

// Pairs from their products, half of the thread's rows at a time; where these cancel too, lost.directions says so.
__device__ inline void set_from_products(const ScoredLayer& layer, const Tile& tile, BlockMemory& memory, bool hybrid,
                                         Lost& lost, Cosines& cosines) {
  constexpr int kHalf = kRows / 2;
#pragma unroll 1
  for (int first = 0; first < kRows; first += kHalf) {
    SumsOf<kHalf> dot, part;
    dot.clear();
    part.clear();
    for_each_stage(layer, tile, memory, [&](const float* rows, const float* columns, int64_t stage) {
      for_each_pair<kHalf>(rows + (Tile::row(first) - Tile::row(0)) * kStride, columns,
                           [&](int i, int j, float a, float b) { part.at[i][j] = fmaf(a, b, part.at[i][j]); });
      if (stage % kStagesPerBlock == kStagesPerBlock - 1) dot.take(part);
    });
    dot.take(part);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {  // registers cannot be indexed by `first`: look at all
      if (i / kHalf * kHalf != first) continue;
      const Direction a = direction(memory, Tile::row(i));
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const uint32_t bit = 1u << (i * kColumns + j);
        if ((lost.products & bit) == 0) continue;
        const Direction b = direction(memory, kTile + Tile::column(j));
        const float distance = 1.0f - dot.at[i % kHalf][j] * a.inverse * b.inverse;
        cosines.set(i, j, distance);
        if (distance < kCancelled || (hybrid && distance > 2.0f - kCancelled)) lost.directions |= bit;
      }
    }
  }
}

// Pairs from their directions, in double, each by the thread it belongs to: |u - v|^2 / 2 and |u + v|^2 / 2 of unit
// vectors. Rare, and slow.
__device__ inline void set_from_directions(const ScoredLayer& layer, const Tile& tile, const BlockMemory& memory,
                                           uint32_t pairs, Cosines& cosines) {
#pragma unroll 1
  for (; pairs != 0; pairs &= pairs - 1) {
    const int index = __ffs(static_cast<int>(pairs)) - 1, row = Tile::row(index / kColumns);
    const int column = Tile::column(index % kColumns);
    const Direction a = direction(memory, row), b = direction(memory, kTile + column);
    const int64_t a_begin = (int64_t{tile.i} * kTile + row) * layer.filter_size;
    const int64_t b_begin = (int64_t{tile.j} * kTile + column) * layer.filter_size;
    const double inverse_a = 1.0 / (static_cast<double>(a.high) + static_cast<double>(a.low));
    const double inverse_b = 1.0 / (static_cast<double>(b.high) + static_cast<double>(b.low));
    double less = 0, more = 0;
    for (int64_t k = 0; k < layer.filter_size; ++k) {
      const double u = static_cast<double>(load_as_float(layer.weights, layer.dtype, a_begin + k)) * inverse_a;
      const double v = static_cast<double>(load_as_float(layer.weights, layer.dtype, b_begin + k)) * inverse_b;
      less += (u - v) * (u - v);
      more += (u + v) * (u + v);
    }
    const bool beyond = more < less;
    const float share = static_cast<float>((beyond ? more : less) / 2);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {  // registers cannot be indexed: look at all
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (i * kColumns + j != index) continue;
        cosines.share.at[i][j] = share;
        cosines.set_obtuse(i, j, beyond);
      }
    }
  }
}

// The cosines of this thread's pairs, given their squared distances; `unusable` if these are not to be relied on.
__device__ inline void find_cosines(const ScoreArguments& arguments, const ScoredLayer& layer, const Tile& tile,
                                    BlockMemory& memory, const Sums& square, bool unusable, Cosines& cosines) {
  wait_for(arguments.norm_arrivals(layer), layer.norm_items);
  load_norms(arguments, layer, tile, memory);
  const bool hybrid = arguments.hybrid >= 0;
  Lost lost;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Direction a = direction(memory, Tile::row(i));
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const Direction b = direction(memory, kTile + Tile::column(j));
      const float difference = (a.high - b.high) + (a.low - b.low);
      const float rest = fmaf(-difference, difference, square.at[i][j]);
      float distance = 0.5f * rest * a.inverse * b.inverse;
      const bool zero = a.high == 0.0f || b.high == 0.0f;
      if (zero) distance = a.high == b.high ? 0.0f : 1.0f;  // no direction: cosine 0; two of them are duplicates
      const bool bad = unusable || !(square.at[i][j] >= kSmallestSquare && square.at[i][j] <= kLargestSquare);
      const bool again = bad || rest < kCancelled * square.at[i][j] || (hybrid && distance > 2.0f - kCancelled);
      if (again && !zero && tile.counts(Tile::row(i), Tile::column(j))) {
        (bad ? lost.directions : lost.products) |= 1u << (i * kColumns + j);
      }
      cosines.set(i, j, distance);
    }
  }
  if (__syncthreads_or(lost.products != 0)) set_from_products(layer, tile, memory, hybrid, lost, cosines);
  set_from_directions(layer, tile, memory, lost.directions, cosines);
}

}  // namespace mfp::cuda
