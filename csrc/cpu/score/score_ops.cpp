// The ops of mfp on CPU tensors. Schemas are in mfp/schemas.py, the checks of arguments in mfp/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/score/score.h"
#include "cpu/score/zero_rows.h"
#include "cpu/spread.h"
#include "dtype_of.h"

namespace mfp::cpu {
namespace {

std::vector<Layer> layers_of(at::TensorList weights) {
  std::vector<Layer> layers;
  for (const at::Tensor& weight : weights) {
    const int64_t filters = weight.size(0);
    layers.push_back({weight.const_data_ptr(), dtype_of(weight), filters, filters ? weight.numel() / filters : 0});
  }
  return layers;
}

at::Tensor score_filters(at::TensorList weights, at::IntArrayRef kinds, at::ArrayRef<double> exponents,
                         at::TensorList gradients) {
  std::vector<Criterion> criteria;
  for (size_t i = 0; i < kinds.size(); ++i) criteria.push_back({static_cast<Kind>(kinds[i]), exponents[i]});
  const std::vector<Layer> layers = layers_of(weights);
  int64_t filters = 0;
  for (const Layer& layer : layers) filters += layer.num_filters;
  at::Tensor scores = at::empty({static_cast<int64_t>(kinds.size()), filters}, at::kFloat);
  compute_scores(layers, layers_of(gradients), criteria, scores.mutable_data_ptr<float>(), at::get_num_threads(),
                 current_isa());
  return scores;
}

// Autograd notices by the version that the tensor was changed in place.
MaskedRows masked_rows(const at::Tensor& tensor, const bool* keep, int64_t rows) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  const int64_t bytes = rows ? tensor.numel() / rows * tensor.element_size() : 0;
  return {static_cast<char*>(tensor.mutable_data_ptr()), keep, rows, bytes};
}

void mask_filters_(at::TensorList tensors, const at::Tensor& keep, at::IntArrayRef offsets, at::IntArrayRef rows) {
  const bool* mask = keep.const_data_ptr<bool>();
  std::vector<MaskedRows> masked;
  for (size_t i = 0; i < tensors.size(); ++i) masked.push_back(masked_rows(tensors[i], mask + offsets[i], rows[i]));
  zero_rows(masked, at::get_num_threads());
}

std::tuple<at::Tensor, at::Tensor> prune_filters_(at::TensorList weights, at::TensorList followers,
                                                  at::IntArrayRef follower_layers, at::IntArrayRef num_pruned,
                                                  at::IntArrayRef kinds, at::ArrayRef<double> exponents, int64_t chosen,
                                                  at::TensorList gradients) {
  at::Tensor scores = score_filters(weights, kinds, exponents, gradients);
  at::Tensor keep = at::empty({scores.size(1)}, at::kBool);
  bool* mask = keep.mutable_data_ptr<bool>();
  std::fill_n(mask, keep.numel(), true);
  const float* values = scores.const_data_ptr<float>();
  if (!std::all_of(values, values + scores.numel(), [](float x) { return std::isfinite(x); })) return {scores, keep};

  std::vector<int64_t> offsets(1, 0);
  for (const at::Tensor& weight : weights) offsets.push_back(offsets.back() + weight.size(0));
  const float* selecting = values + chosen * keep.numel();
  spread(weights.size(), at::get_num_threads(), [&](int64_t l) {
    select_lowest(selecting + offsets[l], offsets[l + 1] - offsets[l], num_pruned[l], mask + offsets[l]);
  });
  std::vector<MaskedRows> masked;
  for (size_t l = 0; l < weights.size(); ++l) {
    masked.push_back(masked_rows(weights[l], mask + offsets[l], weights[l].size(0)));
  }
  for (size_t i = 0; i < followers.size(); ++i) {
    const int64_t l = follower_layers[i];
    masked.push_back(masked_rows(followers[i], mask + offsets[l], offsets[l + 1] - offsets[l]));
  }
  zero_rows(masked, at::get_num_threads());
  return {scores, keep};
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) {
  m.impl("score_filters", &score_filters);
  m.impl("mask_filters_", &mask_filters_);
  m.impl("prune_filters_", &prune_filters_);
}

}  // namespace mfp::cpu
