// Sums over pairs of filters: one tile of kTile x kTile pairs a block.
//
// A block is 2 x 2 warps, a warp has 32 x 32 pairs and a thread 8 x 4 of them, spread as the tensor cores spread the
// result of a matrix product (tensor.h). Rows of weights pass through shared memory kDepth numbers at a time, two
// stages deep; the row stride kStride keeps reads of 8 neighbouring rows in different banks.
#pragma once

#include "cuda/device.h"
#include "cuda/score.h"

namespace mfp::cuda {

constexpr int kThreads = 128;
constexpr int kDepth = 32;
constexpr int kStride = kDepth + 4;
constexpr int kStage = 2 * kTile * kStride;  // floats: rows, then columns
constexpr int kRows = 8, kColumns = 4;       // pairs of a thread
constexpr int kStagesPerBlock = 2;           // a float sum runs over at most 64 numbers before it joins the total

// Below this share of its terms, a difference has lost too many digits: the pair is computed again in another way.
constexpr float kCancelled = 1.0f / 32;

// Squared distances in this range have kept their digits in float32.
constexpr float kSmallestSquare = 1e-30f, kLargestSquare = 1e30f;

struct BlockMemory {
  float stages[2][kStage];
  float high[2 * kTile], low[2 * kTile], inverse[2 * kTile];  // norms of the tile's rows, then columns
  ScoredLayer layer;                                          // here and not in registers, which the sums need
  int32_t item, flag;
};
static_assert(sizeof(BlockMemory) <= 48 * 1024, "more than a kernel gets without asking for it");

struct Tile {
  int32_t i, j;       // of the row and of the column block, i >= j
  int rows, columns;  // filters there are in the two blocks

  __device__ Tile(const ScoredLayer& layer, int64_t item) {
    i = static_cast<int32_t>((sqrtf(8.0f * static_cast<float>(item) + 1.0f) - 1.0f) * 0.5f);
    while (int64_t{i} * (i + 1) / 2 > item) --i;
    while (int64_t{i + 1} * (i + 2) / 2 <= item) ++i;
    j = static_cast<int32_t>(item - int64_t{i} * (i + 1) / 2);
    rows = remaining(layer.filters, i);
    columns = remaining(layer.filters, j);
  }
  __device__ static int remaining(int64_t filters, int32_t block) {
    const int64_t left = filters - int64_t{block} * kTile;
    return left < kTile ? static_cast<int>(left) : kTile;
  }
  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / 64; }
  __device__ static int warp_column() { return static_cast<int>(threadIdx.x) / 32 % 2; }
  // This thread is one of 8 that share its rows and one of 4 that share its columns.
  __device__ static int among_rows() { return static_cast<int>(threadIdx.x) % 4; }
  __device__ static int among_columns() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  // This thread's pairs (i, j), within the tile.
  __device__ static int row(int i) { return 32 * warp_row() + 2 * among_rows() + i % 2 + 8 * (i / 2); }
  __device__ static int column(int j) { return 32 * warp_column() + among_columns() + 8 * j; }

  __device__ bool diagonal() const { return i == j; }
  // All pairs of this warp lie above the diagonal.
  __device__ bool idle() const { return diagonal() && warp_row() < warp_column(); }
  // Each pair of different filters once.
  __device__ bool counts(int r, int c) const { return r < rows && c < columns && (!diagonal() || r > c); }
};

// Four numbers of a row into shared memory; zeros where the layer ends, which add nothing to any sum.
__device__ inline void load_four(float* to, const ScoredLayer& layer, bool inside, int64_t row_begin, int64_t k) {
  const float* from = static_cast<const float*>(layer.weights);
  if (layer.dtype == DType::float32 && layer.aligned) {
    const bool valid = inside && k < layer.filter_size;
    copy_async_16(to, from + (valid ? row_begin + k : 0), valid);
    return;
  }
#pragma unroll 1
  for (int e = 0; e < 4; ++e) {
    const bool valid = inside && k + e < layer.filter_size;
    if (layer.dtype == DType::float32) {
      copy_async_4(to + e, from + (valid ? row_begin + k + e : 0), valid);
    } else {
      to[e] = valid ? load_as_float(layer.weights, layer.dtype, row_begin + k + e) : 0.0f;
    }
  }
}

// kDepth numbers from each of the tile's rows, then of its columns (on the diagonal these are the same).
__device__ inline void load_stage(float* stage, const ScoredLayer& layer, const Tile& tile, int64_t begin) {
  const int chunk = 4 * (static_cast<int>(threadIdx.x) % 8);
  const int end = tile.diagonal() ? kTile : 2 * kTile;
#pragma unroll 4
  for (int r = static_cast<int>(threadIdx.x) / 8; r < end; r += kThreads / 8) {
    const bool is_row = r < kTile;
    const int local = is_row ? r : r - kTile;
    const int64_t filter = int64_t{is_row ? tile.i : tile.j} * kTile + local;
    load_four(stage + r * kStride + chunk, layer, local < (is_row ? tile.rows : tile.columns),
              filter * layer.filter_size, begin + chunk);
  }
}

