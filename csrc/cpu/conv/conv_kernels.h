// The direct convolution of conv.h, compiled once per instruction set (vector.h).
#include "cpu/conv/conv_tile.h"
#include "cpu/conv/pixel_order.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

constexpr int64_t kFewWeights = 1 << 15;  // numbers that the nearest caches hold

ConvTasks conv_tasks(const Conv& conv, int64_t tiles, int threads) {
  const int64_t strips = strip_count(conv), wanted = 8 * threads;
  const int64_t numbers = conv.channels + conv.filters;  // of one pixel; a range's should fit the second-level cache
  const int64_t range = std::clamp<int64_t>(65536 / numbers, 48, 256) / kTilePixels;
  // By pixels, which the layer before has left in the caches of the same threads, unless the weights are what is read.
  const bool by_pixels = conv.filters * conv.taps() * conv.group_channels() < 2 * conv.numbers();
  const int64_t few = by_pixels ? 2 : 4;  // tiles of a task, where there are not many
  ConvTasks tasks = {std::max((tiles + range - 1) / range, std::min(wanted, (tiles + few - 1) / few)), 1, by_pixels};
  if (tasks.tile_ranges < wanted) tasks.filter_ranges = std::min(strips, (wanted - 1) / tasks.tile_ranges + 1);
  if (tasks.count() < wanted) tasks.tile_ranges = std::min(tiles, (wanted - 1) / tasks.filter_ranges + 1);
  return tasks;
}

// What all strips of a task need to know of an output pixel, beside where its patch starts in the input.
struct Spot {
  int64_t row, column;  // of that start, in the padding perhaps
  int64_t out;          // the pixel's number in the output
};

struct TileStart {
  int64_t first;  // the tile's first pixel; the next tile's begins where it ends
  bool inside;
};

// The pixels of a task.
struct Spots {
  std::vector<Run> starts;
  std::vector<Spot> spots;
  std::vector<TileStart> tiles;
};

// Whether output pixel i is made of input pixel i alone: all lie in a row, tile by tile.
inline bool is_pointwise(const Conv& conv) {
  return conv.taps() == 1 && conv.stride[0] == 1 && conv.stride[1] == 1 && conv.padding[0] == 0 && conv.padding[1] == 0;
}

