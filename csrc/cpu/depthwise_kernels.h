// A 2d convolution of each channel with a kernel of its own, channels innermost, then a clamp; compiled once per
// instruction set (vector.h). Each output is summed tap by tap, whatever the batch and the number of threads.
#include "cpu/conv_tile.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

constexpr int kRowPixels = 6;  // side by side, so that a vector of weights is loaded once for all

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

// `count` channels from c on, of kPixels outputs of a row that have the same taps; input: of the first output's patch.
// kWhole: they fill a vector.
template <int kPixels, bool kWhole>
inline void sum_vector(const Conv& conv, const float* input, Taps rows, Taps columns, float* output, int64_t c,
                       int64_t count) {
  const int64_t width = (conv.channels + kBlock - 1) / kBlock * kBlock;
  const int64_t step = conv.stride[1] * conv.channels;  // from an output's patch to the next one's
  Vec sums[kPixels];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) sums[p] = load(conv.bias + c);
  for (int64_t h = rows.first; h < rows.last; ++h) {
    for (int64_t w = columns.first; w < columns.last; ++w) {
      const Vec weight = load(conv.weights + (h * conv.kernel[1] + w) * width + c);
      const float* x = input + (h * conv.dilation[0] * conv.size[1] + w * conv.dilation[1]) * conv.channels + c;
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p, x += step) sums[p] += (kWhole ? load(x) : load_some(x, count)) * weight;
    }
  }
  const Vec low = broadcast(conv.low), high = broadcast(conv.high);
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    const Vec sum = clamp_to(sums[p], low, high);
    kWhole ? store(output + p * conv.channels + c, sum) : store_some(output + p * conv.channels + c, sum, count);
  }
}

template <int kPixels>
void sum_channels(const Conv& conv, const float* input, Taps rows, Taps columns, float* output) {
  int64_t c = 0;
  for (; c + kLanes <= conv.channels; c += kLanes) {
    sum_vector<kPixels, true>(conv, input, rows, columns, output, c, kLanes);
  }
  if (c < conv.channels) sum_vector<kPixels, false>(conv, input, rows, columns, output, c, conv.channels - c);
}

// One row of the output.
void depthwise_row(const Conv& conv, int64_t number) {
  const int64_t image = number / conv.out_size[0], row = number % conv.out_size[0];
  const Taps rows = taps_inside(conv, 0, row);
  const int64_t y = row * conv.stride[0] - conv.padding[0];
  float* output = conv.output + number * conv.out_size[1] * conv.channels;
  const auto all_inside = [&](int64_t column) {
    const Taps taps = taps_inside(conv, 1, column);
    return taps.first == 0 && taps.last == conv.kernel[1];
  };
  for (int64_t column = 0; column < conv.out_size[1];) {
    const int64_t x = column * conv.stride[1] - conv.padding[1];
    const float* input = conv.input + ((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels;
    const Taps columns = taps_inside(conv, 1, column);
    const int64_t end = column + kRowPixels;
    if (end <= conv.out_size[1] && all_inside(column) && all_inside(end - 1)) {
      sum_channels<kRowPixels>(conv, input, rows, columns, output + column * conv.channels);
      column = end;
    } else {
      sum_channels<1>(conv, input, rows, columns, output + column * conv.channels);
      ++column;
    }
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void depthwise_row(const Conv&, int64_t) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
