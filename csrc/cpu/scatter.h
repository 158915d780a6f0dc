// residual[:, index] += branch, then ReLU if asked: one pass over the residual. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mfp::cpu {

// Channels innermost: one row of residual [channels] takes one row of branch [branch_channels].
struct ScatterRows {
  float* residual;
  const float* branch;
  const int32_t* source;    // [channels rounded up to 16]: the branch's channel that lands here, or -1
  const uint16_t* landing;  // [channels / 16, rounded up]: the same as bits
  int64_t channels;
  int64_t branch_channels;
  bool relu;
};

// Rows begin to end.
#define MFP_DECLARE(isa)                                                         \
  namespace isa {                                                                \
  void scatter_rows(const ScatterRows& work, int64_t begin, int64_t end);        \
  void add_plane(float* residual, const float* branch, int64_t size, bool relu); \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
