// The order in which a convolution's output pixels are computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv/conv.h"

namespace mfp::cpu {

// How pixels are put into tiles: first those that have all their taps
// inside the image, then group by group those that lack the same ones, then the corners.
class PixelOrder {
 public:
  PixelOrder(const Conv& conv, int tile_pixels);
  int64_t tiles() const { return groups_.back().tile + groups_.back().tiles; }

  // For the tiles first to last - 1: calls begin_tile(inside), and pixels(image, row, column, count) for each stretch
  // of pixels side by side.
  template <class BeginTile, class VisitPixels>
  void walk(int64_t first, int64_t last, BeginTile begin_tile, VisitPixels pixels) const {
    for (const Group& group : groups_) {
      const int64_t from = std::max(first, group.tile), to = std::min(last, group.tile + group.tiles);
      for (int64_t tile = from; tile < to; ++tile) {
        begin_tile(group.inside);
        const int64_t begin = group.count * (tile - group.tile) / group.tiles;
        const int64_t end = group.count * (tile - group.tile + 1) / group.tiles;
        visit(group, begin, end, pixels);
      }
    }
  }

 private:
  struct Group {
    bool inside;                   // all taps of all pixels are
    int64_t row, column, columns;  // a rectangle; where columns is 0, the corners
    int64_t count, tile, tiles;    // pixels of all images, the first tile, tiles
  };

  template <class VisitPixels>
  void visit(const Group& group, int64_t begin, int64_t end, VisitPixels pixels) const {
    if (group.columns == 0) {
      for (int64_t i = begin; i < end; ++i)
        pixels(i % batch_, corners_[2 * (i / batch_)], corners_[2 * (i / batch_) + 1], 1);
      return;
    }
    const int64_t size = group.count / batch_;
    int64_t image = begin / size, row = begin % size / group.columns, column = begin % size % group.columns;
    for (int64_t i = begin; i < end;) {
      const int64_t count = std::min(end - i, group.columns - column);
      pixels(image, group.row + row, group.column + column, count);
      i += count, column = 0;
      if (++row * group.columns == size) row = 0, ++image;
    }
  }

  void add(Group group, int tile_pixels);

  int64_t batch_;
  std::vector<Group> groups_;
  std::vector<int32_t> corners_;  // row, column
};

}  // namespace mfp::cpu
