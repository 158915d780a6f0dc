// The vector kernels of the scores, written once and compiled once per instruction set (vector.h).
//
// Filters lie across the vector lanes, so that one subtraction serves the Manhattan and the Euclidean distance of
// MFP_LANES pairs, and nothing is summed across lanes before the end. Distances come from differences, not from
// |a|^2 + |b|^2 - 2ab, which cancels for near-duplicates. Where single precision does not carry a pair (see `odd` in
// finish_row), that pair alone is computed again in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu/score/tiles.h"
#include "cpu/vector.h"

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

// x^p for x >= 0, relative error 1e-6 as long as |p log2 x| < 32; below 2^-126 it is 0.
inline Vec power(Vec x, float p) {
  const BitsVec bits = (BitsVec)x;
  const IntVec exponent = (IntVec)(bits - 0x3f3504f3u) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const Vec t = (Vec)(bits - ((BitsVec)exponent << 23)) - 1.0f;
  Vec log = t * -0.1102016f + 0.18631209f;
  log = log * t - 0.19102497f;
  log = log * t + 0.20457532f;
  log = log * t - 0.23961905f;
  log = log * t + 0.28856888f;
  log = log * t - 0.36069664f;
  log = log * t + 0.48089820f;
  log = log * t - 0.72134733f;
  log = log * t + 1.44269502f;
  const Vec y = p * (__builtin_convertvector(exponent, Vec) + t * log);
  const Vec shifted = y + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Vec f = y - (shifted - 12582912.0f);
  Vec result = f * 1.546973e-4f + 1.3400433e-3f;
  result = result * f + 9.618025e-3f;
  result = result * f + 5.550327e-2f;
  result = result * f + 2.4022651e-1f;
  result = result * f + 6.9314718e-1f;
  result = result * f + 1.0f;
  const Vec scaled = (Vec)((BitsVec)result + (((BitsVec)shifted - 0x4b400000u) << 23));
  return select((x > 0.0f) & (y > -126.0f), scaled);
}

// ---- reading weights ----------------------------------------------------------------------------------------------

// `count` weights of a filter from `begin` on: in place for float32, else converted into `buffer`.
inline const float* read(const Layer& layer, int64_t filter, int64_t begin, int64_t count, float* buffer) {
  const int64_t at = filter * layer.filter_size + begin;
  if (layer.dtype == DType::float32) return static_cast<const float*>(layer.weights) + at;
  const uint16_t* source = static_cast<const uint16_t*>(layer.weights) + at;
  if (layer.dtype == DType::bfloat16) {
    for (int64_t k = 0; k < count; ++k) buffer[k] = from_bits(static_cast<uint32_t>(source[k]) << 16);
  } else {
    for (int64_t k = 0; k < count; ++k) buffer[k] = half_to_float(source[k]);
  }
  return buffer;
}

// ---- norms --------------------------------------------------------------------------------------------------------

// Doubles in a full vector, and as many floats.
constexpr int kWide = kLanes / 2;
typedef double Wide __attribute__((vector_size(8 * kWide)));
typedef int64_t WideBits __attribute__((vector_size(8 * kWide)));

inline Wide widen(const float* p) {
  Wide v;
  for (int i = 0; i < kWide; ++i) v[i] = p[i];
  return v;
}

Norms norms(const Layer& layer, int64_t filter) {
  constexpr int kChains = 4;       // independent sums, so that the memory is waited for and not the additions
  constexpr int64_t kAhead = 512;  // weights; the next filters lie there, and reading past the last is harmless
  alignas(64) float buffer[kBlock];
  Wide magnitudes[kChains] = {}, squares[kChains] = {};
  Norms result = {};
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* w = read(layer, filter, begin, count, buffer);
    int64_t k = 0;
    for (; k + kChains * kWide <= count; k += kChains * kWide) {
      __builtin_prefetch(w + k + kAhead);
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        const Wide v = widen(w + k + i * kWide);
        magnitudes[i] += (Wide)((WideBits)v & INT64_MAX);
        squares[i] += v * v;
      }
    }
    for (; k < count; ++k) {
      const double v = w[k];
      result.l1 += std::fabs(v);
      result.squares += v * v;
    }
  }
  for (int i = 1; i < kChains; ++i) magnitudes[0] += magnitudes[i], squares[0] += squares[i];
  for (int lane = 0; lane < kWide; ++lane) {
    result.l1 += magnitudes[0][lane];
    result.squares += squares[0][lane];
  }
  return result;
}

