// A 2d convolution with channels innermost, in one pass with what follows it: an activation, or a join into a
// residual.
//
// It is a matrix product without a matrix of patches: a tile of up to 8 output pixels by 48 filters stays in registers,
// and for each tap of the kernel the pixels' input rows are found by pointer. Pixels near the border are put into tiles
// with others that lack the same taps, and those taps are skipped. Each output is summed in one order, whatever the
// batch, the tiles and the number of threads; to skip a tap or to add zeros for it is the same where weights are
// finite.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/activation.h"
#include "cpu/isa.h"

namespace mfp::cpu {

constexpr int kBlock = 16;       // filters that lie side by side in the packed weights
constexpr int kWinogradOut = 4;  // by as many outputs at once

struct Conv {
  const float* input;    // [batch, height, width, channels]
  const float* weights;  // [groups, filters of a group / 16, kernel height, kernel width, channels of a group, 16];
                         // narrow groups: [height, width, channels of a group, channels]
  const float* bias;     // [groups, filters of a group rounded up to 16], or [channels]
  const float* zeros;    // [channels]: a pixel of the padding
  float* output;         // [batch, out height, out width, filters], or the residual [..., residual channels]
  int64_t batch, channels, filters;  // side by side in the input, in the output
  int64_t groups = 1;
  int64_t size[2], out_size[2];  // height, width
  int64_t out_pitch;             // pixels from one row of the output to the next, for a direct convolution
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  Activation activation;
  bool winograd;  // the weights are those of Winograd's F(4x4, 3x3): 6 by 6 of them, for a 3x3 kernel of stride 1

  // residual[:, index] += the convolution's result, then ReLU if asked; unused where landing is null.
  const uint16_t* landing;  // a bit per residual channel: whether the next filter lands there; and one word more
  const int64_t* index;     // [filters]
  int64_t residual_channels;
  bool relu;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_filters() const { return filters / groups; }
  int64_t numbers() const { return batch * size[0] * size[1] * channels; }  // of the input
  // How many lie side by side in the input.
  int64_t row_taps() const { return dilation[1] == 1 && groups == 1 ? kernel[1] : 1; }
  int64_t out_channels() const { return landing == nullptr ? filters : residual_channels; }
  int64_t pixels() const { return batch * out_size[0] * out_size[1]; }
};

// The most output pixels of a register tile.
constexpr int tile_pixels(Isa isa) { return isa == Isa::avx512 ? 8 : isa == Isa::avx2 ? 6 : 4; }

class PixelOrder;  // pixel_order.h

// The work is a grid of tasks: ranges of pixel tiles by ranges of filters, in the order in which threads take them.
struct ConvTasks {
  int64_t tile_ranges, filter_ranges;
  bool by_pixels;  // all filters of some pixels, then the next pixels
  int64_t count() const { return tile_ranges * filter_ranges; }
  int64_t tile_range(int64_t task) const { return by_pixels ? task / filter_ranges : task % tile_ranges; }
  int64_t filter_range(int64_t task) const { return by_pixels ? task % filter_ranges : task / tile_ranges; }
};

// A 1x1 convolution and the depthwise one that alone reads it, some rows of the output at a time: what lies between
// them stays in the caches, and is not written to memory.
struct PointwiseDepthwise {
  static constexpr int64_t kBand = 14;  // rows that are worth a task

  Conv pointwise, depthwise;
  int64_t bands;  // of an image's rows; between two of them rows are computed twice

  PointwiseDepthwise(const Conv& pointwise, const Conv& depthwise, int threads)
      : pointwise(pointwise), depthwise(depthwise) {
    const int64_t wanted = (threads + pointwise.batch - 1) / pointwise.batch;
    bands = std::max(std::min(wanted, depthwise.out_size[0] / kBand), int64_t{1});
  }
  int64_t tasks() const { return pointwise.batch * bands; }
};

// conv_tasks: a grid with enough tasks for the threads. conv_task: computes one of them. The same for winograd_, where
// the tiles are of 4x4 outputs. grouped_rows: some rows of the output, of all images.
#define MFP_DECLARE(isa)                                                                           \
  namespace isa {                                                                                  \
  ConvTasks conv_tasks(const Conv& conv, int64_t tiles, int threads);                              \
  void conv_task(const Conv& conv, const PixelOrder& order, const ConvTasks& tasks, int64_t task); \
  ConvTasks winograd_tasks(const Conv& conv, int threads);                                         \
  void winograd_task(const Conv& conv, const ConvTasks& tasks, int64_t task);                      \
  void grouped_rows(const Conv& conv, int64_t first, int64_t last);                                \
  void pointwise_depthwise_task(const PointwiseDepthwise& convs, int64_t task);                    \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
