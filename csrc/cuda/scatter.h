// residual += branch at some channels, then ReLU if asked: one pass over memory.
#pragma once

#include "cuda/runtime.h"

namespace mfp::cuda {

struct ScatterAdd {
  void* residual;        // [outer, channels, inner], dense
  const void* branch;    // [outer, branch_channels, inner], dense
  const int64_t* index;  // [branch_channels], strictly increasing: channel of the residual
  int64_t outer, channels, branch_channels,
      inner;  // contiguous: inner = H * W; channels_last: outer = B * H * W, inner = 1
  DType dtype;
  bool relu;
};

cudaError_t launch_scatter_add(const ScatterAdd& arguments, cudaStream_t stream);

}  // namespace mfp::cuda
