// The CUDA side of scoring and masking: tensors to tables, tables to the device, one launch an op. Arguments were
// checked in mfp/ops.py; the schemas are in mfp/schemas.py.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/score.h"
#include "cuda/tensors.h"
#include "cuda/upload.h"

namespace mfp::cuda {
namespace {

MaskedRows masked_rows(const at::Tensor& tensor, int64_t rows, int64_t keep_offset) {
  const int64_t bytes = static_cast<int64_t>(tensor.nbytes());
  return {static_cast<unsigned char*>(tensor.mutable_data_ptr()), rows, rows > 0 ? bytes / rows : 0, keep_offset, 0};
}

void mask_filters_(at::TensorList tensors, const at::Tensor& keep, at::IntArrayRef offsets, at::IntArrayRef rows) {
  const c10::cuda::CUDAGuard guard(keep.device());
  check_device("mask_filters_", "tensors", tensors, keep.device());
  std::vector<MaskedRows> table;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() > 0 && rows[i] > 0) table.push_back(masked_rows(tensors[i], rows[i], offsets[i]));
  }
  const int64_t items = plan_mask(table);
  if (items == 0) return;
  const Uploaded uploaded = upload(table.data(), table.size() * sizeof(MaskedRows), keep.device());
  C10_CUDA_CHECK(launch_mask(static_cast<const MaskedRows*>(uploaded.data), static_cast<int32_t>(table.size()), items,
                             keep.const_data_ptr<bool>(), c10::cuda::getCurrentCUDAStream()));
}

std::vector<ScoredLayer> layers_of(at::TensorList weights, at::TensorList gradients, at::IntArrayRef num_pruned) {
  std::vector<ScoredLayer> layers(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    layers[i].weights = weights[i].const_data_ptr();
    layers[i].filters = weights[i].size(0);
    layers[i].filter_size = layers[i].filters > 0 ? weights[i].numel() / layers[i].filters : 0;
    layers[i].dtype = dtype_of(weights[i]);
    if (!gradients.empty()) {
      layers[i].gradients = gradients[i].const_data_ptr();
      layers[i].gradient_dtype = dtype_of(gradients[i]);
    }
    layers[i].num_pruned = num_pruned.empty() ? 0 : static_cast<int32_t>(num_pruned[i]);
  }
  return layers;
}

std::vector<MaskedRows> followers_of(const std::vector<ScoredLayer>& layers, at::TensorList followers,
                                     at::IntArrayRef follower_layers) {
  std::vector<int64_t> offsets(1, 0);
  for (const ScoredLayer& layer : layers) offsets.push_back(offsets.back() + layer.filters);
  std::vector<MaskedRows> rows;
  for (size_t i = 0; i < followers.size(); ++i) {
    const auto layer = static_cast<size_t>(follower_layers[i]);
    if (layers[layer].num_pruned > 0) rows.push_back(masked_rows(followers[i], layers[layer].filters, offsets[layer]));
  }
  return rows;
}

// Scores; with a mask to fill also selection and zeroing. All of it in one launch, nothing comes back to the host.
at::Tensor run(const std::vector<ScoredLayer>& layers, const std::vector<MaskedRows>& followers, at::IntArrayRef kinds,
               at::ArrayRef<double> exponents, int64_t chosen, c10::Device device, at::Tensor* keep) {
  std::vector<Request> requests;
  for (size_t i = 0; i < kinds.size(); ++i) {
    requests.push_back({static_cast<Kind>(kinds[i]), static_cast<float>(exponents[i]), -1});
  }
  const ScorePlan plan = plan_scores(layers, requests, followers, static_cast<int32_t>(chosen));
  TORCH_CHECK(plan.error.empty(), "mfp: ", plan.error);
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  at::Tensor scores = at::empty({static_cast<int64_t>(kinds.size()), plan.arguments.filters}, options);
  if (keep != nullptr) *keep = at::empty({plan.arguments.filters}, options.dtype(at::kBool));
  if (plan.arguments.items == 0) return scores;
  const at::Tensor partial = at::empty({plan.partial_floats}, options);
  const at::Tensor norms = at::empty({plan.arguments.filters, 2}, options);
  const Uploaded table = upload(plan.bytes.data(), plan.bytes.size(), device);
  C10_CUDA_CHECK(launch_scores(plan, table.data, scores.mutable_data_ptr<float>(),
                               keep != nullptr ? keep->mutable_data_ptr<bool>() : nullptr,
                               partial.mutable_data_ptr<float>(), static_cast<float2*>(norms.mutable_data_ptr()),
                               c10::cuda::getCurrentCUDAStream()));
  return scores;
}

at::Tensor score_filters(at::TensorList weights, at::IntArrayRef kinds, at::ArrayRef<double> exponents,
                         at::TensorList gradients) {
  const c10::Device device = weights[0].device();
  const c10::cuda::CUDAGuard guard(device);
  check_device("score_filters", "weights", weights, device);
  check_device("score_filters", "gradients", gradients, device);
  return run(layers_of(weights, gradients, {}), {}, kinds, exponents, -1, device, nullptr);
}

std::tuple<at::Tensor, at::Tensor> prune_filters_(at::TensorList weights, at::TensorList followers,
                                                  at::IntArrayRef follower_layers, at::IntArrayRef num_pruned,
                                                  at::IntArrayRef kinds, at::ArrayRef<double> exponents, int64_t chosen,
                                                  at::TensorList gradients) {
  const c10::Device device = weights[0].device();
  const c10::cuda::CUDAGuard guard(device);
  check_device("prune_filters_", "weights", weights, device);
  check_device("prune_filters_", "followers", followers, device);
  check_device("prune_filters_", "gradients", gradients, device);
  const std::vector<ScoredLayer> layers = layers_of(weights, gradients, num_pruned);
  at::Tensor keep;
  at::Tensor scores =
      run(layers, followers_of(layers, followers, follower_layers), kinds, exponents, chosen, device, &keep);
  return {scores, keep};
}

TORCH_LIBRARY_IMPL(mfp, CUDA, library) {
  library.impl("score_filters", &score_filters);
  library.impl("mask_filters_", &mask_filters_);
  library.impl("prune_filters_", &prune_filters_);
}

}  // namespace
}  // namespace mfp::cuda
