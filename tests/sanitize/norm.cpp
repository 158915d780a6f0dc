#include "cpu/norm/norm.h"

#include "common.h"

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

void check_all_norms(std::mt19937& random) {
  for (const char* activation : {"none", "relu", "silu", "hardswish"}) {
    for (int64_t width : {1, 3, 4, 7, 8, 15, 16, 17, 33}) {
      check_norm({width}, activation, random);
      check_norm({5, width, 2}, activation, random);
    }
  }
}
