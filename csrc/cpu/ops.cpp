// The ops of mfp on CPU tensors. Schemas and the checks of arguments are in mfp/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "cpu/score.h"

namespace mfp::cpu {
namespace {

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::float32;
    case at::kBFloat16: return DType::bfloat16;
    case at::kHalf: return DType::float16;
    default: TORCH_CHECK(false, "mfp: expected float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

std::vector<Layer> layers_of(at::TensorList weights) {
  std::vector<Layer> layers;
  for (const at::Tensor& weight : weights) {
    const int64_t filters = weight.size(0);
    layers.push_back({weight.const_data_ptr(), dtype_of(weight), filters, filters ? weight.numel() / filters : 0});
  }
  return layers;
}

at::Tensor score_filters(at::TensorList weights, at::IntArrayRef kinds, at::ArrayRef<double> exponents) {
  std::vector<Criterion> criteria;
  for (size_t i = 0; i < kinds.size(); ++i) criteria.push_back({static_cast<Kind>(kinds[i]), exponents[i]});
  const std::vector<Layer> layers = layers_of(weights);
  int64_t filters = 0;
  for (const Layer& layer : layers) filters += layer.num_filters;
  at::Tensor scores = at::empty({static_cast<int64_t>(kinds.size()), filters}, at::kFloat);
  compute_scores(layers, criteria, scores.mutable_data_ptr<float>(), at::get_num_threads(), current_isa());
  return scores;
}

// Rows of `tensor` that belong to filters not kept become zero; kept rows are not touched.
void zero_rows(const at::Tensor& tensor, const bool* keep, int64_t rows) {
  if (rows == 0) return;
  const int64_t bytes = tensor.numel() / rows * tensor.element_size();
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    if (!keep[row]) std::memset(data + row * bytes, 0, bytes);
  }
}

void mask_filters_(at::TensorList tensors, const at::Tensor& keep, at::IntArrayRef offsets, at::IntArrayRef rows) {
  const bool* mask = keep.const_data_ptr<bool>();
  at::parallel_for(0, tensors.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) zero_rows(tensors[i], mask + offsets[i], rows[i]);
  });
}

std::tuple<at::Tensor, at::Tensor> prune_filters_(at::TensorList weights, at::TensorList followers,
                                                  at::IntArrayRef follower_layers, at::IntArrayRef num_pruned,
                                                  at::IntArrayRef kinds, at::ArrayRef<double> exponents,
                                                  int64_t chosen) {
  at::Tensor scores = score_filters(weights, kinds, exponents);
  at::Tensor keep = at::empty({scores.size(1)}, at::kBool);
  bool* mask = keep.mutable_data_ptr<bool>();
  std::fill_n(mask, keep.numel(), true);
  const float* values = scores.const_data_ptr<float>();
  if (!std::all_of(values, values + scores.numel(), [](float x) { return std::isfinite(x); })) return {scores, keep};

  std::vector<int64_t> offsets(1, 0);
  for (const at::Tensor& weight : weights) offsets.push_back(offsets.back() + weight.size(0));
  const float* selecting = values + chosen * keep.numel();
  at::parallel_for(0, weights.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      const int64_t filters = offsets[l + 1] - offsets[l];
      select_lowest(selecting + offsets[l], filters, num_pruned[l], mask + offsets[l]);
      zero_rows(weights[l], mask + offsets[l], filters);
    }
  });
  for (size_t i = 0; i < followers.size(); ++i) {
    const int64_t l = follower_layers[i];
    zero_rows(followers[i], mask + offsets[l], offsets[l + 1] - offsets[l]);
  }
  return {scores, keep};
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) {
  m.impl("score_filters", &score_filters);
  m.impl("mask_filters_", &mask_filters_);
  m.impl("prune_filters_", &prune_filters_);
}

}  // namespace mfp::cpu
