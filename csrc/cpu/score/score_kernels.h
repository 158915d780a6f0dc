// The vector kernels of the scores, written once and compiled once per instruction set (vector.h): what is computed
// from one filter (filter_sums.h), the differences of pairs (differences.h), and here the scores' sums over these
// pairs.
//
// Where single precision does not carry a pair (see `odd` in finish_row), that pair alone is computed again in double.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/score/differences.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

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
