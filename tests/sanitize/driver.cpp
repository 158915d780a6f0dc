// Runs the CPU kernels over awkward shapes at every instruction set, type and thread count, against plain double loops.
// Built with AddressSanitizer and UndefinedBehaviorSanitizer by `make sanitize`; torch is not needed. The buffers are
// exactly as long as what they hold, so that one element too far is found.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "cpu/optim.h"
#include "cpu/pixel_order.h"
#include "cpu/scatter.h"
#include "cpu/score.h"

using mfp::DType;
using namespace mfp::cpu;

static int failures = 0;

static void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

static std::vector<Isa> levels() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (isa <= current_isa()) found.push_back(isa);
  }
  return found;
}

// ---- numbers of 16 and 32 bits ------------------------------------------------------------------------------------

static float value_of(uint16_t bits, DType dtype) {
  if (dtype == DType::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Memory of a tensor on the heap, no byte longer than it must be.
struct Numbers {
  DType dtype;
  std::vector<char> bytes;
  int64_t count;

  Numbers(DType type, int64_t n, std::mt19937& random, float scale = 1) : dtype(type), count(n) {
    bytes.resize(n * (type == DType::float32 ? 4 : 2));
    bytes.shrink_to_fit();
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = 0; i < n; ++i) {
      const float value = normal(random);
      if (type == DType::float32) {
        std::memcpy(&bytes[i * 4], &value, 4);
      } else {  // any pattern is a number; take the sign and the low bits of the float, and a moderate exponent
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        const uint16_t half = type == DType::bfloat16 ? wide >> 16 : (wide >> 16 & 0x83ff) | ((12 + wide % 4) << 10);
        std::memcpy(&bytes[i * 2], &half, 2);
      }
    }
  }
  double operator[](int64_t i) const {
    if (dtype == DType::float32) {
      float value;
      std::memcpy(&value, &bytes[i * 4], 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, &bytes[i * 2], 2);
    return value_of(half, dtype);
  }
  void zero(int64_t begin, int64_t end) {
    const int64_t size = dtype == DType::float32 ? 4 : 2;
    std::memset(bytes.data() + begin * size, 0, (end - begin) * size);
  }
};

// ---- scores -------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t filters, size;
};

static double expected_score(const Numbers& w, const Numbers& gradients, const Shape& shape, const Criterion& c,
                             int64_t j) {
  const int64_t n = shape.filters, k = shape.size;
  const auto norm = [&](int64_t i, double p) {
    double sum = 0;
    for (int64_t x = 0; x < k; ++x) sum += std::pow(std::fabs(w[i * k + x]), p);
    return std::pow(sum, 1 / p);
  };
  if (c.kind == Kind::norm) return norm(j, c.exponent);
  if (c.kind == Kind::taylor) {
    double sum = 0;
    for (int64_t x = 0; x < k; ++x) sum += w[j * k + x] * gradients[j * k + x];
    return sum * sum;
  }
  double score = 0;
  const double length = norm(j, 2);
  for (int64_t i = 0; i < n; ++i) {
    if (c.kind == Kind::distance) {
      double sum = 0;
      for (int64_t x = 0; x < k; ++x) sum += std::pow(std::fabs(w[j * k + x] - w[i * k + x]), c.exponent);
      score += std::pow(sum, 1 / c.exponent);
      continue;
    }
    const double other = norm(i, 2);
    double less = 0, more = 0;
    for (int64_t x = 0; x < k && length > 0 && other > 0; ++x) {
      const double a = w[j * k + x] / length, b = w[i * k + x] / other;
      less += (a - b) * (a - b) / 2, more += (a + b) * (a + b) / 2;
    }
    if (length == 0 || other == 0) less = more = length == other ? 0 : 1;
    if (c.kind == Kind::cosine_distance) score += less;
    if (c.kind == Kind::weighted_hybrid && i != j) score += length * other * std::min(less, more);
  }
  return score;
}

static void check_scores(const std::vector<Shape>& shapes, DType dtype, std::mt19937& random) {
  std::vector<Numbers> weights, gradients;
  std::vector<Layer> layers, gradient_layers;
  int64_t total = 0;
  for (const Shape& shape : shapes) {
    weights.emplace_back(dtype, shape.filters * shape.size, random);
    gradients.emplace_back(total % 2 ? dtype : DType::float32, shape.filters * shape.size, random);
    if (shape.filters > 4 && shape.size > 0) {  // two all-zero filters, and a duplicate
      const int64_t bytes = weights.back().bytes.size() / shape.filters;
      weights.back().zero(0, shape.size);
      weights.back().zero(3 * shape.size, 4 * shape.size);
      std::memcpy(&weights.back().bytes[bytes], &weights.back().bytes[2 * bytes], bytes);
    }
    total += shape.filters;
  }
  for (size_t l = 0; l < shapes.size(); ++l) {
    layers.push_back({weights[l].bytes.data(), dtype, shapes[l].filters, shapes[l].size});
    gradient_layers.push_back({gradients[l].bytes.data(), gradients[l].dtype, shapes[l].filters, shapes[l].size});
  }
  const std::vector<Criterion> criteria = {
      {Kind::norm, 1},     {Kind::norm, 2},     {Kind::norm, 2.5},          {Kind::distance, 1},
      {Kind::distance, 2}, {Kind::distance, 3}, {Kind::cosine_distance, 2}, {Kind::weighted_hybrid, 2},
      {Kind::taylor, 2}};
  std::vector<double> expected;
  for (const Criterion& c : criteria) {
    for (size_t l = 0; l < shapes.size(); ++l) {
      for (int64_t j = 0; j < shapes[l].filters; ++j)
        expected.push_back(expected_score(weights[l], gradients[l], shapes[l], c, j));
    }
  }
  for (Isa isa : levels()) {
    std::vector<float> first;
    for (int threads : {1, 3}) {
      std::vector<float> scores(criteria.size() * total);
      compute_scores(layers, gradient_layers, criteria, scores.data(), threads, isa);
      for (size_t i = 0; i < scores.size(); ++i) {
        const bool good = std::fabs(scores[i] - expected[i]) <= 1e-5 * std::fabs(expected[i]) + 1e-12;
        expect(good, std::string("score ") + std::to_string(i) + " of " + std::to_string(shapes[0].filters) + "x" +
                         std::to_string(shapes[0].size) + " at " + isa_name(isa) + ": " + std::to_string(scores[i]) +
                         ", expected " + std::to_string(expected[i]));
      }
      expect(first.empty() || first == scores, "scores depend on the number of threads");
      first = scores;
    }
  }
}

static void check_single_criteria(std::mt19937& random) {
  const Shape shape = {70, 37};
  const Numbers weights(DType::float32, shape.filters * shape.size, random);  // and their own gradients
  const std::vector<Layer> layers = {{weights.bytes.data(), DType::float32, shape.filters, shape.size}};
  for (const Criterion& c : {Criterion{Kind::norm, 1},
                             {Kind::distance, 1},
                             {Kind::distance, 2},
                             {Kind::distance, 1.5},
                             {Kind::cosine_distance, 2},
                             {Kind::weighted_hybrid, 2},
                             {Kind::taylor, 2}}) {
    for (Isa isa : levels()) {
      std::vector<float> scores(shape.filters);
      compute_scores(layers, layers, {c}, scores.data(), 2, isa);
      for (int64_t j = 0; j < shape.filters; ++j) {
        const double expected = expected_score(weights, weights, shape, c, j);
        expect(std::fabs(scores[j] - expected) <= 1e-5 * expected, "a criterion alone");
      }
    }
  }
}

static void check_not_finite(std::mt19937& random) {
  const Shape shape = {5, 19};
  Numbers weights(DType::float32, shape.filters * shape.size, random);
  for (float bad : {INFINITY, -INFINITY, NAN}) {
    std::memcpy(&weights.bytes[2 * shape.size * 4], &bad, 4);
    for (Isa isa : levels()) {
      for (const Criterion& c : {Criterion{Kind::norm, 1},
                                 {Kind::norm, 3},
                                 {Kind::distance, 1},
                                 {Kind::distance, 2},
                                 {Kind::distance, 3},
                                 {Kind::cosine_distance, 2},
                                 {Kind::weighted_hybrid, 2},
                                 {Kind::taylor, 2}}) {
        std::vector<float> scores(shape.filters);
        const std::vector<Layer> layers = {{weights.bytes.data(), DType::float32, shape.filters, shape.size}};
        compute_scores(layers, layers, {c}, scores.data(), 1, isa);
        expect(!std::isfinite(scores[2]), "a filter that is not finite has a finite score");
      }
    }
  }
}

static void check_selection() {
  const float scores[] = {3, 1, 2, 1, 1};
  for (int64_t count = 0; count <= 5; ++count) {
    std::unique_ptr<bool[]> keep(new bool[5]);
    select_lowest(scores, 5, count, keep.get());
    const int64_t order[] = {1, 3, 4, 2, 0};
    for (int64_t i = 0; i < 5; ++i) expect(keep[order[i]] == (i >= count), "selection");
  }
  select_lowest(scores, 0, 0, nullptr);
}

// ---- optimisers ---------------------------------------------------------------------------------------------------

struct Slots {
  Numbers value, gradient, first, second;
  std::unique_ptr<bool[]> keep;
  int64_t rows, size;
};

static double tolerance(DType dtype) {
  return dtype == DType::float32 ? 3e-6 : dtype == DType::bfloat16 ? 0.004 : 0.001;
}

static void compare(const char* what, double got, double expected, DType dtype) {
  expect(std::fabs(got - expected) <= tolerance(dtype) * (std::fabs(expected) + 0.05),
         std::string(what) + ": " + std::to_string(got) + ", expected " + std::to_string(expected));
}

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

// ---- joins --------------------------------------------------------------------------------------------------------

static void check_joins(DType dtype, std::mt19937& random) {
  const int64_t rows = 3, bytes = dtype == DType::float32 ? 4 : 2;
  for (int64_t channels : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 40}) {
    std::vector<int32_t> source(channels);
    int32_t kept = 0;
    for (int32_t& from : source) from = random() % 3 > 0 ? kept++ : -1;
    if (kept == 0) source[0] = kept++;
    std::vector<uint16_t> landing((channels + 15) / 16 + 1);
    for (int64_t c = 0; c < channels; ++c) landing[c / 16] |= (source[c] >= 0) << c % 16;
    const Numbers residual(dtype, rows * channels, random), branch(dtype, rows * kept, random);
    for (Isa isa : levels()) {
      for (bool relu : {false, true}) {
        Numbers by_rows = residual, by_planes = residual;
        const ScatterRows work = {
            by_rows.bytes.data(), branch.bytes.data(), dtype, landing.data(), channels, kept, relu};
        const auto run = isa == Isa::avx512 ? avx512::scatter_rows
                         : isa == Isa::avx2 ? avx2::scatter_rows
                                            : portable::scatter_rows;
        run(work, 0, 1);
        run(work, 1, rows);
        // The same numbers as planes: the first rows of both are planes of `kept` positions.
        const auto plane = isa == Isa::avx512 ? avx512::scatter_plane
                           : isa == Isa::avx2 ? avx2::scatter_plane
                                              : portable::scatter_plane;
        plane({by_planes.bytes.data(), branch.bytes.data(), dtype, kept, relu});
        plane({by_planes.bytes.data() + channels * bytes, nullptr, dtype, (rows - 1) * channels, relu});
        for (int64_t i = 0; i < rows * channels; ++i) {
          const int64_t from = source[i % channels];
          double row = residual[i] + (from < 0 ? 0 : branch[i / channels * kept + from]);
          double flat = residual[i] + (i < kept ? branch[i] : 0);
          if (relu) row = std::fmax(row, 0), flat = i < kept || i >= channels ? std::fmax(flat, 0) : flat;
          compare("join of rows", by_rows[i], row, dtype);
          compare("join of a plane", by_planes[i], flat, dtype);
        }
      }
    }
  }
}

