// conv2d, conv2d_join_, grouped_conv2d and pointwise_depthwise_conv2d on CPU tensors. The schemas are in
// mfp/schemas.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/conv/conv.h"
#include "cpu/conv/pixel_order.h"
#include "cpu/join/landing.h"
#include "cpu/tasks.h"

namespace mfp::cpu {
namespace {

constexpr int64_t kGroupedRows = 14;          // a task's: few enough that their input stays in the second-level cache
constexpr int64_t kBetweenNumbers = 200'000;  // of a thread, between two convs: they stay in its second-level cache

typedef at::IntArrayRef Sizes;

// All that the kernels share, but the output. The tensors must outlive it.
Conv describe(const char* op, const at::Tensor& input, const at::Tensor& weights, const at::Tensor& bias, Sizes kernel,
              Sizes stride, Sizes padding, Sizes dilation) {
  for (const at::Tensor& tensor : {input, weights, bias}) {
    TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu(), op, ": a tensor is ", tensor.scalar_type(),
                " on ", tensor.device(), "; expected float32 on the CPU");
  }
  Conv conv = {};
  conv.weights = weights.const_data_ptr<float>(), conv.bias = bias.const_data_ptr<float>();
  conv.batch = input.size(0), conv.channels = input.size(1);
  TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
              ": expected two numbers each for stride, padding and dilation");
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK(stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0, op, ": stride ", stride, ", padding ", padding,
                ", dilation ", dilation);
    conv.size[d] = input.size(2 + d), conv.kernel[d] = kernel[d];
    conv.stride[d] = stride[d], conv.padding[d] = padding[d], conv.dilation[d] = dilation[d];
    const int64_t room = conv.size[d] + 2 * padding[d] - dilation[d] * (conv.kernel[d] - 1) - 1;
    TORCH_CHECK(room >= 0 && conv.kernel[d] > 0, op, ": the kernel ", kernel, " does not fit the input ",
                input.sizes());
    conv.out_size[d] = room / stride[d] + 1;
  }
  conv.out_pitch = conv.out_size[1];
  return conv;
}

// The same where all channels of a group meet in each filter of it.
Conv describe_full(const char* op, const at::Tensor& input, const at::Tensor& weights, const at::Tensor& bias,
                   int64_t filters, Sizes stride, Sizes padding, Sizes dilation, bool winograd, int64_t groups) {
  TORCH_CHECK(groups > 0 && input.dim() == 4 && weights.dim() == 5 && weights.size(4) == kBlock &&
                  weights.is_contiguous() && weights.size(0) > 0 && input.size(1) == weights.size(3) * groups,
              op, ": input is ", input.sizes(), ", weights ", weights.sizes(), ", groups ", groups,
              "; expected [B, C, H, W] and [blocks, kernel height, kernel width, C / groups, 16], contiguous");
  TORCH_CHECK(bias.dim() == 1 && bias.is_contiguous() && bias.numel() == weights.size(0) * kBlock, op, ": bias is ",
              bias.sizes(), "; expected [", weights.size(0) * kBlock, "]");
  const int64_t blocks = (filters / groups + kBlock - 1) / kBlock;  // of a group
  TORCH_CHECK(filters > 0 && filters % groups == 0 && blocks * groups == weights.size(0), op, ": ", filters,
              " filters in ", weights.size(0), " blocks of 16, ", groups, " groups");
  const Sizes kernel = weights.sizes().slice(1, 2);
  const std::vector<int64_t> ones = {1, 1}, patch(2, kWinogradOut + 2), three = {3, 3};
  TORCH_CHECK(!winograd || (groups == 1 && kernel.equals(patch) && stride.equals(ones) && dilation.equals(ones)), op,
              ": weights ", weights.sizes(), ", stride ", stride, ", dilation ", dilation, ", groups ", groups,
              "; Winograd's form has 6x6 weights, stride 1, dilation 1 and one group");
  Conv conv = describe(op, input, weights, bias, winograd ? Sizes(three) : kernel, stride, padding, dilation);
  conv.filters = filters, conv.winograd = winograd, conv.groups = groups;
  return conv;
}

// What a task of a convolution reads beside tensors.
struct Tables {
  std::vector<float> zeros;
  std::vector<uint16_t> landing;
};

