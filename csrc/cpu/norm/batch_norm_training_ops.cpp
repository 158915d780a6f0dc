// batch_norm_training_ and batch_norm_gradients on CPU tensors. The schemas are in mfp/schemas.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/norm/batch_norm_training.h"
#include "cpu/tasks.h"

namespace mfp::cpu {
namespace {

constexpr int64_t kBlock = 1 << 13;  // numbers of a block, which stays in the first-level cache

struct Blocks {
  explicit Blocks(const NormRows& x)
      : rows(x.rows), count(std::clamp<int64_t>(x.rows * x.channels / kBlock, 1, std::max<int64_t>(x.rows, 1))) {}

  template <class Work>
  void run(Work work) const {
    const int threads = static_cast<int>(std::min<int64_t>(at::get_num_threads(), count));
    run_tasks(count, threads, [&](int64_t block) { work(block, begin(block), begin(block + 1)); });
  }
  int64_t begin(int64_t block) const { return rows * block / count; }

  int64_t rows, count;
};

at::Tensor checked(const at::Tensor& input, const char* name) {
  TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat && input.is_cpu(), name, " is ", input.sizes(), " ",
              input.scalar_type(), " on ", input.device(), "; expected float32 [B, C, H, W] on the CPU");
  return input.contiguous(at::MemoryFormat::ChannelsLast);
}

NormRows rows_of(const at::Tensor& input) {
  return {input.const_data_ptr<float>(), input.size(0) * input.size(2) * input.size(3), input.size(1)};
}

void check_vector(const at::Tensor& vector, int64_t channels, const char* name) {
  TORCH_CHECK(vector.dim() == 1 && vector.size(0) == channels && vector.scalar_type() == at::kFloat &&
                  vector.is_cpu() && vector.is_contiguous(),
              name, " is ", vector.sizes(), " ", vector.scalar_type(), " on ", vector.device(),
              "; expected contiguous float32 [", channels, "] on the CPU");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_training_(const at::Tensor& given, const at::Tensor& weight,
                                                                    const at::Tensor& bias, at::Tensor& running_mean,
                                                                    at::Tensor& running_var, double momentum,
                                                                    double eps) {
  const at::Tensor input = checked(given, "batch_norm_training_: input");
  const NormRows x = rows_of(input);
  check_vector(weight, x.channels, "batch_norm_training_: weight");
  check_vector(bias, x.channels, "batch_norm_training_: bias");
  check_vector(running_mean, x.channels, "batch_norm_training_: running_mean");
  check_vector(running_var, x.channels, "batch_norm_training_: running_var");
  TORCH_CHECK(x.rows > 1, "batch_norm_training_: expected more than one value a channel, got input ", given.sizes());
  const auto options = input.options().memory_format(at::MemoryFormat::Contiguous);
  const at::Tensor output = at::empty_like(input), mean = at::empty({x.channels}, options),
                   inverse_std = at::empty({x.channels}, options);
  const Isa isa = current_isa();

  const Blocks blocks(x);
  std::vector<float> found(blocks.count * 2 * x.channels), scale(x.channels);
  const auto moments = MFP_OF_ISA(isa, row_moments);
  blocks.run([&](int64_t block, int64_t begin, int64_t end) {
    moments(x, begin, end, found.data() + block * 2 * x.channels);
  });
  float *means = mean.mutable_data_ptr<float>(), *inverses = inverse_std.mutable_data_ptr<float>();
  float *kept_mean = running_mean.mutable_data_ptr<float>(), *kept_var = running_var.mutable_data_ptr<float>();
  std::vector<double> sums(x.channels), squares(x.channels);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const float* mine = found.data() + block * 2 * x.channels;
    const double rows = blocks.begin(block + 1) - blocks.begin(block);
    for (int64_t c = 0; c < x.channels; ++c) sums[c] += rows * mine[c];
  }
  for (int64_t block = 0; block < blocks.count; ++block) {
    const float* mine = found.data() + block * 2 * x.channels;
    const double rows = blocks.begin(block + 1) - blocks.begin(block);
    for (int64_t c = 0; c < x.channels; ++c) {
      const double away = mine[c] - sums[c] / x.rows;
      squares[c] += mine[x.channels + c] + rows * away * away;
    }
  }
  const float* weights = weight.const_data_ptr<float>();
  for (int64_t c = 0; c < x.channels; ++c) {
    const double center = sums[c] / x.rows, inverse = 1 / std::sqrt(squares[c] / x.rows + eps);
    means[c] = center, inverses[c] = inverse, scale[c] = weights[c] * inverse;
    kept_mean[c] = (1 - momentum) * kept_mean[c] + momentum * center;
    kept_var[c] = (1 - momentum) * kept_var[c] + momentum * squares[c] / (x.rows - 1);
  }

  const auto normalize = MFP_OF_ISA(isa, normalize_rows);
  float* const out = output.mutable_data_ptr<float>();
  const float* const shift = bias.const_data_ptr<float>();
  blocks.run([&](int64_t, int64_t begin, int64_t end) { normalize(x, means, scale.data(), shift, begin, end, out); });
  return {output, mean, inverse_std};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_gradients(const at::Tensor& given_gradient,
                                                                    const at::Tensor& given, const at::Tensor& weight,
                                                                    const at::Tensor& mean,
                                                                    const at::Tensor& inverse_std) {
  const at::Tensor input = checked(given, "batch_norm_gradients: input");
  const at::Tensor gradient = checked(given_gradient, "batch_norm_gradients: gradient");
  TORCH_CHECK(input.sizes() == gradient.sizes(), "batch_norm_gradients: gradient is ", gradient.sizes(), ", the input ",
              input.sizes());
  const NormRows x = rows_of(input);
  check_vector(weight, x.channels, "batch_norm_gradients: weight");
  check_vector(mean, x.channels, "batch_norm_gradients: mean");
  check_vector(inverse_std, x.channels, "batch_norm_gradients: inverse_std");
  const at::Tensor input_gradient = at::empty_like(input), weight_gradient = at::empty_like(weight),
                   bias_gradient = at::empty_like(weight);
  const float *gradients = gradient.const_data_ptr<float>(), *means = mean.const_data_ptr<float>();
  const Isa isa = current_isa();

  const Blocks blocks(x);
  std::vector<float> found(blocks.count * 2 * x.channels);
  const auto sum = MFP_OF_ISA(isa, gradient_sums);
  blocks.run([&](int64_t block, int64_t begin, int64_t end) {
    sum(x, gradients, means, begin, end, found.data() + block * 2 * x.channels);
  });
  std::vector<double> sums(2 * x.channels);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const float* mine = found.data() + block * 2 * x.channels;
    for (int64_t c = 0; c < 2 * x.channels; ++c) sums[c] += mine[c];
  }
  std::vector<float> scale(x.channels), slope(x.channels), shift(x.channels);
  const float *weights = weight.const_data_ptr<float>(), *inverses = inverse_std.const_data_ptr<float>();
  for (int64_t c = 0; c < x.channels; ++c) {
    const double inverse = inverses[c], factor = weights[c] * inverse, products = sums[x.channels + c];
    weight_gradient.mutable_data_ptr<float>()[c] = products * inverse;
    bias_gradient.mutable_data_ptr<float>()[c] = sums[c];
    scale[c] = factor;
    slope[c] = -factor * inverse * inverse * products / x.rows;
    shift[c] = -factor * sums[c] / x.rows;
  }

  const auto spread = MFP_OF_ISA(isa, input_gradients);
  float* const out = input_gradient.mutable_data_ptr<float>();
  blocks.run([&](int64_t, int64_t begin, int64_t end) {
    spread(x, gradients, means, scale.data(), slope.data(), shift.data(), begin, end, out);
  });
  return {input_gradient, weight_gradient, bias_gradient};
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) {
  m.impl("batch_norm_training_", &batch_norm_training_);
  m.impl("batch_norm_gradients", &batch_norm_gradients);
}

}  // namespace mfp::cpu
