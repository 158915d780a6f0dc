// What the vector kernels of one instruction set offer to score.cpp; score_kernels.h implements it three times.
#pragma once

#include <cstdint>

#include "cpu/score/score.h"

namespace mfp::cpu {

// A tile is a block of filter pairs (row, column) with row > column: `kTileColumns` filters packed into vector lanes
// against up to `kTileRows` filters streamed past them, `kBlock` weights at a time.
constexpr int64_t kTileColumns = 128;
constexpr int64_t kTileRows = 192;
constexpr int64_t kBlock = 256;

// Norms of one filter, in double: distances between near-duplicates need them to the last bit of a float's difference.
struct Norms {
  double l1;
  double squares;
};

// What is asked of a tile. Sums over pairs go to `sums`: for each requested relation one block of
// [kTileRows row sums | kTileColumns column sums].
struct TileWork {
  const Layer* layer;
  int64_t row_begin, row_end, column_begin, column_end;
  const double* norms;  // of the layer's filters, [N]; only for cosine and hybrid
  bool l1, l2, cosine, hybrid;
  double exponent;  // when > 0: the general Minkowski distance, alone
  double* sums;
};
constexpr int64_t kSumsPerRelation = kTileRows + kTileColumns;

struct Kernels {
  Norms (*norms)(const Layer& layer, int64_t filter);
  double (*general_norm)(const Layer& layer, int64_t filter, double exponent);
  double (*taylor)(const Layer& layer, const Layer& gradients, int64_t filter);
  void (*tile)(const TileWork& work);
};

Kernels portable_kernels();
Kernels avx2_kernels();
Kernels avx512_kernels();

}  // namespace mfp::cpu