void run(Conv conv, std::vector<uint16_t> landing = {}) {
  if (conv.pixels() == 0) return;
  const auto tables = std::make_shared<const Tables>(Tables{std::vector<float>(conv.channels), std::move(landing)});
  conv.zeros = tables->zeros.data();
  if (!tables->landing.empty()) conv.landing = tables->landing.data();
  const Isa isa = current_isa();
  const int threads = at::get_num_threads();
  if (conv.winograd) {
    const ConvTasks tasks = MFP_OF_ISA(isa, winograd_tasks)(conv, threads);
    const auto task = MFP_OF_ISA(isa, winograd_task);
    return run_phase(tasks.count(), [=, kept = tables](int64_t number) { task(conv, tasks, number); });
  }
  const PixelOrder order(conv, tile_pixels(isa));
  const ConvTasks tasks = MFP_OF_ISA(isa, conv_tasks)(conv, order.tiles(), threads);
  const auto task = MFP_OF_ISA(isa, conv_task);
  run_phase(tasks.count(), [=, kept = tables](int64_t number) { task(conv, order, tasks, number); });
}

at::Tensor empty_output(const Conv& conv, const at::Tensor& input) {
  const std::array<int64_t, 4> sizes = {conv.batch, conv.filters, conv.out_size[0], conv.out_size[1]};
  return at::empty(sizes, input.options().memory_format(at::MemoryFormat::ChannelsLast));
}

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weights, const at::Tensor& bias, int64_t filters,
                  Sizes stride, Sizes padding, Sizes dilation, const std::string& activation, bool winograd,
                  int64_t groups) {
  Conv conv = describe_full("conv2d", input, weights, bias, filters, stride, padding, dilation, winograd, groups);
  const at::Tensor rows = in_order(input), output = empty_output(conv, input);
  conv.input = rows.const_data_ptr<float>(), conv.output = output.mutable_data_ptr<float>();
  conv.activation = activation_of(activation);
  run(conv);
  return output;
}

// All of a convolution of narrow groups but its output, for images like the input's, of `channels`.
Conv describe_grouped(const char* op, const at::Tensor& input, int64_t channels, const at::Tensor& weights,
                      const at::Tensor& bias, Sizes stride, Sizes padding, Sizes dilation,
                      const std::string& activation) {
  TORCH_CHECK(
      weights.dim() == 4 && weights.is_contiguous() && weights.size(3) == (channels + kBlock - 1) / kBlock * kBlock, op,
      ": input is ", input.sizes(), ", weights ", weights.sizes(),
      "; expected [kernel height, kernel width, C / groups, ", channels,
      " channels filled up to a multiple of 16], contiguous");
  TORCH_CHECK(bias.dim() == 1 && bias.is_contiguous() && bias.numel() == weights.size(3), op, ": bias is ",
              bias.sizes(), "; expected [", weights.size(3), "]");
  const int64_t width = weights.size(2);
  TORCH_CHECK(width == 1 || ((width == 4 || width == 8 || width == 16) && channels >= kBlock && channels % width == 0 &&
                             weights.size(1) == 3 && stride.size() == 2 && stride[1] <= 2 && dilation.size() == 2 &&
                             dilation[1] == 1),
              op, ": ", channels, " channels in groups of ", width, ", weights ", weights.sizes(), ", stride ", stride,
              ", dilation ", dilation, "; expected groups of 1, or at least 16 channels in groups of 4, 8 or 16, ",
              "3 columns, stride 1 or 2 and dilation 1");
  Conv conv = describe(op, input, weights, bias, weights.sizes().slice(0, 2), stride, padding, dilation);
  conv.channels = conv.filters = channels, conv.groups = channels / width;
  conv.activation = activation_of(activation);
  return conv;
}

void run_grouped(const Conv& conv) {
  if (conv.pixels() == 0 || conv.channels == 0) return;
  const auto compute = MFP_OF_ISA(current_isa(), grouped_rows);
  const int64_t out_rows = conv.batch * conv.out_size[0], threads = at::get_num_threads();
  const int64_t tasks = std::min(out_rows, std::max(4 * threads, out_rows / kGroupedRows));
  run_phase(tasks, [=](int64_t task) { compute(conv, out_rows * task / tasks, out_rows * (task + 1) / tasks); });
}

at::Tensor grouped_conv2d(const at::Tensor& input, const at::Tensor& weights, const at::Tensor& bias, Sizes stride,
                          Sizes padding, Sizes dilation, const std::string& activation) {
  const char* op = "grouped_conv2d";
  TORCH_CHECK(input.dim() == 4, op, ": input is ", input.sizes(), "; expected [B, C, H, W]");
  Conv conv = describe_grouped(op, input, input.size(1), weights, bias, stride, padding, dilation, activation);
  const at::Tensor rows = in_order(input), output = empty_output(conv, input);
  conv.input = rows.const_data_ptr<float>(), conv.output = output.mutable_data_ptr<float>();
  run_grouped(conv);
  return output;
}

