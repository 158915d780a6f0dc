// A 2d convolution of narrow groups, most often of one channel and filter (depthwise), channels innermost, then an
// activation; compiled once per instruction set (vector.h). Each output is summed in one order, whatever the
// batch and the number of threads.
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
struct Span {
  const float* input;  // where the first one's patch starts, outside the image perhaps
  float* output;
  Taps rows;
  int64_t first, last;  // columns of the input that lie inside the image, counted from the patch's first
};

// One row of the kernel for kPixels outputs, and a vector of channels in groups of one; kInside: all columns lie inside
// the image.
template <int kPixels, int kColumns, int kStride, bool kInside>
inline void add_row(const float* x, int64_t channels, const float* weights, int64_t width, const Span& span,
                    Vec* sums) {
  Vec weight[kColumns];
#pragma GCC unroll 8
  for (int w = 0; w < kColumns; ++w) weight[w] = load(weights + w * width);
#pragma GCC unroll 32
  for (int column = 0; column < (kPixels - 1) * kStride + kColumns; ++column, x += channels) {
    const Vec v = kInside || (column >= span.first && column < span.last) ? load(x) : Vec{};
#pragma GCC unroll 8
    for (int w = 0; w < kColumns; ++w) {
      const int shift = column - w;
      if (shift < 0 || shift % kStride != 0 || shift / kStride >= kPixels) continue;
      sums[shift / kStride] = multiply_add(v, weight[w], sums[shift / kStride]);
    }
  }
}

// The same in groups of kWidth: each channel of a group goes to all filters of it, which are in its lanes. `x` is the
// first channel of the first group.
template <int kPixels, int kColumns, int kStride, bool kInside, int kWidth>
inline void add_row_of_groups(const float* x, int64_t channels, const float* weights, int64_t width, const Span& span,
                              Vec* sums) {
  constexpr int kPart = std::min(kWidth, kLanes), kReach = (kPixels - 1) * kStride + kColumns;
  IntVec from;
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = lane / kPart * kPart;
  for (int part = 0; part < kWidth; part += kPart) {
    Vec inputs[kReach];
#pragma GCC unroll 32
    for (int column = 0; column < kReach; ++column) {
      const bool there = kInside || (column >= span.first && column < span.last);
      inputs[column] = there ? load(x + column * channels + part) : Vec{};
    }
#pragma GCC unroll 1
    for (int c = 0; c < kPart; ++c) {
      Vec weight[kColumns];
#pragma GCC unroll 8
      for (int w = 0; w < kColumns; ++w) weight[w] = load(weights + (w * kWidth + part + c) * width);
#pragma GCC unroll 32
      for (int column = 0; column < kReach; ++column) {
        const Vec v = __builtin_shuffle(inputs[column], from + c);
#pragma GCC unroll 8
        for (int w = 0; w < kColumns; ++w) {
          const int shift = column - w;
          if (shift < 0 || shift % kStride != 0 || shift / kStride >= kPixels) continue;
          sums[shift / kStride] = multiply_add(v, weight[w], sums[shift / kStride]);
        }
      }
    }
  }
}

// add_row for any kernel, and up to a vector of channels.
template <int kPixels, bool kInside>
inline void add_any_row(const Conv& conv, const float* x, const float* weights, int64_t width, int64_t count,
                        const Span& span, Vec* sums) {
  for (int64_t w = 0; w < conv.kernel[1]; ++w) {
    const Vec weight = load(weights + w * width);
    int64_t column = w * conv.dilation[1];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p, column += conv.stride[1]) {
      if (kInside || (column >= span.first && column < span.last)) {
        sums[p] = multiply_add(load_some(x + column * conv.channels, count), weight, sums[p]);
      }
    }
  }
}

