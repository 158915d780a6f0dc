// take_channels on CPU tensors. The schema is in mfp/schemas.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/join/landing.h"
#include "cpu/join/take.h"

namespace mfp::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // numbers of the input per task

at::Tensor take_channels(const at::Tensor& given, const at::Tensor& index) {
  TORCH_CHECK(given.dim() == 4 && given.scalar_type() == at::kFloat && index.dim() == 1 &&
                  index.scalar_type() == at::kLong && given.is_cpu() && index.is_cpu(),
              "take_channels: input is ", given.sizes(), " ", given.scalar_type(), " on ", given.device(), ", index ",
              index.sizes(), " ", index.scalar_type(), " on ", index.device(),
              "; expected float32 [B, C, H, W] and int64 [K] on the CPU");
  const at::Tensor input = given.contiguous(at::MemoryFormat::ChannelsLast), places = index.contiguous();
  const int64_t channels = input.size(1), rows = input.size(0) * input.size(2) * input.size(3);
  const auto landing = landing_bits("take_channels", places, channels);
  const at::Tensor output = at::empty({input.size(0), index.numel(), input.size(2), input.size(3)},
                                      input.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (output.numel() == 0) return output;
  const TakeRows work = {input.const_data_ptr<float>(),
                         output.mutable_data_ptr<float>(),
                         landing.data(),
                         places.const_data_ptr<int64_t>(),
                         channels,
                         index.numel()};
  const auto run = MFP_OF_ISA(current_isa(), take_rows);
  at::parallel_for(0, rows, std::max<int64_t>(kGrain / channels, 1),
                   [&](int64_t begin, int64_t end) { run(work, begin, end); });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) { m.impl("take_channels", &take_channels); }

}  // namespace mfp::cpu