float largest_weight(const Layer& layer, int64_t filter) {
  alignas(64) float buffer[kBlock];
  Vec most{};
  float rest = 0;
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* w = read(layer, filter, begin, count, buffer);
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) most = maximum(most, absolute(load(w + k)));
    for (; k < count; ++k) rest = std::max(rest, std::fabs(w[k]));
  }
  for (int i = 0; i < kLanes; ++i) rest = std::max(rest, most[i]);
  return rest;
}

double general_norm(const Layer& layer, int64_t filter, double exponent) {
  const float largest = largest_weight(layer, filter);
  if (largest == 0) return 0;
  alignas(64) float buffer[kBlock];
  double sum = 0;
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* w = read(layer, filter, begin, count, buffer);
    Vec part{};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) part += power(absolute(load(w + k)) / largest, exponent);
    for (; k < count; ++k) part[0] += std::pow(std::fabs(w[k]) / largest, static_cast<float>(exponent));
    sum += sum_of_lanes(part);
  }
  return largest * std::pow(sum, 1 / exponent);
}

// ---- weights and gradients ----------------------------------------------------------------------------------------

// The sum of weight times gradient, squared. In double: the terms have both signs and cancel.
double taylor(const Layer& layer, const Layer& gradients, int64_t filter) {
  constexpr int kChains = 4;
  constexpr int64_t kAhead = 512;  // as for norms
  alignas(64) float weight_buffer[kBlock], gradient_buffer[kBlock];
  Wide sums[kChains] = {};
  double sum = 0;
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* w = read(layer, filter, begin, count, weight_buffer);
    const float* g = read(gradients, filter, begin, count, gradient_buffer);
    int64_t k = 0;
    for (; k + kChains * kWide <= count; k += kChains * kWide) {
      __builtin_prefetch(w + k + kAhead);
      __builtin_prefetch(g + k + kAhead);
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) sums[i] += widen(w + k + i * kWide) * widen(g + k + i * kWide);
    }
    for (; k < count; ++k) sum += static_cast<double>(w[k]) * static_cast<double>(g[k]);
  }
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  for (int lane = 0; lane < kWide; ++lane) sum += sums[0][lane];
  return sum * sum;
}

// ---- one tile of pairs --------------------------------------------------------------------------------------------

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

// ---- from pairs to sums -------------------------------------------------------------------------------------------

struct ExactPair {
  double squared_distance, less, more;  // less = 1 - cos, more = 1 + cos
};

ExactPair exact_pair(const Layer& layer, int64_t row, int64_t column, double row_norm, double column_norm) {
  alignas(64) float row_buffer[kBlock], column_buffer[kBlock];
  const double u = row_norm > 0 ? 1 / row_norm : 0, v = column_norm > 0 ? 1 / column_norm : 0;
  double squared = 0, less = 0, more = 0;
  int differ = 0;
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* a = read(layer, row, begin, count, row_buffer);
    const float* b = read(layer, column, begin, count, column_buffer);
    int here = 0;
    for (int64_t k = 0; k < count; ++k) here |= a[k] != b[k];
    differ |= here;
    if (!differ) continue;  // nothing to add yet to the distance, and `more` is not looked at for duplicates
#pragma omp simd reduction(+ : squared, less, more)
    for (int64_t k = 0; k < count; ++k) {
      const double d = static_cast<double>(a[k]) - b[k], x = a[k] * u, y = b[k] * v;
      squared += d * d;
      less += (x - y) * (x - y);
      more += (x + y) * (x + y);
    }
  }
  return {squared, less / 2, more / 2};
}

