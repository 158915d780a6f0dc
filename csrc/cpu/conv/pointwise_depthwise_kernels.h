// A 1x1 convolution and the depthwise one behind it in one pass; compiled once per instruction set (vector.h). The same
// sums in the same order as by the two kernels that do it.
#include <cstring>

#include "cpu/conv/conv_tile.h"
#include "cpu/conv/pixel_order.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

constexpr int64_t kBetween = 1 << 17;  // numbers between the two: half of a second-level cache

// A type of this namespace, for the vector that grows here (conv_tile.h).
struct Between {
  float value;
};

// Some rows of one image to `output`.
void pointwise_rows(const Conv& image, int64_t first, int64_t last, float* output) {
  Conv conv = image;
  conv.size[0] = conv.out_size[0] = last - first;
  conv.input += first * conv.size[1] * conv.channels, conv.output = output;
  conv_task(conv, PixelOrder(conv, kTilePixels), {1, 1}, 0);
}

void pointwise_depthwise_task(const PointwiseDepthwise& convs, int64_t task) {
  Conv pointwise = convs.pointwise, depthwise = convs.depthwise;
  const int64_t image = task / convs.bands, band = task % convs.bands, channels = depthwise.channels;
  const int64_t first = depthwise.out_size[0] * band / convs.bands;
  const int64_t last = depthwise.out_size[0] * (band + 1) / convs.bands;

  pointwise.batch = depthwise.batch = 1;
  pointwise.input += image * pointwise.size[0] * pointwise.size[1] * pointwise.channels;
  depthwise.output += image * depthwise.out_size[0] * depthwise.out_size[1] * channels;

  // Rows between the two get the padding left and right, so that all taps are inside.
  const int64_t width = depthwise.size[1], left = depthwise.padding[1];
  const int64_t columns =
      (depthwise.out_size[1] - 1) * depthwise.stride[1] + (depthwise.kernel[1] - 1) * depthwise.dilation[1] + 1;
  const int64_t pitch = std::max(columns, left + width), right = pitch - left - width;
  pointwise.out_pitch = depthwise.size[1] = pitch, depthwise.padding[1] = 0;
  const int64_t row_numbers = pitch * channels, stride = depthwise.stride[0];
  const int64_t reach = (depthwise.kernel[0] - 1) * depthwise.dilation[0] + 1;
  const int64_t step = std::clamp((kBetween / row_numbers - reach) / stride + 1, int64_t{1}, last - first);
  static thread_local std::vector<Between> space;
  const int64_t size = ((step - 1) * stride + reach) * row_numbers;
  if (static_cast<int64_t>(space.size()) < size) space.resize(size);
  float* between = &space[0].value;
  for (int64_t row = 0; row < size; row += row_numbers) {
    std::fill_n(between + row, left * channels, 0.0f);
    std::fill_n(between + row + (left + width) * channels, right * channels, 0.0f);
  }

  int64_t there = 0, until = 0;  // the rows that lie in `between`
  for (int64_t row = first; row < last; row += step) {
    const int64_t next = std::min(row + step, last), top = row * stride - depthwise.padding[0];
    const int64_t begin = std::clamp(top, int64_t{0}, depthwise.size[0]);
    const int64_t end = std::clamp(top + (next - row - 1) * stride + reach, begin, depthwise.size[0]);
    if (until > begin) {
      std::memmove(between, between + (begin - there) * row_numbers, (until - begin) * row_numbers * sizeof(float));
    } else {
      until = begin;
    }
    there = begin;
    if (end > until) pointwise_rows(pointwise, until, end, between + (until - there) * row_numbers + left * channels);
    until = std::max(until, end);
    depthwise.input = between - there * row_numbers;
    grouped_rows(depthwise, row, next);
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void pointwise_depthwise_task(const PointwiseDepthwise&, int64_t) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