// ---- convolutions -------------------------------------------------------------------------------------------------

static std::vector<float> small_integers(int64_t count, std::mt19937& random) {
  std::vector<float> numbers(count);
  for (float& number : numbers) number = static_cast<int>(random() % 9) - 4.0f;
  numbers.shrink_to_fit();
  return numbers;
}

// 3x3 kernels [blocks, 3, 3, channels, 16] at the points of Winograd's F(4x4, 3x3): [blocks, 6, 6, channels, 16].
static std::vector<float> winograd_weights(const std::vector<float>& weights, int64_t blocks, int64_t row) {
  const double points[5] = {0, 0.75, -0.75, 1.5, -1.5};
  double rows[6][3] = {{}, {}, {}, {}, {}, {0, 0, 1}};
  for (int p = 0; p < 5; ++p) {
    double divisor = 1;
    for (int q = 0; q < 5; ++q) divisor *= p == q ? 1 : points[p] - points[q];
    for (int k = 0; k < 3; ++k) rows[p][k] = std::pow(points[p], k) / divisor;
  }
  std::vector<float> found(blocks * 36 * row);
  for (int64_t i = 0; i < static_cast<int64_t>(found.size()); ++i) {
    const int64_t block = i / row / 36, place = i / row % 36;
    double sum = 0;
    for (int64_t tap = 0; tap < 9; ++tap) {
      sum += rows[place / 6][tap / 3] * rows[place % 6][tap % 3] * weights[(block * 9 + tap) * row + i % row];
    }
    found[i] = static_cast<float>(sum);
  }
  return found;
}

