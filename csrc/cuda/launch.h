// The kernels as plain functions: tables of pointers in device memory, a stream, no torch.
//
// A table has one entry a tensor, of any number of tensors. The host fills it, `plan_…` numbers its work items (an item
// is what one block does), the caller copies it to the device and `launch_…` launches one kernel over all items.
#pragma once

#include <vector>

#include "cuda/runtime.h"

namespace mfp::cuda {

// A tensor seen as rows of one dense block of bytes each; row r belongs to filter keep_offset + r.
struct MaskedRows {
  unsigned char* data;
  int64_t rows;
  int64_t row_bytes;
  int64_t keep_offset;
  int64_t first_item;
};

// About 32 KB an item, and enough rows that each warp has one.
__host__ __device__ inline int64_t rows_per_item(int64_t row_bytes) {
  const int64_t rows = 32768 / (row_bytes > 0 ? row_bytes : 1);
  return rows < 8 ? 8 : rows;
}

int64_t plan_mask(std::vector<MaskedRows>& tensors);  // fills first_item; returns the number of items
cudaError_t launch_mask(const MaskedRows* tensors, int32_t count, int64_t items, const bool* keep, cudaStream_t stream);

}  // namespace mfp::cuda
