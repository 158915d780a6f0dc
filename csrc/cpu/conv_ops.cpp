// conv2d and conv2d_join_ on CPU tensors. The schemas are in mfp/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>

#include <atomic>
#include <limits>
#include <vector>

#include "cpu/conv.h"
#include "cpu/landing.h"
#include "cpu/pixel_order.h"

namespace mfp::cpu {
namespace {

typedef at::IntArrayRef Sizes;

// Everything but the output. The tensors must outlive it.
Conv describe(const char* op, const at::Tensor& input, const at::Tensor& weights, const at::Tensor& bias, Sizes stride,
              Sizes padding, Sizes dilation) {
  TORCH_CHECK(input.dim() == 4 && weights.dim() == 5 && weights.size(4) == kBlock && weights.is_contiguous() &&
                  weights.size(0) > 0 && input.size(1) == weights.size(3),
              op, ": input is ", input.sizes(), ", weights ", weights.sizes(),
              "; expected [B, C, H, W] and [blocks, kernel height, kernel width, C, 16], contiguous");
  TORCH_CHECK(bias.dim() == 1 && bias.is_contiguous() && bias.numel() == weights.size(0) * kBlock, op, ": bias is ",
              bias.sizes(), "; expected [", weights.size(0) * kBlock, "]");
  for (const at::Tensor& tensor : {input, weights, bias}) {
    TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_cpu(), op, ": a tensor is ", tensor.scalar_type(),
                " on ", tensor.device(), "; expected float32 on the CPU");
  }
  Conv conv = {};
  conv.low = -std::numeric_limits<float>::infinity(), conv.high = std::numeric_limits<float>::infinity();
  conv.weights = weights.const_data_ptr<float>(), conv.bias = bias.const_data_ptr<float>();
  conv.batch = input.size(0), conv.channels = input.size(1);
  TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
              ": expected two numbers each for stride, padding and dilation");
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK(stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0, op, ": stride ", stride, ", padding ", padding,
                ", dilation ", dilation);
    conv.size[d] = input.size(2 + d), conv.kernel[d] = weights.size(1 + d);
    conv.stride[d] = stride[d], conv.padding[d] = padding[d], conv.dilation[d] = dilation[d];
    const int64_t room = conv.size[d] + 2 * padding[d] - dilation[d] * (conv.kernel[d] - 1) - 1;
    TORCH_CHECK(room >= 0 && conv.kernel[d] > 0, op, ": the kernel ", weights.sizes(), " does not fit the input ",
                input.sizes());
    conv.out_size[d] = room / stride[d] + 1;
  }
  return conv;
}

struct alignas(64) Stretch {
  std::atomic<int64_t> next;
  int64_t end;
};

void run(Conv conv) {
  if (conv.pixels() == 0) return;
  const std::vector<float> zeros(conv.channels);
  conv.zeros = zeros.data();
  const Isa isa = current_isa();
  const auto tasks_of = isa == Isa::avx512 ? avx512::conv_tasks
                        : isa == Isa::avx2 ? avx2::conv_tasks
                                           : portable::conv_tasks;
  const auto task = isa == Isa::avx512 ? avx512::conv_task : isa == Isa::avx2 ? avx2::conv_task : portable::conv_task;
  const PixelOrder order(conv, tile_pixels(isa));
  const int threads = at::get_num_threads();
  const ConvTasks tasks = tasks_of(conv, order.tiles(), threads);
  // Each thread does its own stretch of the tasks, whose data the layer before has left in its caches, and then what is
  // left of the others'. Results do not depend on who computes.
  std::vector<Stretch> stretches(threads);
  for (int i = 0; i < threads; ++i) {
    stretches[i].next = tasks.count() * i / threads, stretches[i].end = tasks.count() * (i + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end + threads - 1; ++i) {
      Stretch& stretch = stretches[i % threads];
      for (int64_t number; (number = stretch.next++) < stretch.end;) task(conv, order, tasks, number);
    }
  });
}

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weights, const at::Tensor& bias, int64_t filters,
                  Sizes stride, Sizes padding, Sizes dilation, double low, double high) {
  Conv conv = describe("conv2d", input, weights, bias, stride, padding, dilation);
  TORCH_CHECK(filters > bias.numel() - kBlock && filters <= bias.numel(), "conv2d: ", filters, " filters in ",
              weights.size(0), " blocks of 16");
  const at::Tensor rows = input.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor output = at::empty({conv.batch, filters, conv.out_size[0], conv.out_size[1]},
                                      input.options().memory_format(at::MemoryFormat::ChannelsLast));
  conv.input = rows.const_data_ptr<float>(), conv.output = output.mutable_data_ptr<float>();
  conv.filters = filters, conv.low = static_cast<float>(low), conv.high = static_cast<float>(high);
  run(conv);
  return output;
}

void conv2d_join_(const at::Tensor& residual, const at::Tensor& input, const at::Tensor& weights,
                  const at::Tensor& bias, const at::Tensor& index, Sizes stride, Sizes padding, Sizes dilation,
                  bool relu) {
  Conv conv = describe("conv2d_join_", input, weights, bias, stride, padding, dilation);
  conv.filters = index.numel();
  TORCH_CHECK(index.dim() == 1 && conv.filters > bias.numel() - kBlock && conv.filters <= bias.numel() &&
                  index.scalar_type() == at::kLong && index.is_cpu() && index.is_contiguous(),
              "conv2d_join_: index is ", index.sizes(), " ", index.scalar_type(), ", ", weights.size(0),
              " blocks of 16 filters; expected an int64 channel for each filter");
  TORCH_CHECK(residual.dim() == 4 && residual.scalar_type() == at::kFloat && residual.is_cpu() &&
                  residual.is_contiguous(at::MemoryFormat::ChannelsLast) && residual.size(0) == conv.batch &&
                  residual.size(2) == conv.out_size[0] && residual.size(3) == conv.out_size[1],
              "conv2d_join_: residual is ", residual.sizes(), " ", residual.scalar_type(), " with strides ",
              residual.strides(), "; expected channels_last float32 [", conv.batch, ", C, ", conv.out_size[0], ", ",
              conv.out_size[1], "]");
  conv.residual_channels = residual.size(1), conv.index = index.const_data_ptr<int64_t>(), conv.relu = relu;
  const std::vector<uint16_t> landing = landing_bits("conv2d_join_", index, conv.residual_channels);
  const at::Tensor rows = input.contiguous(at::MemoryFormat::ChannelsLast);
  conv.landing = landing.data();
  conv.input = rows.const_data_ptr<float>(), conv.output = residual.mutable_data_ptr<float>();
  run(conv);
  if (!residual.is_inference()) residual.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_join_", &conv2d_join_);
}

}  // namespace mfp::cpu
