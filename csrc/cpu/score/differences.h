// One tile of pairs: sums over the differences of two filters' weights. Compiled once per instruction set (vector.h).
//
// Filters lie across the vector lanes, so that one subtraction serves the Manhattan and the Euclidean distance of
// MFP_LANES pairs, and nothing is summed across lanes before the end. Distances come from differences, not from
// |a|^2 + |b|^2 - 2ab, which cancels for near-duplicates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/score/filter_sums.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

constexpr int kPanel = 2 * kLanes;  // columns that the register tile covers
constexpr int kVectors = kTileColumns / kLanes;
// Rows of the register tile, with two sums per pair and with one: as many as the registers hold, so that an addition's
// latency is hidden. AVX-512 has 32 registers. The others have 16; SSE2 needs some of them to spread a weight.
constexpr int kRowsBoth = kLanes == 16 ? 6 : 2;
constexpr int kRowsOne = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 4;

struct alignas(64) Scratch {
  float columns[kTileColumns * kBlock];                  // packed: [panel][k][kPanel]
  float first[(kTileRows + kRowsOne) * kTileColumns];    // sums of |d|; of |d|^p for general p
  float second[(kTileRows + kRowsOne) * kTileColumns];   // sums of d^2; largest |d| for general p
  float converted[(kTileRows + kTileColumns) * kBlock];  // rows and columns of 16-bit weights
  const float* rows[kTileRows + kRowsOne];
};

Scratch& scratch() {
  static thread_local std::unique_ptr<Scratch> memory(new Scratch);
  return *memory;
}

// Rows of kLanes x kLanes become columns: blocks of kStep trade places across the diagonal, kStep = 1, 2, 4, ... The
// step is a template argument so that the compiler sees constant shuffles and takes its best instructions for them.
template <int kStep = 1>
inline void transpose(Vec (&v)[kLanes]) {
  if constexpr (kStep < kLanes) {
    IntVec low, high;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      low[i] = (i & kStep) ? (i - kStep) + kLanes : i;
      high[i] = (i & kStep) ? i + kLanes : i + kStep;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const Vec a = v[i], b = v[i + kStep];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + kStep] = __builtin_shuffle(a, b, high);
    }
    transpose<2 * kStep>(v);
  }
}

// Columns of the tile in whole panels; nothing looks at those beyond.
inline int64_t columns_in_use(const TileWork& work) {
  return (work.column_end - work.column_begin + kPanel - 1) / kPanel * kPanel;
}

// The tile's columns, `count` weights of each, transposed so that lanes are filters; missing columns are zero.
void pack_columns(const TileWork& work, int64_t begin, int64_t count, Scratch& s) {
  alignas(64) static const float zeros[kBlock] = {};
  for (int64_t group = 0; group < columns_in_use(work); group += kLanes) {
    const float* sources[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t filter = work.column_begin + group + i;
      float* buffer = s.converted + (kTileRows + group + i) * kBlock;
      sources[i] = filter < work.column_end ? read(*work.layer, filter, begin, count, buffer) : zeros;
    }
    float* target = s.columns + group / kPanel * kPanel * kBlock + group % kPanel;
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = load(sources[i] + k);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(target + (k + i) * kPanel, v[i]);
    }
    for (; k < count; ++k)
      for (int i = 0; i < kLanes; ++i) target[k * kPanel + i] = sources[i][k];
  }
}

void find_rows(const TileWork& work, int64_t begin, int64_t count, Scratch& s) {
  const int64_t rows = work.row_end - work.row_begin;
  for (int64_t i = 0; i < rows; ++i) {
    s.rows[i] = read(*work.layer, work.row_begin + i, begin, count, s.converted + i * kBlock);
  }
  for (int64_t i = rows; i < rows + kRowsOne; ++i) s.rows[i] = s.rows[rows - 1];  // fills the last register tile
}

