// mask_filters_: one launch zeroes the rows of pruned filters in any number of tensors (weights, BatchNorm, gradients).
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/rows.h"

namespace mfp::cuda {
namespace {

constexpr int kMaskThreads = 256;

__global__ void __launch_bounds__(kMaskThreads)
    mask_kernel(const MaskedRows* tensors, int32_t count, const bool* keep) {
  const int64_t item = blockIdx.x;
  const MaskedRows tensor = tensors[find_entry(tensors, count, item)];
  const int64_t step = rows_per_item(tensor.row_bytes);
  const int64_t begin = (item - tensor.first_item) * step;
  const int64_t end = begin + step < tensor.rows ? begin + step : tensor.rows;
  zero_pruned_rows(tensor.data, tensor.row_bytes, keep + tensor.keep_offset, begin, end);
}

}  // namespace

int64_t plan_mask(std::vector<MaskedRows>& tensors) {
  int64_t items = 0;
  for (MaskedRows& tensor : tensors) {
    const int64_t step = rows_per_item(tensor.row_bytes);
    tensor.first_item = items;
    items += (tensor.rows + step - 1) / step;
  }
  return items;
}

cudaError_t launch_mask(const MaskedRows* tensors, int32_t count, int64_t items, const bool* keep,
                        cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  if (!fits_grid(items)) return cudaErrorInvalidConfiguration;
  MFP_LAUNCH(mask_kernel, static_cast<unsigned>(items), kMaskThreads, 0, stream, tensors, count, keep);
  return cudaGetLastError();
}

}  // namespace mfp::cuda