// kColumns and kStride: the kernel's columns and its stride, undilated; or 0, for any; kWidth: channels of a group. The
// channels go by vectors: the last one begins where it ends with them, and computes a few for the second time.
template <int kPixels, int kColumns, int kStride, bool kInside, int kWidth>
void sum_span(const Conv& conv, const Span& span) {
  const int64_t width = (conv.filters + kBlock - 1) / kBlock * kBlock;
  const int64_t count = std::min<int64_t>(kLanes, conv.channels);
  const Vec low = broadcast(conv.activation.low), high = broadcast(conv.activation.high);
  for (int64_t next = 0; next < conv.channels; next += kLanes) {
    const int64_t c = std::min(next, conv.channels - count);
    Vec sums[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) sums[p] = load_some(conv.bias + c, count);
    for (int64_t h = span.rows.first; h < span.rows.last; ++h) {
      const float* row = span.input + h * conv.dilation[0] * conv.size[1] * conv.channels + c;
      const float* weights = conv.weights + h * conv.kernel[1] * kWidth * width + c;
      if constexpr (kWidth > 1) {
        row -= c % kWidth;
        add_row_of_groups<kPixels, kColumns, kStride, kInside, kWidth>(row, conv.channels, weights, width, span, sums);
      } else if constexpr (kColumns > 0) {
        add_row<kPixels, kColumns, kStride, kInside>(row, conv.channels, weights, width, span, sums);
      } else {
        add_any_row<kPixels, kInside>(conv, row, weights, width, count, span, sums);
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      const Vec sum = clamp_to(sums[p], low, high);
      kColumns > 0 ? store(span.output + p * conv.filters + c, sum)
                   : store_some(span.output + p * conv.filters + c, sum, count);
    }
  }
}

typedef void (*SumSpan)(const Conv&, const Span&);

// [pixels - 1], for the commonest kernels and for all; in groups of 1, 4, 8 and 16.
template <int... kPixels>
SumSpan sum_span_of(const Conv& conv, int pixels, bool inside, std::integer_sequence<int, kPixels...>) {
#define MFP_SPANS(columns, stride, width)                                                                          \
  {                                                                                                                \
    {sum_span<kPixels + 1, columns, stride, false, width>, sum_span<kPixels + 1, columns, stride, true, width>}... \
  }
  static constexpr SumSpan any[][2] = MFP_SPANS(0, 0, 1);
  // [stride - 1][pixels - 1][inside]
  static constexpr SumSpan three[][kRowPixels][2] = {MFP_SPANS(3, 1, 1), MFP_SPANS(3, 2, 1)};
  static constexpr SumSpan five[][kRowPixels][2] = {MFP_SPANS(5, 1, 1), MFP_SPANS(5, 2, 1)};
  static constexpr SumSpan of_4[][kRowPixels][2] = {MFP_SPANS(3, 1, 4), MFP_SPANS(3, 2, 4)};
  static constexpr SumSpan of_8[][kRowPixels][2] = {MFP_SPANS(3, 1, 8), MFP_SPANS(3, 2, 8)};
  static constexpr SumSpan of_16[][kRowPixels][2] = {MFP_SPANS(3, 1, 16), MFP_SPANS(3, 2, 16)};
#undef MFP_SPANS
  const int64_t stride = conv.stride[1], width = conv.group_channels();
  if (width > 1) return (width == 4 ? of_4 : width == 8 ? of_8 : of_16)[stride - 1][pixels - 1][inside];
  if (conv.channels >= kLanes && conv.dilation[1] == 1 && stride <= 2) {
    if (conv.kernel[1] == 3) return three[stride - 1][pixels - 1][inside];
    if (conv.kernel[1] == 5) return five[stride - 1][pixels - 1][inside];
  }
  return any[pixels - 1][inside];
}

// Some rows of the output: spans of like size, and for each of them all channels, so that memory is read in order.
void grouped_rows(const Conv& shared, int64_t first, int64_t last) {
  const Conv conv = shared;
  const int64_t spans = (conv.out_size[1] + kRowPixels - 1) / kRowPixels;
  for (int64_t number = first; number < last; ++number) {
    const int64_t image = number / conv.out_size[0], row = number % conv.out_size[0];
    const int64_t y = row * conv.stride[0] - conv.padding[0];
    for (int64_t s = 0; s < spans; ++s) {
      const int64_t from = conv.out_size[1] * s / spans, pixels = conv.out_size[1] * (s + 1) / spans - from;
      const int64_t x = from * conv.stride[1] - conv.padding[1];
      const int64_t columns = (pixels - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1;
      const Span span = {conv.input + ((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels,
                         conv.output + (number * conv.out_size[1] + from) * conv.filters, taps_inside(conv, 0, row), -x,
                         conv.size[1] - x};
      const bool inside = span.first <= 0 && span.last >= columns;
      sum_span_of(conv, static_cast<int>(pixels), inside, std::make_integer_sequence<int, kRowPixels>())(conv, span);
      if (conv.activation.curve == Curve::none) continue;
      for (int64_t p = 0; p < pixels; ++p) {
        bend(span.output + p * conv.filters, conv.channels, conv.activation.curve);
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
void grouped_rows(const Conv&, int64_t, int64_t) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