// Calls step(rows, columns, number) for each stage, with the stage after it already on its way.
template <class Step>
__device__ inline void for_each_stage(const ScoredLayer& layer, const Tile& tile, BlockMemory& memory, Step step) {
  const int64_t stages = (layer.filter_size + kDepth - 1) / kDepth;
  __syncthreads();
  for (int64_t stage = -1; stage < stages; ++stage) {
    wait_for_copies();
    __syncthreads();  // this stage is there, and nobody reads the other one any more
    if (stage + 1 < stages) load_stage(memory.stages[(stage + 1) % 2], layer, tile, (stage + 1) * kDepth);
    if (stage < 0 || tile.idle()) continue;
    const float* rows = memory.stages[stage % 2];
    step(rows, tile.diagonal() ? rows : rows + kTile * kStride, stage);
  }
}

// Calls add(i, j, a_k, b_k) for the pairs (i, j) of this thread with i < kCount and all k of a stage.
template <int kCount, class Add>
__device__ inline void for_each_pair(const float* rows, const float* columns, Add add) {
#pragma unroll 2
  for (int k = 0; k < kDepth; k += 4) {
    float4 b[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) b[j] = *reinterpret_cast<const float4*>(columns + Tile::column(j) * kStride + k);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float4 a = *reinterpret_cast<const float4*>(rows + Tile::row(i) * kStride + k);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        add(i, j, a.x, b[j].x);
        add(i, j, a.y, b[j].y);
        add(i, j, a.z, b[j].z);
        add(i, j, a.w, b[j].w);
      }
    }
  }
}

template <int kCount>
struct SumsOf {
  float at[kCount][kColumns];
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) at[i][j] = 0.0f;
    }
  }
  __device__ void take(SumsOf& other) {  // add the other and start it afresh
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) at[i][j] += other.at[i][j];
    }
    other.clear();
  }
};
using Sums = SumsOf<kRows>;

template <bool kL1, bool kL2>
__device__ inline void sum_differences(const ScoredLayer& layer, const Tile& tile, BlockMemory& memory, Sums& l1,
                                       Sums& l2) {
  Sums part1, part2;
  l1.clear();
  l2.clear();
  part1.clear();
  part2.clear();
  for_each_stage(layer, tile, memory, [&](const float* rows, const float* columns, int64_t stage) {
    for_each_pair<kRows>(rows, columns, [&](int i, int j, float a, float b) {
      const float difference = a - b;
      if (kL1) part1.at[i][j] += fabsf(difference);
      if (kL2) part2.at[i][j] = fmaf(difference, difference, part2.at[i][j]);
    });
    if (stage % kStagesPerBlock == kStagesPerBlock - 1) {
      if (kL1) l1.take(part1);
      if (kL2) l2.take(part2);
    }
  });
  if (kL1) l1.take(part1);
  if (kL2) l2.take(part2);
}

// Adds what each pair gives to its row and to its column, and stores the sums in the tile's own slots: the sums of row
// block i over column block j in slot j, those of column block j over row block i in slot i. pair(i, j) -> {row,
// column}.
template <class Pair>
__device__ inline void store_sums(const Tile& tile, BlockMemory& memory, float* partial, int32_t tiles, Pair pair) {
  float row_sums[kRows] = {}, column_sums[kColumns] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (tile.counts(Tile::row(i), Tile::column(j))) {
        const float2 given = pair(i, j);
        row_sums[i] += given.x;
        column_sums[j] += given.y;
      }
    }
  }
  float (*rows)[17] = reinterpret_cast<float (*)[17]>(memory.stages[0]);                // 16 threads share a row
  float (*columns)[9] = reinterpret_cast<float (*)[9]>(memory.stages[0] + kTile * 17);  // 8 share a column
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRows; ++i) rows[Tile::row(i)][8 * Tile::warp_column() + Tile::among_columns()] = row_sums[i];
#pragma unroll
  for (int j = 0; j < kColumns; ++j)
    columns[Tile::column(j)][4 * Tile::warp_row() + Tile::among_rows()] = column_sums[j];
  __syncthreads();
  const int t = static_cast<int>(threadIdx.x) % kTile;
  const auto row_sum = [&] {
    float sum = 0;
    for (int e = 0; e < 16; ++e) sum += rows[t][e];
    return sum;
  };
  const auto column_sum = [&] {
    float sum = 0;
    for (int e = 0; e < 8; ++e) sum += columns[t][e];
    return sum;
  };
  const int64_t width = int64_t{tiles} * kTile;
  if (threadIdx.x < kTile) {
    partial[tile.j * width + tile.i * kTile + t] = tile.diagonal() ? row_sum() + column_sum() : row_sum();
  } else if (!tile.diagonal()) {
    partial[tile.i * width + tile.j * kTile + t] = column_sum();
  }
}

}  // namespace mfp::cuda
