#include "cpu/optim/optim.h"

#include "common.h"

struct Slots {
  Numbers value, gradient, first, second;
  std::unique_ptr<bool[]> keep;
  int64_t rows, size;
};

static void check_optimizers(DType dtype, bool first_step, std::mt19937& random) {
  std::vector<Slots> start;
  for (const auto& [rows, size] : std::vector<Shape>{{1, 1}, {7, 1}, {5, 3}, {3, 16}, {4, 17}, {2, 40000}, {100, 33}}) {
    Numbers second(dtype, rows * size, random);
    for (size_t i = dtype == DType::float32 ? 3 : 1; i < second.bytes.size(); i += dtype == DType::float32 ? 4 : 2) {
      second.bytes[i] &= 0x7f;  // a mean of squares is not negative
    }
    start.push_back({{dtype, rows * size, random},
                     {dtype, rows * size, random},
                     {dtype, rows * size, random},
                     std::move(second),
                     std::unique_ptr<bool[]>(new bool[rows]),
                     rows,
                     size});
    for (int64_t row = 0; row < rows; ++row) start.back().keep[row] = random() % 3 > 0;
  }
  const SgdStep sgd = {0.1f, 0.9f, 0.7f, 0.01f, true, false, first_step};
  const AdamwStep adamw = {0.999f, 0.1f, 0.99f, 0.01f, 0.3f, 1e-3f, 0.02f, false};
  for (Isa isa : levels()) {
    for (bool masked : {false, true}) {
      for (bool is_adamw : {false, true}) {
        std::vector<Numbers> value, first, second;
        for (const Slots& s : start) value.push_back(s.value), first.push_back(s.first), second.push_back(s.second);
        std::vector<Parameter> parameters;
        for (size_t i = 0; i < start.size(); ++i) {
          const Slots& s = start[i];
          parameters.push_back({value[i].bytes.data(), s.gradient.bytes.data(), first[i].bytes.data(),
                                is_adamw ? second[i].bytes.data() : nullptr, dtype, masked ? s.keep.get() : nullptr,
                                masked ? s.rows : s.rows * s.size, masked ? s.size : 1});
        }
        is_adamw ? adamw_step(parameters, adamw, 3, isa) : sgd_step(parameters, sgd, 3, isa);
        for (size_t i = 0; i < start.size(); ++i) {
          const Slots& s = start[i];
          for (int64_t x = 0; x < s.rows * s.size; ++x) {
            double w = s.value[x], m = s.first[x], v = s.second[x], g = s.gradient[x];
            if (!masked || s.keep[x / s.size]) {
              if (is_adamw) {
                m += 0.1f * (g - m);
                v = 0.99f * v + 0.01f * g * g;
                w = w * 0.999f - 0.02f * m / (std::sqrt(v) / 0.3f + 1e-3f);
              } else {
                g += 0.01f * w;
                m = first_step ? g : 0.9f * m + 0.7f * g;
                w -= 0.1f * (g + 0.9f * m);
              }
            }
            compare(is_adamw ? "adamw" : "sgd", value[i][x], w, dtype);
            compare("momentum", first[i][x], m, dtype);
            if (is_adamw) compare("squares", second[i][x], v, dtype);
          }
        }
      }
    }
  }
  SgdStep plain = sgd;  // without momentum there is no buffer
  plain.momentum = 0;
  for (const Slots& s : start) {
    Numbers value = s.value;
    sgd_step({{value.bytes.data(), s.gradient.bytes.data(), nullptr, nullptr, dtype, s.keep.get(), s.rows, s.size}},
             plain, 2, current_isa());
    compare("plain sgd", value[0], s.keep[0] ? s.value[0] - 0.1 * (s.gradient[0] + 0.01 * s.value[0]) : s.value[0],
            dtype);
  }
}

void check_all_optimizers(std::mt19937& random) {
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (bool first_step : {false, true}) check_optimizers(dtype, first_step, random);
  }
}
