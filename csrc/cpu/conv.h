// A 2d convolution with channels innermost, in one pass with what follows it: a clamp, or a join into a residual.
//
// It is a matrix product without a matrix of patches: a tile of up to 8 output pixels by 48 filters stays in registers,
// and for each tap of the kernel the pixels' input rows are found by pointer. Pixels near the border are put into tiles
// with others that lack the same taps, and those taps are skipped. Each output is summed in one order, whatever the
// batch, the tiles and the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace mfp::cpu {

constexpr int kBlock = 16;  // filters that lie side by side in the packed weights

struct Conv {
  const float* input;    // [batch, height, width, channels]
  const float* weights;  // [filters / 16, kernel height, kernel width, channels, 16]
  const float* bias;     // [filters rounded up to 16]
  const float* zeros;    // [channels]: a pixel of the padding
  float* output;         // [batch, out height, out width, filters], or the residual [..., residual channels]
  int64_t batch, channels, filters;
  int64_t size[2], out_size[2];  // height, width
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  float low, high;  // the output is clamped between them

  // residual[:, index] += the convolution's result, then ReLU if asked; unused where landing is null.
  const uint16_t* landing;  // a bit per residual channel: whether the next filter lands there; and one word more
  const int64_t* index;     // [filters]
  int64_t residual_channels;
  bool relu;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t row_taps() const { return dilation[1] == 1 ? kernel[1] : 1; }  // how many lie side by side in the input
  int64_t out_channels() const { return landing == nullptr ? filters : residual_channels; }
  int64_t pixels() const { return batch * out_size[0] * out_size[1]; }
};

// The most output pixels of a register tile.
constexpr int tile_pixels(Isa isa) { return isa == Isa::avx512 ? 8 : isa == Isa::avx2 ? 6 : 4; }

// The order in which output pixels are computed, and how they are put into tiles: first those that have all their taps
// inside the image, then group by group those that lack the same ones, then the corners.
class PixelOrder {
 public:
  PixelOrder(const Conv& conv, int tile_pixels);
  int64_t tiles() const { return groups_.back().tile + groups_.back().tiles; }

  // Calls begin_tile(inside) and pixel(image, row, column) for the tiles first to last - 1.
  template <class BeginTile, class VisitPixel>
  void walk(int64_t first, int64_t last, BeginTile begin_tile, VisitPixel pixel) const {
    for (const Group& group : groups_) {
      const int64_t from = std::max(first, group.tile), to = std::min(last, group.tile + group.tiles);
      for (int64_t tile = from; tile < to; ++tile) {
        begin_tile(group.inside);
        const int64_t begin = group.count * (tile - group.tile) / group.tiles;
        const int64_t end = group.count * (tile - group.tile + 1) / group.tiles;
        visit(group, begin, end, pixel);
      }
    }
  }

 private:
  struct Group {
    bool inside;                   // all taps of all pixels are
    int64_t row, column, columns;  // a rectangle; where columns is 0, the corners
    int64_t count, tile, tiles;    // pixels of all images, the first tile, tiles
  };

  template <class VisitPixel>
  void visit(const Group& group, int64_t begin, int64_t end, VisitPixel pixel) const {
    if (group.columns == 0) {
      for (int64_t i = begin; i < end; ++i)
        pixel(i % batch_, corners_[2 * (i / batch_)], corners_[2 * (i / batch_) + 1]);
      return;
    }
    const int64_t size = group.count / batch_;
    int64_t image = begin / size, row = begin % size / group.columns, column = begin % size % group.columns;
    for (int64_t i = begin; i < end; ++i) {
      pixel(image, group.row + row, group.column + column);
      if (++column < group.columns) continue;
      column = 0;
      if (++row * group.columns == size) row = 0, ++image;
    }
  }

  void add(Group group, int tile_pixels);

  int64_t batch_;
  std::vector<Group> groups_;
  std::vector<int32_t> corners_;  // row, column
};

// The work is a grid of tasks: ranges of pixel tiles by ranges of filters.
struct ConvTasks {
  int64_t tile_ranges, filter_ranges;
  int64_t count() const { return tile_ranges * filter_ranges; }
};

// conv_tasks: a grid with enough tasks for the threads. conv_task: computes one of them.
#define MFP_DECLARE(isa)                                                                           \
  namespace isa {                                                                                  \
  ConvTasks conv_tasks(const Conv& conv, int64_t tiles, int threads);                              \
  void conv_task(const Conv& conv, const PixelOrder& order, const ConvTasks& tasks, int64_t task); \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