#define OF_ISA(isa, name) (isa == Isa::avx512 ? avx512::name : isa == Isa::avx2 ? avx2::name : portable::name)

static void run_conv(const Conv& conv, Isa isa, int threads) {
  if (conv.winograd) {
    const ConvTasks tasks = OF_ISA(isa, winograd_tasks)(conv, threads);
    for (int64_t i = tasks.count(); i-- > 0;) OF_ISA(isa, winograd_task)(conv, tasks, i);
    return;
  }
  const PixelOrder order(conv, tile_pixels(isa));
  const ConvTasks tasks = OF_ISA(isa, conv_tasks)(conv, order.tiles(), threads);
  for (int64_t i = tasks.count(); i-- > 0;) OF_ISA(isa, conv_task)(conv, order, tasks, i);
}

// One shape at every instruction set, alone and joined into a residual with every second channel; sums of small
// integers are exact, but for Winograd's.
static void check_conv(Conv conv, std::mt19937& random) {
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = conv.dilation[d] * (conv.kernel[d] - 1);
    conv.out_size[d] = (conv.size[d] + 2 * conv.padding[d] - reach - 1) / conv.stride[d] + 1;
  }
  const int64_t blocks = (conv.filters + kBlock - 1) / kBlock;
  const auto input = small_integers(conv.batch * conv.size[0] * conv.size[1] * conv.channels, random);
  const auto weights = small_integers(blocks * kBlock * conv.taps() * conv.channels, random);
  const auto bias = small_integers(blocks * kBlock, random);
  const std::vector<float> zeros(conv.channels);
  conv.input = input.data(), conv.weights = weights.data(), conv.bias = bias.data(), conv.zeros = zeros.data();
  conv.low = -INFINITY, conv.high = INFINITY;
  std::vector<double> expected;
  for (int64_t pixel = 0; pixel < conv.pixels(); ++pixel) {
    const int64_t column = pixel % conv.out_size[1], row = pixel / conv.out_size[1] % conv.out_size[0];
    const int64_t image = pixel / conv.out_size[1] / conv.out_size[0];
    for (int64_t f = 0; f < conv.filters; ++f) {
      double sum = bias[f];
      for (int64_t tap = 0; tap < conv.taps(); ++tap) {
        const int64_t y = row * conv.stride[0] - conv.padding[0] + tap / conv.kernel[1] * conv.dilation[0];
        const int64_t x = column * conv.stride[1] - conv.padding[1] + tap % conv.kernel[1] * conv.dilation[1];
        if (y < 0 || y >= conv.size[0] || x < 0 || x >= conv.size[1]) continue;
        for (int64_t c = 0; c < conv.channels; ++c) {
          const int64_t place = ((f / kBlock * conv.taps() + tap) * conv.channels + c) * kBlock + f % kBlock;
          sum += input[((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels + c] * weights[place];
        }
      }
      expected.push_back(sum);
    }
  }
  std::vector<float> transformed;
  double tolerance = 0;
  if (conv.winograd) {
    transformed = winograd_weights(weights, blocks, conv.channels * kBlock);
    conv.weights = transformed.data();
    for (double value : expected) tolerance = std::fmax(tolerance, 1e-5 * std::fabs(value));
  }
  conv.residual_channels = 2 * conv.filters;
  std::vector<int64_t> index;
  std::vector<uint16_t> landing((conv.residual_channels + 15) / 16 + 1);
  for (int64_t f = 0; f < conv.filters; ++f) {
    index.push_back(2 * f + 1);
    landing[index.back() / 16] |= 1 << index.back() % 16;
  }
  conv.index = index.data();
  for (Isa isa : levels()) {
    for (int joined = 0; joined < 3; ++joined) {  // no, yes, with ReLU
      conv.landing = joined ? landing.data() : nullptr, conv.relu = joined == 2;
      auto output = small_integers(conv.pixels() * conv.out_channels(), random);
      const auto before = output;
      conv.output = output.data();
      for (int threads : {1, 7}) {
        output = before;
        run_conv(conv, isa, threads);
        bool good = true;
        for (size_t i = 0; i < output.size(); ++i) {
          const int64_t channel = i % conv.out_channels(), pixel = i / conv.out_channels();
          double right = joined ? before[i] : expected[i];
          if (joined && channel % 2 == 1) right += expected[pixel * conv.filters + channel / 2];
          good &= std::fabs(output[i] - (conv.relu ? std::fmax(right, 0) : right)) <= tolerance;
        }
        expect(good, std::string(conv.winograd ? "winograd " : "conv ") + isa_name(isa) + " " +
                         std::to_string(conv.channels) + " to " + std::to_string(conv.filters) +
                         (joined ? " joined" : ""));
      }
    }
  }
}

static void check_convs(std::mt19937& random) {
  for (int64_t filters : {1, 7, 8, 9, 16, 17, 24, 25, 32, 40, 41, 48, 49, 97}) {
    check_conv({.batch = 2,
                .channels = 5,
                .filters = filters,
                .size = {4, 7},
                .kernel = {3, 3},
                .stride = {1, 1},
                .padding = {1, 1},
                .dilation = {1, 1}},
               random);
    check_conv({.batch = 2,
                .channels = 19,
                .filters = filters,
                .size = {5, 9},
                .kernel = {3, 3},
                .stride = {1, 1},
                .padding = {1, filters % 3},
                .dilation = {1, 1},
                .winograd = true},
               random);
    check_conv({.batch = 1,
                .channels = 17,
                .filters = filters,
                .size = {3, 3},
                .kernel = {1, 1},
                .stride = {1, 1},
                .padding = {0, 0},
                .dilation = {1, 1}},
               random);
  }
  for (int64_t kernel : {1, 2, 5}) {
    for (int64_t padding : {0, 1, 4}) {
      check_conv({.batch = 3,
                  .channels = 3,
                  .filters = 10,
                  .size = {9, 5},
                  .kernel = {kernel, 3},
                  .stride = {2, 3},
                  .padding = {padding, 2},
                  .dilation = {1, 2}},
                 random);
    }
  }
}

static void check_depthwise(Conv conv, std::mt19937& random) {
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = conv.dilation[d] * (conv.kernel[d] - 1);
    conv.out_size[d] = (conv.size[d] + 2 * conv.padding[d] - reach - 1) / conv.stride[d] + 1;
  }
  const int64_t width = (conv.channels + kBlock - 1) / kBlock * kBlock;
  const auto input = small_integers(conv.batch * conv.size[0] * conv.size[1] * conv.channels, random);
  const auto weights = small_integers(conv.taps() * width, random), bias = small_integers(width, random);
  conv.input = input.data(), conv.weights = weights.data(), conv.bias = bias.data();
  conv.filters = conv.channels, conv.low = -3, conv.high = 20;
  for (Isa isa : levels()) {
    std::vector<float> output(conv.pixels() * conv.channels);
    conv.output = output.data();
    for (int64_t row = conv.batch * conv.out_size[0]; row-- > 0;) OF_ISA(isa, depthwise_row)(conv, row);
    bool good = true;
    for (size_t i = 0; i < output.size(); ++i) {
      const int64_t c = i % conv.channels, pixel = i / conv.channels, column = pixel % conv.out_size[1];
      const int64_t row = pixel / conv.out_size[1] % conv.out_size[0];
      const int64_t image = pixel / conv.out_size[1] / conv.out_size[0];
      double sum = bias[c];
      for (int64_t tap = 0; tap < conv.taps(); ++tap) {
        const int64_t y = row * conv.stride[0] - conv.padding[0] + tap / conv.kernel[1] * conv.dilation[0];
        const int64_t x = column * conv.stride[1] - conv.padding[1] + tap % conv.kernel[1] * conv.dilation[1];
        if (y < 0 || y >= conv.size[0] || x < 0 || x >= conv.size[1]) continue;
        sum += input[((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels + c] * weights[tap * width + c];
      }
      good &= output[i] == std::fmin(std::fmax(sum, -3), 20);
    }
    expect(good, std::string("depthwise conv ") + isa_name(isa) + " " + std::to_string(conv.channels));
  }
}

static void check_depthwise_convs(std::mt19937& random) {
  for (int64_t channels : {1, 4, 7, 8, 9, 16, 17, 33}) {
    for (int64_t kernel : {1, 3, 5}) {
      for (int64_t stride : {1, 2}) {
        for (int64_t dilation : {1, 3}) {
          check_depthwise({.batch = 2,
                           .channels = channels,
                           .size = {13, 21},
                           .kernel = {kernel, 3},
                           .stride = {stride, 1},
                           .padding = {kernel / 2, stride + 1},
                           .dilation = {1, dilation}},
                          random);
        }
      }
    }
  }
}

int main() {
  std::mt19937 random(1);
  // One less, the same and one more than a vector, a panel and a tile of columns, of rows, and a block of weights.
  const std::vector<int64_t> filters = {1, 2, 3, 15, 16, 17, 33, 63, 64, 65, 129};
  const std::vector<int64_t> sizes = {1, 2, 15, 16, 17, 27, 255, 256, 257};
  for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (size_t i = 0; i < filters.size(); ++i) {
      check_scores({{filters[i], sizes[i % sizes.size()]}, {filters[(i + 3) % 6], sizes[(i + 5) % 6]}}, dtype, random);
    }
    for (bool first_step : {false, true}) check_optimizers(dtype, first_step, random);
    check_joins(dtype, random);
  }
  for (int64_t n : {191, 192, 193, 200}) check_scores({{n, 3}}, DType::float32, random);
  check_scores({{3, 0}, {0, 5}, {2, 2}}, DType::float32, random);
  check_convs(random);
  check_depthwise_convs(random);
  check_single_criteria(random);
  check_not_finite(random);
  check_selection();
  if (failures == 0) std::printf("all instruction sets up to %s: right\n", isa_name(current_isa()));
  return failures != 0;
}
