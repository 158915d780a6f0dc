// The CUDA side of the ops: tensors to tables, tables to the device, one launch an op. Arguments were checked in
// mfp/ops.py; the schemas are declared there.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "cuda/upload.h"

namespace mfp::cuda {
namespace {

void check_device(const char* op, const char* argument, at::TensorList tensors, c10::Device device) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors[i].device() == device, op, ": ", argument, "[", i, "] is on ", tensors[i].device(),
                ", expected ", device, " like the others");
  }
}

MaskedRows masked_rows(const at::Tensor& tensor, int64_t rows, int64_t keep_offset) {
  const int64_t bytes = static_cast<int64_t>(tensor.nbytes());
  return {static_cast<unsigned char*>(tensor.mutable_data_ptr()), rows, rows > 0 ? bytes / rows : 0, keep_offset, 0};
}

void mask_filters_(at::TensorList tensors, const at::Tensor& keep, at::IntArrayRef offsets, at::IntArrayRef rows) {
  const c10::cuda::CUDAGuard guard(keep.device());
  check_device("mask_filters_", "tensors", tensors, keep.device());
  std::vector<MaskedRows> table;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() > 0) table.push_back(masked_rows(tensors[i], rows[i], offsets[i]));
  }
  const int64_t items = plan_mask(table);
  if (items == 0) return;
  const Uploaded uploaded = upload(table.data(), table.size() * sizeof(MaskedRows), keep.device());
  C10_CUDA_CHECK(launch_mask(static_cast<const MaskedRows*>(uploaded.data), static_cast<int32_t>(table.size()), items,
                             keep.const_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(mfp, CUDA, library) { library.impl("mask_filters_", &mask_filters_); }

}  // namespace
}  // namespace mfp::cuda
