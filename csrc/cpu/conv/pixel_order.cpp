#include "cpu/conv/pixel_order.h"

#include <utility>

namespace mfp::cpu {

PixelOrder::PixelOrder(const Conv& conv, int tile_pixels) : batch_(conv.batch) {
  // Per dimension: segments of outputs that have the same taps; one of them has all.
  struct Segment {
    int64_t first, last;
    bool inside;
  };
  std::vector<Segment> segments[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t room = conv.size[d] - 1 + conv.padding[d] - (conv.kernel[d] - 1) * conv.dilation[d];
    const int64_t first = std::min((conv.padding[d] + conv.stride[d] - 1) / conv.stride[d], conv.out_size[d]);
    const int64_t last = room < 0 ? first : std::clamp(room / conv.stride[d] + 1, first, conv.out_size[d]);
    for (int64_t at = 0; at < conv.out_size[d]; at = segments[d].back().last) {
      const bool inside = at >= first && at < last;
      segments[d].push_back({at, inside ? last : at + 1, inside});
    }
  }
  std::vector<Group> border;
  for (const Segment& rows : segments[0]) {
    for (const Segment& columns : segments[1]) {
      const int64_t height = rows.last - rows.first, width = columns.last - columns.first;
      Group group = {rows.inside && columns.inside, rows.first, columns.first, width, batch_ * height * width, 0, 0};
      if (group.inside) {
        add(group, tile_pixels);
      } else if (rows.inside || columns.inside) {
        border.push_back(group);
      } else {
        corners_.push_back(static_cast<int32_t>(rows.first)), corners_.push_back(static_cast<int32_t>(columns.first));
      }
    }
  }
  for (const Group& group : border) add(group, tile_pixels);
  const int64_t corners = static_cast<int64_t>(corners_.size()) / 2;
  if (corners > 0) add({false, 0, 0, 0, batch_ * corners, 0, 0}, tile_pixels);
}

void PixelOrder::add(Group group, int tile_pixels) {
  group.tile = groups_.empty() ? 0 : tiles();
  group.tiles = (group.count + tile_pixels - 1) / tile_pixels;
  groups_.push_back(group);
}

}  // namespace mfp::cpu
