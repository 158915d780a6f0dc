// out = residual, out[:, index] += branch, then ReLU if asked: one pass over memory. The residual may be out itself, or
// null where it is zero. Compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "dtype.h"

namespace mfp::cpu {

// Channels innermost: one row of residual [channels] takes one row of branch [branch_channels].
struct ScatterRows {
  void* out;
  const void* residual;
  const void* branch;
  DType dtype;
  const uint16_t* landing;  // a bit per channel: whether the next of the branch lands here; and one word more
  int64_t channels;
  int64_t branch_channels;
  bool relu;
};

// Other layouts: one channel's plane of the residual takes one of the branch, or none.
struct ScatterPlane {
  void* out;
  const void* residual;
  const void* branch;  // or null
  DType dtype;
  int64_t size;
  bool relu;
};

// scatter_rows: rows begin to end.
#define MFP_DECLARE(isa)                                                  \
  namespace isa {                                                         \
  void scatter_rows(const ScatterRows& work, int64_t begin, int64_t end); \
  void scatter_plane(const ScatterPlane& work);                           \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