// Which filters of a tile are all zero, looked up once each. After a soft prune many are, and their pairs with each
// other would all take the long way through exact_pair.
class ZeroFilters {
 public:
  explicit ZeroFilters(const TileWork& work) : work_(work) {
    std::fill_n(rows_, kTileRows, -1);
    std::fill_n(columns_, kTileColumns, -1);
  }
  bool both(int64_t row, int64_t column) {
    return look_up(rows_[row - work_.row_begin], row) && look_up(columns_[column - work_.column_begin], column);
  }

 private:
  bool look_up(int8_t& known, int64_t filter) {
    if (known < 0) known = largest_weight(*work_.layer, filter) == 0;
    return known != 0;
  }
  const TileWork& work_;
  int8_t rows_[kTileRows], columns_[kTileColumns];  // -1: not looked at yet
};

// Norms of the tile's columns in the form finish_row needs them: |a| - |b| must be right to the last bit of the
// difference, hence two floats for each norm.
struct ColumnNorms {
  alignas(64) float high[kTileColumns], low[kTileColumns], inverse[kTileColumns];
};

inline void split(double norm, float* high, float* low, float* inverse) {
  *high = static_cast<float>(norm);
  *low = static_cast<float>(norm - *high);
  *inverse = norm == 0 ? 0.0f : static_cast<float>(1 / norm);
}

constexpr int kMaxRelations = 4;

// Values of one row's pairs for each requested relation, in the order l1, l2, cosine, hybrid; lanes that are no pair
// hold 0. Returns how many relations there are.
inline int finish_row(const TileWork& work, const ColumnNorms& norms, const Scratch& s, int64_t row, int vectors,
                      ZeroFilters& zeros, Vec (&values)[kMaxRelations][kVectors]) {
  const float* first = s.first + (row - work.row_begin) * kTileColumns;
  const float* second = s.second + (row - work.row_begin) * kTileColumns;
  const int32_t limit = static_cast<int32_t>(std::min(work.column_end, row) - work.column_begin);
  const bool angles = work.cosine || work.hybrid, squares = work.l2 || angles;
  float row_high = 0, row_low = 0, row_inverse = 0;
  if (angles) split(work.norms[row], &row_high, &row_low, &row_inverse);
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;

  IntVec odd[kVectors], any_odd{};
  int relation = 0;
  for (int v = 0; v < vectors; ++v) {
    const IntVec pair = lane + v * kLanes < limit;
    relation = 0;
    odd[v] = IntVec{};
    if (work.exponent > 0) {
      const Vec largest = load(second + v * kLanes);
      const Vec sum = load(first + v * kLanes);
      values[relation++][v] = select(pair, largest * power(sum, static_cast<float>(1 / work.exponent)));
      continue;
    }
    if (work.l1) values[relation++][v] = select(pair, load(first + v * kLanes));
    if (!squares) continue;
    const Vec squared = load(second + v * kLanes);
    odd[v] = pair & ((squared < 1e-30f) | ~(squared < 1e30f));  // out of range, or not a number
    if (work.l2) values[relation++][v] = select(pair, root(squared));
    if (angles) {
      const Vec high = load(norms.high + v * kLanes), low = load(norms.low + v * kLanes);
      const Vec inverse = load(norms.inverse + v * kLanes);
      const Vec difference = (row_high - high) + (row_low - low), sum = row_high + high;
      const Vec less = squared - difference * difference, more = sum * sum - squared;
      const Vec half = 0.5f * row_inverse * inverse;
      const IntVec directed = pair & (inverse > 0.0f) & (row_inverse > 0.0f ? -1 : 0);
      // Cancelled to less than 5 bits of what was subtracted: the rounding of `squared` would show.
      odd[v] |= directed & (less < squared * 0.03125f);
      if (work.hybrid) odd[v] |= directed & (more < squared * 0.03125f);
      if (work.cosine) values[relation++][v] = select(directed, less * half);
      if (work.hybrid) values[relation++][v] = select(directed, minimum(less, more) * half);
    }
    any_odd |= odd[v];
  }
  if (!any(any_odd)) return relation;

  for (int64_t column = 0; column < limit; ++column) {
    const int64_t v = column / kLanes, i = column % kLanes;
    if (!odd[v][i] || (second[column] == 0 && zeros.both(row, work.column_begin + column))) continue;
    const double column_norm = angles ? work.norms[work.column_begin + column] : 0;
    const double row_norm = angles ? work.norms[row] : 0;
    const ExactPair exact = exact_pair(*work.layer, row, work.column_begin + column, row_norm, column_norm);
    const bool directed = row_norm != 0 && column_norm != 0;
    int at = work.l1;
    if (work.l2) values[at++][v][i] = static_cast<float>(std::sqrt(exact.squared_distance));
    if (work.cosine) values[at++][v][i] = directed ? static_cast<float>(exact.less) : 0.0f;
    if (work.hybrid) values[at++][v][i] = directed ? static_cast<float>(std::min(exact.less, exact.more)) : 0.0f;
  }
  return relation;
}

