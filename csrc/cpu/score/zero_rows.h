// Rows of pruned filters become zero; kept rows are not touched.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/spread.h"

namespace mfp::cpu {

// A tensor seen as [rows, bytes]; row r stays when keep[r].
struct MaskedRows {
  char* data;
  const bool* keep;
  int64_t rows, bytes;
};

inline void zero_rows(const std::vector<MaskedRows>& tensors, int num_threads) {
  constexpr int64_t kBytesPerPiece = 1 << 18;
  struct Piece {
    const MaskedRows* tensor;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  int64_t bytes = 0;
  for (const MaskedRows& tensor : tensors) {
    bytes += tensor.rows * tensor.bytes;
    const int64_t step = std::max<int64_t>(1, kBytesPerPiece / std::max<int64_t>(1, tensor.bytes));
    for (int64_t begin = 0; begin < tensor.rows; begin += step) {
      pieces.push_back({&tensor, begin, std::min(begin + step, tensor.rows)});
    }
  }
  spread(pieces.size(), worth(num_threads, bytes, 8 * kBytesPerPiece), [&](int64_t i) {
    const MaskedRows& tensor = *pieces[i].tensor;
    for (int64_t row = pieces[i].begin; row < pieces[i].end; ++row) {
      if (!tensor.keep[row]) std::memset(tensor.data + row * tensor.bytes, 0, tensor.bytes);
    }
  });
}

}  // namespace mfp::cpu
