#include "cpu/norm/norm.h"

#include "common.h"
#include "cpu/norm/batch_norm_training.h"

// Some parts side by side at every instruction set, in buffers that end where the last number does.
static void check_norm(const std::vector<int64_t>& widths, const std::string& activation, std::mt19937& random) {
  constexpr int64_t kRows = 5;
  Norm norm = {};
  norm.activation = activation_of(activation);
  std::vector<Numbers> parts;
  for (int64_t width : widths) {
    parts.emplace_back(DType::float32, kRows * width, random);
    norm.channels += width;
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    norm.parts.push_back({reinterpret_cast<const float*>(parts[i].bytes.data()), widths[i]});
  }
  const Numbers scale(DType::float32, norm.channels, random), shift(DType::float32, norm.channels, random);
  norm.scale = reinterpret_cast<const float*>(scale.bytes.data());
  norm.shift = reinterpret_cast<const float*>(shift.bytes.data());
  for (Isa isa : levels()) {
    std::vector<float> output(kRows * norm.channels);
    norm.output = output.data();
    const auto rows = MFP_OF_ISA(isa, norm_rows);
    rows(norm, 2, kRows), rows(norm, 0, 2);
    for (int64_t row = 0; row < kRows; ++row) {
      int64_t channel = 0;
      for (size_t i = 0; i < parts.size(); ++i) {
        for (int64_t c = 0; c < widths[i]; ++c, ++channel) {
          double right = parts[i][row * widths[i] + c] * scale[channel] + shift[channel];
          if (activation == "relu") right = std::fmax(right, 0);
          if (activation == "silu") right /= 1 + std::exp(-right);
          if (activation == "hardswish") right *= std::fmin(std::fmax(right + 3, 0), 6) / 6;
          compare(("norm " + activation).c_str(), output[row * norm.channels + channel], right, DType::float32);
        }
      }
    }
  }
}

// The four passes of training, each against plain sums.
static void check_training(int64_t channels, std::mt19937& random) {
  constexpr int64_t kRows = 7, kBegin = 2;  // the first rows are another thread's
  const int64_t count = kRows * channels;
  const Numbers input(DType::float32, count, random), gradient(DType::float32, count, random);
  const Numbers mean(DType::float32, channels, random), scale(DType::float32, channels, random);
  const Numbers slope(DType::float32, channels, random), shift(DType::float32, channels, random);
  const auto at = [](const Numbers& numbers) { return reinterpret_cast<const float*>(numbers.bytes.data()); };
  const NormRows x = {at(input), kRows, channels};
  for (Isa isa : levels()) {
    std::vector<float> moments(2 * channels), sums(2 * channels), output(count), spread(count);
    MFP_OF_ISA(isa, row_moments)(x, kBegin, kRows, moments.data());
    MFP_OF_ISA(isa, gradient_sums)(x, at(gradient), at(mean), kBegin, kRows, sums.data());
    MFP_OF_ISA(isa, normalize_rows)(x, at(mean), at(scale), at(shift), kBegin, kRows, output.data());
    MFP_OF_ISA(isa, input_gradients)
    (x, at(gradient), at(mean), at(scale), at(slope), at(shift), kBegin, kRows, spread.data());
    for (int64_t c = 0; c < channels; ++c) {
      double center = 0, squares = 0, sum = 0, products = 0;
      for (int64_t row = kBegin; row < kRows; ++row) center += input[row * channels + c] / (kRows - kBegin);
      for (int64_t row = 0; row < kRows; ++row) {
        const int64_t i = row * channels + c;
        const double away = input[i] - mean[c];
        const bool mine = row >= kBegin;
        compare("normalize", output[i], mine ? away * scale[c] + shift[c] : 0, DType::float32);
        const double right = gradient[i] * scale[c] + away * slope[c] + shift[c];
        compare("input gradient", spread[i], mine ? right : 0, DType::float32);
        if (!mine) continue;
        squares += (input[i] - center) * (input[i] - center);
        sum += gradient[i], products += gradient[i] * away;
      }
      const double right[] = {center, squares, sum, products};  // sums of a few numbers near one, of either sign
      const float found[] = {moments[c], moments[channels + c], sums[c], sums[channels + c]};
      for (int i = 0; i < 4; ++i) {
        expect(std::fabs(found[i] - right[i]) < 1e-5, "training, sum " + std::to_string(i) + ": " +
                                                          std::to_string(found[i]) + ", expected " +
                                                          std::to_string(right[i]));
      }
    }
  }
}

void check_all_norms(std::mt19937& random) {
  for (const char* activation : {"none", "relu", "silu", "hardswish"}) {
    for (int64_t width : {1, 3, 4, 7, 8, 15, 16, 17, 33}) {
      check_norm({width}, activation, random);
      check_norm({5, width, 2}, activation, random);
    }
  }
  for (int64_t channels : {1, 4, 7, 8, 15, 16, 17, 40, 63, 64, 65, 130}) check_training(channels, random);
}
