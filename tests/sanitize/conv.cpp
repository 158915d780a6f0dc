#include "cpu/conv/conv.h"

#include "common.h"
#include "cpu/conv/pixel_order.h"

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

static void run_conv(const Conv& conv, Isa isa, int threads) {
  if (conv.winograd) {
    const ConvTasks tasks = MFP_OF_ISA(isa, winograd_tasks)(conv, threads);
    for (int64_t i = tasks.count(); i-- > 0;) MFP_OF_ISA(isa, winograd_task)(conv, tasks, i);
    return;
  }
  const PixelOrder order(conv, tile_pixels(isa));
  const ConvTasks tasks = MFP_OF_ISA(isa, conv_tasks)(conv, order.tiles(), threads);
  for (int64_t i = tasks.count(); i-- > 0;) MFP_OF_ISA(isa, conv_task)(conv, order, tasks, i);
}

// One shape at every instruction set, alone and joined into a residual with every second channel; sums of small
// integers are exact, but for Winograd's.
static void check_conv(Conv conv, std::mt19937& random) {
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = conv.dilation[d] * (conv.kernel[d] - 1);
    conv.out_size[d] = (conv.size[d] + 2 * conv.padding[d] - reach - 1) / conv.stride[d] + 1;
  }
  conv.out_pitch = conv.out_size[1];
  const int64_t filters = conv.group_filters(), channels = conv.group_channels();
  const int64_t group_blocks = (filters + kBlock - 1) / kBlock, blocks = conv.groups * group_blocks;
  const auto input = small_integers(conv.batch * conv.size[0] * conv.size[1] * conv.channels, random);
  const auto weights = small_integers(blocks * kBlock * conv.taps() * channels, random);
  const auto bias = small_integers(blocks * kBlock, random);
  const std::vector<float> zeros(conv.channels);
  conv.input = input.data(), conv.weights = weights.data(), conv.bias = bias.data(), conv.zeros = zeros.data();
  std::vector<double> expected;
  for (int64_t pixel = 0; pixel < conv.pixels(); ++pixel) {
    const int64_t column = pixel % conv.out_size[1], row = pixel / conv.out_size[1] % conv.out_size[0];
    const int64_t image = pixel / conv.out_size[1] / conv.out_size[0];
    for (int64_t f = 0; f < conv.filters; ++f) {
      const int64_t group = f / filters, packed = group * group_blocks * kBlock + f % filters;
      double sum = bias[packed];
      for (int64_t tap = 0; tap < conv.taps(); ++tap) {
        const int64_t y = row * conv.stride[0] - conv.padding[0] + tap / conv.kernel[1] * conv.dilation[0];
        const int64_t x = column * conv.stride[1] - conv.padding[1] + tap % conv.kernel[1] * conv.dilation[1];
        if (y < 0 || y >= conv.size[0] || x < 0 || x >= conv.size[1]) continue;
        const int64_t at = ((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels + group * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t place = ((packed / kBlock * conv.taps() + tap) * channels + c) * kBlock + packed % kBlock;
          sum += input[at + c] * weights[place];
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
      check_conv({.batch = 1,
                  .channels = 3 * kernel,
                  .filters = 3 * (9 * kernel + padding),
                  .groups = 3,
                  .size = {9, 5},
                  .kernel = {kernel, 3},
                  .stride = {2, 1},
                  .padding = {padding, 2},
                  .dilation = {1, 1}},
                 random);
    }
  }
}

static void check_grouped(Conv conv, std::mt19937& random) {
  for (int d = 0; d < 2; ++d) {
    const int64_t reach = conv.dilation[d] * (conv.kernel[d] - 1);
    conv.out_size[d] = (conv.size[d] + 2 * conv.padding[d] - reach - 1) / conv.stride[d] + 1;
  }
  const int64_t width = (conv.channels + kBlock - 1) / kBlock * kBlock, group = conv.group_channels();
  const auto input = small_integers(conv.batch * conv.size[0] * conv.size[1] * conv.channels, random);
  const auto weights = small_integers(conv.taps() * group * width, random), bias = small_integers(width, random);
  conv.input = input.data(), conv.weights = weights.data(), conv.bias = bias.data();
  conv.filters = conv.channels, conv.activation.low = -3, conv.activation.high = 20;
  for (Isa isa : levels()) {
    std::vector<float> output(conv.pixels() * conv.channels);
    conv.output = output.data();
    const int64_t rows = conv.batch * conv.out_size[0], some = rows / 3;
    MFP_OF_ISA(isa, grouped_rows)(conv, some, rows);
    MFP_OF_ISA(isa, grouped_rows)(conv, 0, some);
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
        const int64_t at = ((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels + c - c % group;
        for (int64_t i = 0; i < group; ++i) sum += input[at + i] * weights[(tap * group + i) * width + c];
      }
      good &= output[i] == std::fmin(std::fmax(sum, -3), 20);
    }
    expect(good, std::string("grouped conv ") + isa_name(isa) + " " + std::to_string(conv.channels) + " by " +
                     std::to_string(group));
  }
}

static void check_grouped_convs(std::mt19937& random) {
  for (int64_t channels : {1, 4, 7, 8, 9, 16, 17, 33}) {
    for (int64_t kernel : {1, 3, 5}) {
      for (int64_t stride : {1, 2}) {
        for (int64_t dilation : {1, 3}) {
          check_grouped({.batch = 2,
                         .channels = channels,
                         .groups = channels,
                         .size = {13, 21},
                         .kernel = {kernel, kernel == 1 ? 4 : kernel},
                         .stride = {stride, channels % 2 ? 1 : stride},
                         .padding = {kernel / 2, stride + 1},
                         .dilation = {1, dilation}},
                        random);
        }
      }
    }
  }
  for (int64_t group : {4, 8, 16}) {
    for (int64_t channels : {int64_t{16}, int64_t{48}, 16 + group}) {
      for (int64_t stride : {1, 2}) {
        check_grouped({.batch = 2,
                       .channels = channels,
                       .groups = channels / group,
                       .size = {5, channels / 2},
                       .kernel = {channels == 48 ? 2 : 3, 3},
                       .stride = {2, stride},
                       .padding = {1, stride},
                       .dilation = {2, 1}},
                      random);
      }
    }
  }
}

// The two in one pass: what the two kernels above give, one after the other.
static void check_pointwise_depthwise(Conv pointwise, Conv depthwise, std::mt19937& random) {
  const int64_t channels = pointwise.filters, width = (channels + kBlock - 1) / kBlock * kBlock;
  pointwise.kernel[0] = pointwise.kernel[1] = pointwise.stride[0] = pointwise.stride[1] = 1;
  pointwise.dilation[0] = pointwise.dilation[1] = 1;
  depthwise.batch = pointwise.batch, depthwise.channels = depthwise.filters = depthwise.groups = channels;
  for (int d = 0; d < 2; ++d) {
    pointwise.out_size[d] = depthwise.size[d] = pointwise.size[d];
    const int64_t reach = depthwise.dilation[d] * (depthwise.kernel[d] - 1);
    depthwise.out_size[d] = (depthwise.size[d] + 2 * depthwise.padding[d] - reach - 1) / depthwise.stride[d] + 1;
  }
  pointwise.out_pitch = pointwise.out_size[1];
  const auto input = small_integers(pointwise.pixels() * pointwise.channels, random);
  const auto first = small_integers(width * pointwise.channels, random), first_bias = small_integers(width, random);
  const auto weights = small_integers(depthwise.taps() * width, random), bias = small_integers(width, random);
  const std::vector<float> zeros(pointwise.channels);
  pointwise.input = input.data(), pointwise.zeros = zeros.data();
  pointwise.weights = first.data(), pointwise.bias = first_bias.data(), pointwise.activation.low = 0;
  depthwise.weights = weights.data(), depthwise.bias = bias.data(), depthwise.activation.high = 50;
  std::vector<float> between(pointwise.pixels() * channels), expected(depthwise.pixels() * channels);
  pointwise.output = between.data(), depthwise.input = between.data(), depthwise.output = expected.data();
  run_conv(pointwise, Isa::portable, 1);
  portable::grouped_rows(depthwise, 0, depthwise.batch * depthwise.out_size[0]);
  pointwise.output = nullptr, depthwise.input = nullptr;
  for (Isa isa : levels()) {
    for (int threads : {1, 7}) {
      std::vector<float> output(expected.size());
      depthwise.output = output.data();
      const PointwiseDepthwise convs(pointwise, depthwise, threads);
      for (int64_t i = convs.tasks(); i-- > 0;) MFP_OF_ISA(isa, pointwise_depthwise_task)(convs, i);
      expect(output == expected,
             std::string("pointwise and depthwise conv ") + isa_name(isa) + " " + std::to_string(channels));
    }
  }
}

static void check_pointwise_depthwise_convs(std::mt19937& random) {
  for (int64_t channels : {1, 15, 16, 40, 97, 150}) {
    for (int64_t kernel : {1, 3, 5}) {
      for (int64_t stride : {1, 2}) {
        for (int64_t dilation : {1, 3}) {
          check_pointwise_depthwise({.batch = 2, .channels = 5, .filters = channels, .size = {31, 9}},
                                    {.kernel = {kernel, 3},
                                     .stride = {stride, 1},
                                     .padding = {kernel == 3 ? 40 : kernel / 2, 3},
                                     .dilation = {dilation, 1}},
                                    random);
        }
      }
    }
  }
  // Rows so long that they are computed one at a time.
  check_pointwise_depthwise({.batch = 1, .channels = 1, .filters = 40, .size = {4, 3300}},
                            {.kernel = {3, 3}, .stride = {1, 2}, .padding = {1, 1}, .dilation = {1, 1}}, random);
}

void check_all_convs(std::mt19937& random) {
  check_convs(random);
  check_grouped_convs(random);
  check_pointwise_depthwise_convs(random);
}
