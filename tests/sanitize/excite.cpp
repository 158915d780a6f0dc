#include "cpu/excite/excite.h"

#include "common.h"

// Gates of some images at every instruction set, in buffers that end where the last number does.
static void check_excite(int64_t pixels, int64_t channels, int64_t hidden, bool hard, std::mt19937& random) {
  Excite work = {};
  work.batch = 2, work.pixels = pixels, work.channels = channels, work.hidden = hidden, work.hard = hard;
  work.activation = activation_of(hard ? "relu" : "silu");
  const auto numbers = [&](int64_t count) { return Numbers(DType::float32, count, random, 0.5f); };
  const auto data = [](const Numbers& n) { return reinterpret_cast<const float*>(n.bytes.data()); };
  const Numbers images = numbers(work.batch * pixels * channels), reduce = numbers(hidden * channels);
  const Numbers reduce_bias = numbers(hidden), expand = numbers(hidden * channels), expand_bias = numbers(channels);
  work.reduce_weight = data(reduce), work.reduce_bias = data(reduce_bias);
  work.expand_weight = data(expand), work.expand_bias = data(expand_bias);
  for (Isa isa : levels()) {
    std::vector<float> output(data(images), data(images) + images.count), gates(channels);
    std::vector<float> mean(channels), between(hidden);
    work.images = output.data();
    const auto sum = MFP_OF_ISA(isa, excite_sums);
    const auto average = MFP_OF_ISA(isa, excite_means);
    const auto hide = MFP_OF_ISA(isa, excite_hidden);
    const auto gate = MFP_OF_ISA(isa, excite_gates);
    const auto scale = MFP_OF_ISA(isa, excite_scale);
    for (int64_t image = 0; image < work.batch; ++image) {
      std::vector<float> sums(work.stretches() * channels);
      for (int64_t s = 0; s < work.stretches(); ++s) sum(work, image, s, sums.data() + s * channels);
      average(work, sums.data(), mean.data());
      for (int64_t h = 0; h < hidden; h += 3) hide(work, mean.data(), h, std::min(h + 3, hidden), between.data());
      for (int64_t c = 0; c < channels; c += 24) {
        gate(work, between.data(), c, std::min(c + 24, channels), gates.data());
      }
      for (int64_t s = 0; s < work.stretches(); ++s) scale(work, image, s, gates.data());
      std::vector<double> means(channels), excited(hidden);
      for (int64_t i = 0; i < pixels * channels; ++i) {
        means[i % channels] += images[image * pixels * channels + i] / pixels;
      }
      for (int64_t h = 0; h < hidden; ++h) {
        double total = reduce_bias[h];
        for (int64_t c = 0; c < channels; ++c) total += means[c] * reduce[h * channels + c];
        excited[h] = hard ? std::fmax(total, 0) : total / (1 + std::exp(-total));
      }
      for (int64_t c = 0; c < channels; ++c) {
        double total = expand_bias[c];
        for (int64_t h = 0; h < hidden; ++h) total += excited[h] * expand[h * channels + c];
        const double right = hard ? std::fmin(std::fmax(total + 3, 0), 6) / 6 : 1 / (1 + std::exp(-total));
        for (int64_t p = 0; p < pixels; ++p) {
          const int64_t i = (image * pixels + p) * channels + c;
          compare("squeeze-excite", output[i], images[i] * right, DType::float32);
        }
      }
    }
  }
}

void check_all_excites(std::mt19937& random) {
  for (int64_t pixels : {1, 49, 64, 65, 200}) {
    for (int64_t channels : {1, 3, 8, 16, 17, 70}) {
      check_excite(pixels, channels, 1 + channels / 4, false, random);
      check_excite(pixels, channels, channels, true, random);
    }
  }
}
