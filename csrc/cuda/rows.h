// Zeroing rows of bytes: shared by the mask kernel and by the pruning launch.
#pragma once

#include "cuda/launch.h"

namespace mfp::cuda {

// Lanes `lane`, `lane + lanes`, … of a group zero one row: 16 bytes a store, single bytes before and after them.
__device__ inline void zero_row(unsigned char* row, int64_t bytes, int lane, int lanes) {
  int64_t head = (16 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16)) % 16;
  head = head < bytes ? head : bytes;
  const int64_t vectors = (bytes - head) / 16;
  const int64_t tail = head + 16 * vectors;
  for (int64_t i = lane; i < head; i += lanes) row[i] = 0;
  uint4* const middle = reinterpret_cast<uint4*>(row + head);
  for (int64_t i = lane; i < vectors; i += lanes) middle[i] = make_uint4(0, 0, 0, 0);
  for (int64_t i = tail + lane; i < bytes; i += lanes) row[i] = 0;
}

// One block zeroes the rows [begin, end) of which keep[row] is false: a thread a row if rows are short, else a warp.
__device__ inline void zero_pruned_rows(unsigned char* data, int64_t row_bytes, const bool* keep, int64_t begin,
                                        int64_t end) {
  const int lanes = row_bytes <= 64 ? 1 : 32;
  const int group = static_cast<int>(threadIdx.x) / lanes, groups = static_cast<int>(blockDim.x) / lanes;
  for (int64_t row = begin + group; row < end; row += groups) {
    if (!keep[row]) zero_row(data + row * row_bytes, row_bytes, static_cast<int>(threadIdx.x) % lanes, lanes);
  }
}

}  // namespace mfp::cuda