at::Tensor pointwise_depthwise_conv2d(const at::Tensor& input, const at::Tensor& pointwise_weights,
                                      const at::Tensor& pointwise_bias, const std::string& pointwise_activation,
                                      int64_t channels, const at::Tensor& weights, const at::Tensor& bias, Sizes stride,
                                      Sizes padding, Sizes dilation, const std::string& activation) {
  const char* op = "pointwise_depthwise_conv2d";
  const std::vector<int64_t> one = {1, 1}, none = {0, 0};
  Conv pointwise = describe_full(op, input, pointwise_weights, pointwise_bias, channels, one, none, one, false, 1);
  TORCH_CHECK(pointwise.taps() == 1, op, ": the first weights are ", pointwise_weights.sizes(),
              "; expected a kernel of 1x1");
  TORCH_CHECK(weights.dim() != 4 || weights.size(2) == 1, op, ": weights ", weights.sizes(), "; expected groups of 1");
  Conv depthwise = describe_grouped(op, input, channels, weights, bias, stride, padding, dilation, activation);
  const at::Tensor rows = in_order(input), output = empty_output(depthwise, input);
  if (output.numel() == 0) return output;
  pointwise.input = rows.const_data_ptr<float>();
  pointwise.activation = activation_of(pointwise_activation);
  depthwise.output = output.mutable_data_ptr<float>();
  const int threads = at::get_num_threads();
  PointwiseDepthwise convs(pointwise, depthwise, threads);
  if (pointwise.pixels() * channels <= threads * kBetweenNumbers || convs.tasks() < threads) {
    const at::Tensor between = empty_output(pointwise, input);  // then one after the other is faster
    pointwise.output = between.mutable_data_ptr<float>(), depthwise.input = between.const_data_ptr<float>();
    run(pointwise);
    run_grouped(depthwise);
    return output;
  }
  const auto tables = std::make_shared<const Tables>(Tables{std::vector<float>(pointwise.channels), {}});
  convs.pointwise.zeros = tables->zeros.data();
  const auto task = MFP_OF_ISA(current_isa(), pointwise_depthwise_task);
  run_phase(convs.tasks(), [=, kept = tables](int64_t number) { task(convs, number); });
  return output;
}

void conv2d_join_(const at::Tensor& residual, const at::Tensor& input, const at::Tensor& weights,
                  const at::Tensor& bias, const at::Tensor& index, Sizes stride, Sizes padding, Sizes dilation,
                  bool relu, bool winograd) {
  TORCH_CHECK(index.dim() == 1 && index.scalar_type() == at::kLong && index.is_cpu() && index.is_contiguous(),
              "conv2d_join_: index is ", index.sizes(), " ", index.scalar_type(),
              "; expected an int64 channel for each filter");
  Conv conv =
      describe_full("conv2d_join_", input, weights, bias, index.numel(), stride, padding, dilation, winograd, 1);
  TORCH_CHECK(residual.dim() == 4 && residual.scalar_type() == at::kFloat && residual.is_cpu() &&
                  residual.is_contiguous(at::MemoryFormat::ChannelsLast) && residual.size(0) == conv.batch &&
                  residual.size(2) == conv.out_size[0] && residual.size(3) == conv.out_size[1],
              "conv2d_join_: residual is ", residual.sizes(), " ", residual.scalar_type(), " with strides ",
              residual.strides(), "; expected channels_last float32 [", conv.batch, ", C, ", conv.out_size[0], ", ",
              conv.out_size[1], "]");
  conv.residual_channels = residual.size(1), conv.index = index.const_data_ptr<int64_t>(), conv.relu = relu;
  std::vector<uint16_t> landing = landing_bits("conv2d_join_", index, conv.residual_channels);
  const at::Tensor rows = in_order(input);
  conv.input = rows.const_data_ptr<float>(), conv.output = residual.mutable_data_ptr<float>();
  run(conv, std::move(landing));
  if (!residual.is_inference()) residual.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_join_", &conv2d_join_);
  m.impl("grouped_conv2d", &grouped_conv2d);
  m.impl("pointwise_depthwise_conv2d", &pointwise_depthwise_conv2d);
}

}  // namespace mfp::cpu
