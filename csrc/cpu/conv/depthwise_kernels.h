// A 2d convolution of each channel with a kernel of its own, channels innermost, then an activation; compiled once per
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

// Outputs of a row that are computed together.
struct Group {
  const float* input;  // where the first one's patch starts, outside the image perhaps
  float* output;
  Taps rows;
  int64_t first, last;  // columns of the input that lie inside the image, counted from the patch's first
};

// One row of the kernel for kPixels outputs, and a vector of channels; kInside: all columns lie inside the image.
template <int kPixels, int kColumns, int kStride, bool kInside>
inline void add_row(const float* x, int64_t channels, const float* weights, int64_t width, const Group& group,
                    Vec* sums) {
  Vec weight[kColumns];
#pragma GCC unroll 8
  for (int w = 0; w < kColumns; ++w) weight[w] = load(weights + w * width);
#pragma GCC unroll 32
  for (int column = 0; column < (kPixels - 1) * kStride + kColumns; ++column, x += channels) {
    const Vec v = kInside || (column >= group.first && column < group.last) ? load(x) : Vec{};
#pragma GCC unroll 8
    for (int w = 0; w < kColumns; ++w) {
      const int shift = column - w;
      if (shift < 0 || shift % kStride != 0 || shift / kStride >= kPixels) continue;
      sums[shift / kStride] = multiply_add(v, weight[w], sums[shift / kStride]);
    }
  }
}

// The same for any kernel, and up to a vector of channels.
template <int kPixels, bool kInside>
inline void add_any_row(const Conv& conv, const float* x, const float* weights, int64_t width, int64_t count,
                        const Group& group, Vec* sums) {
  for (int64_t w = 0; w < conv.kernel[1]; ++w) {
    const Vec weight = load(weights + w * width);
    int64_t column = w * conv.dilation[1];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p, column += conv.stride[1]) {
      if (kInside || (column >= group.first && column < group.last)) {
        sums[p] = multiply_add(load_some(x + column * conv.channels, count), weight, sums[p]);
      }
    }
  }
}

// kColumns and kStride: the kernel's columns and its stride, undilated; or 0, for any. The channels go by vectors: the
// last one begins where it ends with them, and computes a few for the second time.
template <int kPixels, int kColumns, int kStride, bool kInside>
void sum_group(const Conv& conv, const Group& group) {
  const int64_t width = (conv.filters + kBlock - 1) / kBlock * kBlock;
  const int64_t count = std::min<int64_t>(kLanes, conv.channels);
  const Vec low = broadcast(conv.activation.low), high = broadcast(conv.activation.high);
  for (int64_t next = 0; next < conv.channels; next += kLanes) {
    const int64_t c = std::min(next, conv.channels - count);
    Vec sums[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) sums[p] = load_some(conv.bias + c, count);
    for (int64_t h = group.rows.first; h < group.rows.last; ++h) {
      const float* row = group.input + h * conv.dilation[0] * conv.size[1] * conv.channels + c;
      const float* weights = conv.weights + h * conv.kernel[1] * width + c;
      if constexpr (kColumns > 0) {
        add_row<kPixels, kColumns, kStride, kInside>(row, conv.channels, weights, width, group, sums);
      } else {
        add_any_row<kPixels, kInside>(conv, row, weights, width, count, group, sums);
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      const Vec sum = clamp_to(sums[p], low, high);
      kColumns > 0 ? store(group.output + p * conv.filters + c, sum)
                   : store_some(group.output + p * conv.filters + c, sum, count);
    }
  }
}

typedef void (*SumGroup)(const Conv&, const Group&);

// [pixels - 1], for the commonest kernels and for all.
template <int... kPixels>
SumGroup sum_group_of(const Conv& conv, int pixels, bool inside, std::integer_sequence<int, kPixels...>) {
  static constexpr SumGroup any[][2] = {{sum_group<kPixels + 1, 0, 0, false>, sum_group<kPixels + 1, 0, 0, true>}...};
  static constexpr SumGroup three[][2][2] = {
      {{sum_group<kPixels + 1, 3, 1, false>, sum_group<kPixels + 1, 3, 1, true>},
       {sum_group<kPixels + 1, 3, 2, false>, sum_group<kPixels + 1, 3, 2, true>}}...};
  static constexpr SumGroup five[][2][2] = {
      {{sum_group<kPixels + 1, 5, 1, false>, sum_group<kPixels + 1, 5, 1, true>},
       {sum_group<kPixels + 1, 5, 2, false>, sum_group<kPixels + 1, 5, 2, true>}}...};
  const int64_t stride = conv.stride[1];
  if (conv.channels >= kLanes && conv.dilation[1] == 1 && stride <= 2) {
    if (conv.kernel[1] == 3) return three[pixels - 1][stride - 1][inside];
    if (conv.kernel[1] == 5) return five[pixels - 1][stride - 1][inside];
  }
  return any[pixels - 1][inside];
}

// Some rows of the output: groups of like size, and for each of them all channels, so that memory is read in order.
void depthwise_rows(const Conv& shared, int64_t first, int64_t last) {
  const Conv conv = shared;
  const int64_t groups = (conv.out_size[1] + kRowPixels - 1) / kRowPixels;
  for (int64_t number = first; number < last; ++number) {
    const int64_t image = number / conv.out_size[0], row = number % conv.out_size[0];
    const int64_t y = row * conv.stride[0] - conv.padding[0];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = conv.out_size[1] * g / groups, pixels = conv.out_size[1] * (g + 1) / groups - from;
      const int64_t x = from * conv.stride[1] - conv.padding[1];
      const int64_t columns = (pixels - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1;
      const Group group = {conv.input + ((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels,
                           conv.output + (number * conv.out_size[1] + from) * conv.filters, taps_inside(conv, 0, row),
                           -x, conv.size[1] - x};
      const bool inside = group.first <= 0 && group.last >= columns;
      sum_group_of(conv, static_cast<int>(pixels), inside, std::make_integer_sequence<int, kRowPixels>())(conv, group);
      if (conv.activation.curve == Curve::none) continue;
      for (int64_t p = 0; p < pixels; ++p) {
        bend(group.output + p * conv.filters, conv.channels, conv.activation.curve);
      }
    }
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
