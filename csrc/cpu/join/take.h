// out = in[:, index] on rows of channels: the gradient of a join. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mfp::cpu {

struct TakeRows {
  const float* in;          // [rows, channels]
  float* out;               // [rows, taken]
  const uint16_t* landing;  // a bit per channel: whether it is taken; and one word more
  const int64_t* index;     // [taken], increasing
  int64_t channels, taken;
};

// take_rows: rows begin to end.
#define MFP_DECLARE(isa)                                            \
  namespace isa {                                                   \
  void take_rows(const TakeRows& work, int64_t begin, int64_t end); \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