// The pixels of a range of tiles.
void find_spots(const Conv& conv, const PixelOrder& order, int64_t first_tile, int64_t last_tile, Spots& found) {
  std::vector<Run>& starts = found.starts;
  std::vector<Spot>& spots = found.spots;
  std::vector<TileStart>& tiles = found.tiles;
  starts.clear(), spots.clear(), tiles.clear();
  if (is_pointwise(conv)) {  // without the divisions of the walk, which take as long as the sums of few channels
    const int64_t first = conv.pixels() * first_tile / order.tiles();
    for (int64_t tile = first_tile; tile <= last_tile; ++tile) {
      tiles.push_back({conv.pixels() * tile / order.tiles() - first, true});
    }
    starts.resize(tiles.back().first), spots.resize(tiles.back().first);
    int64_t row = first / conv.out_size[1], column = first % conv.out_size[1];
    for (int64_t i = 0; i < tiles.back().first; ++i) {
      starts[i] = {conv.input + (first + i) * conv.channels};
      spots[i].out = row * conv.out_pitch + column;
      if (++column == conv.out_size[1]) column = 0, ++row;
    }
    return;
  }
  order.walk(
      first_tile, last_tile, [&](bool inside) { tiles.push_back({static_cast<int64_t>(spots.size()), inside}); },
      [&](int64_t image, int64_t row, int64_t column, int64_t count) {
        const int64_t y = row * conv.stride[0] - conv.padding[0], x = column * conv.stride[1] - conv.padding[1];
        const float* input = conv.input + ((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels;
        const int64_t out = (image * conv.out_size[0] + row) * conv.out_pitch + column;
        for (int64_t i = 0; i < count; ++i) {
          starts.push_back({input + i * conv.stride[1] * conv.channels});
          spots.push_back({y, x + i * conv.stride[1], out + i});
        }
      });
  tiles.push_back({static_cast<int64_t>(spots.size()), false});
}

// The runs of a tile inside the image; returns their number. A run is a row of the kernel where that lies side by side
// in the input.
int64_t runs_inside(const Conv& conv, const Run* starts, int pixels, Run* runs, Place* places) {
  int64_t count = 0;
  for (int64_t h = 0; h < conv.kernel[0]; ++h) {
    for (int64_t w = 0; w < conv.kernel[1]; w += conv.row_taps(), ++count) {
      const int64_t shift = (h * conv.dilation[0] * conv.size[1] + w * conv.dilation[1]) * conv.channels;
      for (int p = 0; p < pixels; ++p) (runs++)->input = starts[p].input + shift;
      places[count].weights = (h * conv.kernel[1] + w) * conv.group_channels() * kBlock;
    }
  }
  return count;
}

// The same near the border, where a run is a tap; taps that no pixel has are left out.
int64_t runs_at_border(const Conv& conv, const Run* starts, const Spot* spots, int pixels, Run* runs, Place* places) {
  int64_t count = 0;
  for (int64_t h = 0; h < conv.kernel[0]; ++h) {
    for (int64_t w = 0; w < conv.kernel[1]; ++w) {
      const int64_t down = h * conv.dilation[0], right = w * conv.dilation[1];
      const int64_t shift = (down * conv.size[1] + right) * conv.channels;
      bool any = false;
      for (int p = 0; p < pixels; ++p) {
        const int64_t row = spots[p].row + down, column = spots[p].column + right;
        const bool inside = row >= 0 && row < conv.size[0] && column >= 0 && column < conv.size[1];
        runs[p].input = inside ? starts[p].input + shift : conv.zeros;
        any |= inside;
      }
      if (!any) continue;
      places[count++].weights = (h * conv.kernel[1] + w) * conv.group_channels() * kBlock;
      runs += pixels;
    }
  }
  return count;
}

void conv_task(const Conv& shared, const PixelOrder& order, const ConvTasks& tasks, int64_t task) {
  const Conv conv = shared;  // the original lies among variables that another thread writes
  const int64_t filter_range = tasks.filter_range(task), tile_range = tasks.tile_range(task);
  static thread_local Spots found;
  find_spots(conv, order, order.tiles() * tile_range / tasks.tile_ranges,
             order.tiles() * (tile_range + 1) / tasks.tile_ranges, found);
  const std::vector<Run>& starts = found.starts;
  const std::vector<Spot>& spots = found.spots;
  const std::vector<TileStart>& tiles = found.tiles;
  static thread_local std::vector<Strip> strips;
  strips.clear();
  for (int64_t s = strip_count(conv) * filter_range / tasks.filter_ranges;
       s < strip_count(conv) * (filter_range + 1) / tasks.filter_ranges; ++s) {
    strips.push_back(strip_of(conv, s));
  }
  static thread_local std::vector<Run> runs;
  static thread_local std::vector<Place> places;
  runs.resize(conv.taps() * kTilePixels), places.resize(conv.taps());

  alignas(64) float sums[kTilePixels][kTileVectors * kLanes + kLanes];  // joins read one vector too far
  float* out[kTilePixels];
  Tile tile = {};
  tile.places = places.data(), tile.out = out, tile.activation = conv.activation;
  tile.block = conv.taps() * conv.group_channels() * kBlock;

  const auto compute = [&](int64_t number, const Strip& strip) {
    const int pixels = static_cast<int>(tiles[number + 1].first - tiles[number].first);
    const Spot* spot = spots.data() + tiles[number].first;
    const auto row_of = [&](int p) { return conv.output + spot[p].out * conv.out_channels(); };
    const bool direct =
        conv.landing == nullptr && strip.width == strip.vectors * kLanes + (strip.half ? kLanes / 2 : 0);
    for (int p = 0; p < pixels; ++p) {
      out[p] = direct ? row_of(p) + strip.first : sums[p];
      for (int64_t c = strip.out_first; c < strip.out_last; c += 16) {  // will be there when the sums are ready
        __builtin_prefetch(row_of(p) + c, 1);
      }
    }
    tile.weights = conv.weights + strip.packed / kBlock * tile.block, tile.bias = conv.bias + strip.packed;
    tile.channel = strip.channel;
    sum_tile_of(pixels, strip.vectors, strip.half, std::make_integer_sequence<int, kTilePixels>())(tile);
    if (direct) return;
    for (int p = 0; p < pixels; ++p) {
      put_row(conv, spot[p].out, sums[p], strip.first, strip.width, strip.out_first, strip.out_last);
    }
  };
  const auto prepare = [&](int64_t number) {
    const auto [first, inside] = tiles[number];
    const int pixels = static_cast<int>(tiles[number + 1].first - first);
    const Run* start = starts.data() + first;
    tile.length = conv.group_channels() * (inside ? conv.row_taps() : 1), tile.runs = runs.data();
    if (inside && conv.taps() == 1) {
      tile.runs = start, tile.count = 1, places[0].weights = 0;
    } else if (inside) {
      tile.count = runs_inside(conv, start, pixels, runs.data(), places.data());
    } else {
      tile.count = runs_at_border(conv, start, spots.data() + first, pixels, runs.data(), places.data());
    }
  };
  const int64_t count = static_cast<int64_t>(tiles.size()) - 1;
  const int64_t weights =
      static_cast<int64_t>(strips.size()) * kTileVectors * kLanes * conv.taps() * conv.group_channels();
  if (weights <= kFewWeights) {  // they stay in the nearest caches: each pixel is finished at once
    for (int64_t number = 0; number < count; ++number) {
      prepare(number);
      for (const Strip& strip : strips) compute(number, strip);
    }
  } else {
    for (const Strip& strip : strips) {
      for (int64_t number = 0; number < count; ++number) prepare(number), compute(number, strip);
    }
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
ConvTasks conv_tasks(const Conv&, int64_t, int) { return {}; }
void conv_task(const Conv&, const PixelOrder&, const ConvTasks&, int64_t) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
