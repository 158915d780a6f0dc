// squeeze_excite_ on CPU tensors. The schema is in mfp/schemas.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/excite/excite.h"
#include "cpu/tasks.h"

namespace mfp::cpu {
namespace {

// The numbers on the way to the gates of some images.
struct Space {
  std::vector<float> sums, means, hidden, gates;
  Space(const Excite& work, int64_t images)
      : sums(images * work.stretches() * work.channels),
        means(images * work.channels),
        hidden(images * work.hidden),
        gates(images * work.channels) {}
};

void run(const Excite& work) {
  const Isa isa = current_isa();
  const auto sum = MFP_OF_ISA(isa, excite_sums);
  const auto mean = MFP_OF_ISA(isa, excite_means);
  const auto hide = MFP_OF_ISA(isa, excite_hidden);
  const auto gate = MFP_OF_ISA(isa, excite_gates);
  const auto scale = MFP_OF_ISA(isa, excite_scale);
  const int64_t stretches = work.stretches(), channels = work.channels, threads = at::get_num_threads();
  if (work.batch >= threads) {  // an image a task, which stays in that core's cache
    return run_phase(work.batch, [=](int64_t image) {
      Space space(work, 1);
      for (int64_t s = 0; s < stretches; ++s) sum(work, image, s, space.sums.data() + s * channels);
      mean(work, space.sums.data(), space.means.data());
      hide(work, space.means.data(), 0, work.hidden, space.hidden.data());
      gate(work, space.hidden.data(), 0, channels, space.gates.data());
      for (int64_t s = 0; s < stretches; ++s) scale(work, image, s, space.gates.data());
    });
  }
  const auto space = std::make_shared<Space>(work, work.batch);
  run_phase(work.batch * stretches,
            [=](int64_t task) { sum(work, task / stretches, task % stretches, space->sums.data() + task * channels); });
  run_phase(work.batch, [=](int64_t image) {
    mean(work, space->sums.data() + image * stretches * channels, space->means.data() + image * channels);
  });
  run_phase(work.batch * threads, [=](int64_t task) {
    const int64_t image = task / threads, part = task % threads;
    hide(work, space->means.data() + image * channels, work.hidden * part / threads, work.hidden * (part + 1) / threads,
         space->hidden.data() + image * work.hidden);
  });
  run_phase(work.batch * threads, [=](int64_t task) {
    const int64_t image = task / threads, part = task % threads;
    gate(work, space->hidden.data() + image * work.hidden, channels * part / threads, channels * (part + 1) / threads,
         space->gates.data() + image * channels);
  });
  run_phase(work.batch * stretches, [=](int64_t task) {
    scale(work, task / stretches, task % stretches, space->gates.data() + task / stretches * channels);
  });
}

void squeeze_excite_(const at::Tensor& input, const at::Tensor& reduce_weight, const at::Tensor& reduce_bias,
                     const at::Tensor& expand_weight, const at::Tensor& expand_bias, const std::string& activation,
                     bool hard) {
  TORCH_CHECK(input.dim() == 4 && input.scalar_type() == at::kFloat && input.is_cpu() &&
                  input.is_contiguous(at::MemoryFormat::ChannelsLast),
              "squeeze_excite_: input is ", input.sizes(), " ", input.scalar_type(), " on ", input.device(),
              " with strides ", input.strides(), "; expected channels_last float32 [B, C, H, W] on the CPU");
  const int64_t channels = input.size(1), hidden = reduce_bias.numel();
  const auto check = [](const char* name, const at::Tensor& tensor, std::vector<int64_t> sizes) {
    TORCH_CHECK(
        tensor.sizes().equals(sizes) && tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.is_contiguous(),
        "squeeze_excite_: ", name, " is ", tensor.sizes(), " ", tensor.scalar_type(), " on ", tensor.device(),
        "; expected contiguous float32 ", sizes, " on the CPU");
    return tensor.const_data_ptr<float>();
  };
  Excite work = {};
  work.reduce_weight = check("reduce_weight", reduce_weight, {hidden, channels});
  work.reduce_bias = check("reduce_bias", reduce_bias, {hidden});
  work.expand_weight = check("expand_weight", expand_weight, {hidden, channels});
  work.expand_bias = check("expand_bias", expand_bias, {channels});
  work.images = input.mutable_data_ptr<float>();
  work.batch = input.size(0), work.pixels = input.size(2) * input.size(3);
  work.channels = channels, work.hidden = hidden;
  work.activation = activation_of(activation), work.hard = hard;
  if (input.numel() == 0) return;
  run(work);
  if (!input.is_inference()) input.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) { m.impl("squeeze_excite_", &squeeze_excite_); }

}  // namespace mfp::cpu