// Row and column sums of every relation. The hybrid criterion weighs each pair by the other filter's norm.
void finish(const TileWork& work, const Scratch& s) {
  ColumnNorms norms = {};
  ZeroFilters zeros(work);
  if (work.cosine || work.hybrid) {
    for (int64_t c = 0; c < work.column_end - work.column_begin; ++c) {
      split(work.norms[work.column_begin + c], norms.high + c, norms.low + c, norms.inverse + c);
    }
  }
  Vec columns[kMaxRelations][kVectors] = {};
  Vec values[kMaxRelations][kVectors];
  const int hybrid = work.hybrid ? work.l1 + work.l2 + work.cosine : -1;
  int relations = 0;
  const int vectors = static_cast<int>(columns_in_use(work) / kLanes);
  for (int64_t row = std::max(work.row_begin, work.column_begin + 1); row < work.row_end; ++row) {
    relations = finish_row(work, norms, s, row, vectors, zeros, values);
    for (int relation = 0; relation < relations; ++relation) {
      const bool weighted = relation == hybrid;
      const float row_weight = weighted ? static_cast<float>(work.norms[row]) : 1.0f;
      Vec sum{};
      for (int v = 0; v < vectors; ++v) {
        const Vec value = values[relation][v];
        sum += weighted ? value * load(norms.high + v * kLanes) : value;
        columns[relation][v] += row_weight * value;
      }
      work.sums[relation * kSumsPerRelation + row - work.row_begin] = sum_of_lanes(sum);
    }
  }
  for (int relation = 0; relation < relations; ++relation) {
    double* sums = work.sums + relation * kSumsPerRelation + kTileRows;
    for (int64_t c = 0; c < kTileColumns; ++c) sums[c] = columns[relation][c / kLanes][c % kLanes];
  }
}

void tile(const TileWork& work) {
  Scratch& s = scratch();
  const bool squares = work.l2 || work.cosine || work.hybrid;
  if (work.exponent > 0) {
    sum_powers(work, s);
  } else if (work.l1 && squares) {
    sum_differences<true, true>(work, s);
  } else if (work.l1) {
    sum_differences<true, false>(work, s);
  } else {
    sum_differences<false, true>(work, s);
  }
  finish(work, s);
}

}  // namespace MFP_ISA

Kernels MFP_JOIN(MFP_ISA, _kernels)() {
  return {MFP_ISA::norms, MFP_ISA::general_norm, MFP_ISA::taylor, MFP_ISA::tile};
}

}  // namespace mfp::cpu

MFP_END_ISA

#else  // this compiler or processor has no such instruction set; isa.cpp never chooses it
namespace mfp::cpu {
Kernels MFP_JOIN(MFP_ISA, _kernels)() { return portable_kernels(); }
}  // namespace mfp::cpu
#endif
