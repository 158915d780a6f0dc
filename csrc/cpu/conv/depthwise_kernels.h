// A 2d convolution of each channel with a kernel of its own, channels innermost, then a clamp; compiled once per
// instruction set (vector.h). Each output is summed tap by tap, whatever the batch and the number of threads.
#include "cpu/conv/conv_tile.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

constexpr int kRowPixels = kLanes == 16 ? 8 : 6;  // side by side, for which weights and inputs are loaded once

// Taps that lie inside the image, along one dimension.
struct Taps {
  int64_t first, last;
};

inline Taps taps_inside(const Conv& conv, int d, int64_t out) {
  const int64_t start = out * conv.stride[d] - conv.padding[d], dilation = conv.dilation[d];
  const int64_t first = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const int64_t last = start >= conv.size[d] ? 0 : (conv.size[d] - start + dilation - 1) / dilation;
  return {std::min(first, conv.kernel[d]), std::min(last, conv.kernel[d])};
}

// One row of the kernel for kPixels outputs that have all its columns, and `count` channels; kWhole: they fill a
// vector.
template <int kPixels, int kColumns, int kStride, bool kWhole>
inline void add_row(const float* x, int64_t channels, const float* weights, int64_t width, int64_t count, Vec* sums) {
  Vec weight[kColumns];
#pragma GCC unroll 8
  for (int w = 0; w < kColumns; ++w) weight[w] = load(weights + w * width);
#pragma GCC unroll 32
  for (int column = 0; column < (kPixels - 1) * kStride + kColumns; ++column, x += channels) {
    const Vec v = kWhole ? load(x) : load_some(x, count);
#pragma GCC unroll 8
    for (int w = 0; w < kColumns; ++w) {
      const int shift = column - w;
      if (shift >= 0 && shift % kStride == 0 && shift / kStride < kPixels) sums[shift / kStride] += v * weight[w];
    }
  }
}

// `count` channels from c on, of kPixels outputs of a row that have the same taps; input: of the first output's patch.
// kColumns and kStride: the kernel's columns, all of them inside, and the stride; or 0.
template <int kPixels, int kColumns, int kStride, bool kWhole>
void sum_pixels(const Conv& conv, const float* input, Taps rows, Taps columns, float* output, int64_t c,
                int64_t count) {
  const int64_t width = (conv.channels + kBlock - 1) / kBlock * kBlock;
  Vec sums[kPixels];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) sums[p] = load(conv.bias + c);
  for (int64_t h = rows.first; h < rows.last; ++h) {
    const float* row = input + h * conv.dilation[0] * conv.size[1] * conv.channels + c;
    const float* weights = conv.weights + h * conv.kernel[1] * width + c;
    if constexpr (kColumns > 0) {
      add_row<kPixels, kColumns, kStride, kWhole>(row, conv.channels, weights, width, count, sums);
      continue;
    }
    for (int64_t w = columns.first; w < columns.last; ++w) {
      const Vec weight = load(weights + w * width);
      const float* x = row + w * conv.dilation[1] * conv.channels;
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p, x += conv.stride[1] * conv.channels) sums[p] += load_some(x, count) * weight;
    }
  }
  const Vec low = broadcast(conv.low), high = broadcast(conv.high);
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    const Vec sum = clamp_to(sums[p], low, high);
    kWhole ? store(output + p * conv.channels + c, sum) : store_some(output + p * conv.channels + c, sum, count);
  }
}

typedef void (*SumPixels)(const Conv&, const float*, Taps, Taps, float*, int64_t, int64_t);

// [pixels - 1], for the commonest kernels and for all.
template <int... kPixels>
SumPixels sum_pixels_of(const Conv& conv, int pixels, bool inside, bool whole, std::integer_sequence<int, kPixels...>) {
  static constexpr SumPixels any[] = {sum_pixels<kPixels + 1, 0, 0, false>...};
  static constexpr SumPixels three[][2][2] = {
      {{sum_pixels<kPixels + 1, 3, 1, false>, sum_pixels<kPixels + 1, 3, 1, true>},
       {sum_pixels<kPixels + 1, 3, 2, false>, sum_pixels<kPixels + 1, 3, 2, true>}}...};
  static constexpr SumPixels five[][2] = {
      {sum_pixels<kPixels + 1, 5, 1, true>, sum_pixels<kPixels + 1, 5, 2, true>}...};
  const int64_t stride = conv.stride[1];
  if (!inside || conv.dilation[1] != 1 || stride > 2) return any[pixels - 1];
  if (conv.kernel[1] == 3) return three[pixels - 1][stride - 1][whole];
  return conv.kernel[1] == 5 && whole ? five[pixels - 1][stride - 1] : any[pixels - 1];
}

// `count` channels from c on of a row of the output.
void depthwise_vector(const Conv& conv, int64_t number, int64_t c, int64_t count) {
  const int64_t image = number / conv.out_size[0], row = number % conv.out_size[0];
  const Taps rows = taps_inside(conv, 0, row);
  const int64_t y = row * conv.stride[0] - conv.padding[0];
  const auto compute = [&](int64_t column, int pixels, Taps columns) {
    const int64_t x = column * conv.stride[1] - conv.padding[1];
    const float* input = conv.input + ((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels;
    float* output = conv.output + (number * conv.out_size[1] + column) * conv.channels;
    const bool inside = columns.first == 0 && columns.last == conv.kernel[1];
    sum_pixels_of(conv, pixels, inside, count == kLanes, std::make_integer_sequence<int, kRowPixels>())(
        conv, input, rows, columns, output, c, count);
  };
  int64_t first = 0, last = conv.out_size[1];  // of the columns that have all taps
  const auto lacks = [&](int64_t column) {
    const Taps taps = taps_inside(conv, 1, column);
    return taps.first > 0 || taps.last < conv.kernel[1];
  };
  for (; first < last && lacks(first); ++first) compute(first, 1, taps_inside(conv, 1, first));
  for (; last > first && lacks(last - 1); --last) compute(last - 1, 1, taps_inside(conv, 1, last - 1));
  const int64_t groups = (last - first + kRowPixels - 1) / kRowPixels;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t from = first + (last - first) * group / groups, to = first + (last - first) * (group + 1) / groups;
    compute(from, static_cast<int>(to - from), {0, conv.kernel[1]});
  }
}

// Some rows of the output, a vector of channels after the other: their inputs stay in the nearest cache from row to
// row.
void depthwise_rows(const Conv& shared, int64_t first, int64_t last) {
  const Conv conv = shared;
  for (int64_t c = 0; c < conv.channels; c += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, conv.channels - c);
    for (int64_t number = first; number < last; ++number) depthwise_vector(conv, number, c, count);
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void depthwise_rows(const Conv&, int64_t, int64_t) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