// The register tile: kRows rows against one panel, `count` weights. Sums start anew with each block of weights, which
// keeps the rounding error of a sum of K terms at that of kBlock terms.
template <bool kFirst, bool kSecond, int kRows>
inline void distances(const float* const* rows, const float* columns, int64_t count, bool start, float* first,
                      float* second) {
  Vec one[kRows][2] = {}, two[kRows][2] = {};
  for (int64_t k = 0; k < count; ++k) {
    const Vec b0 = load(columns + k * kPanel), b1 = load(columns + k * kPanel + kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float a = rows[i][k];
      const Vec d0 = a - b0, d1 = a - b1;
      if (kFirst) one[i][0] += absolute(d0), one[i][1] += absolute(d1);
      if (kSecond) two[i][0] += d0 * d0, two[i][1] += d1 * d1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i * kTileColumns + half * kLanes;
      if (kFirst) store(first + at, start ? one[i][half] : load(first + at) + one[i][half]);
      if (kSecond) store(second + at, start ? two[i][half] : load(second + at) + two[i][half]);
    }
  }
}

// Calls `visit(row, panel)` for each register tile with a pair below the diagonal; `row` counts from row_begin.
template <int kRows, class Visit>
inline void each_register_tile(const TileWork& work, Visit visit) {
  const int64_t rows = work.row_end - work.row_begin;
  for (int64_t panel = 0; panel < kTileColumns && work.column_begin + panel < work.column_end; panel += kPanel) {
    const int64_t below = std::max<int64_t>(work.column_begin + panel + 1 - work.row_begin, 0);
    for (int64_t row = below / kRows * kRows; row < rows; row += kRows) visit(row, panel);
  }
}

template <bool kFirst, bool kSecond>
void sum_differences(const TileWork& work, Scratch& s) {
  constexpr int kRows = kFirst && kSecond ? kRowsBoth : kRowsOne;
  for (int64_t begin = 0; begin < work.layer->filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, work.layer->filter_size - begin);
    pack_columns(work, begin, count, s);
    find_rows(work, begin, count, s);
    each_register_tile<kRows>(work, [&](int64_t row, int64_t panel) {
      const int64_t at = row * kTileColumns + panel;
      distances<kFirst, kSecond, kRows>(s.rows + row, s.columns + panel * kBlock, count, begin == 0, s.first + at,
                                        s.second + at);
    });
  }
}

// General p: every pair is scaled by its own largest difference, so that no power underflows that matters.
void sum_powers(const TileWork& work, Scratch& s) {
  std::fill_n(s.first, sizeof s.first / sizeof *s.first, 0.0f);
  std::fill_n(s.second, sizeof s.second / sizeof *s.second, 0.0f);
  for (bool find_largest : {true, false}) {
    for (int64_t begin = 0; begin < work.layer->filter_size; begin += kBlock) {
      const int64_t count = std::min(kBlock, work.layer->filter_size - begin);
      pack_columns(work, begin, count, s);
      find_rows(work, begin, count, s);
      each_register_tile<1>(work, [&](int64_t row, int64_t panel) {
        for (int64_t half = 0; half < kPanel; half += kLanes) {
          float* at = s.second + row * kTileColumns + panel + half;
          const float* column = s.columns + panel * kBlock + half;
          Vec largest = load(at), sum{};
          const Vec scale = 1.0f / (largest > 0.0f ? largest : broadcast(1.0f));
          for (int64_t k = 0; k < count; ++k) {
            const Vec d = absolute(s.rows[row][k] - load(column + k * kPanel));
            if (find_largest) {
              largest = d > largest || d != d ? d : largest;  // NaN is the largest
            } else {
              sum += power(d * scale, work.exponent);
            }
          }
          if (find_largest) {
            store(at, largest);
          } else {
            float* total = s.first + row * kTileColumns + panel + half;
            store(total, load(total) + sum);
          }
        }
      });
    }
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA
#endif
