// The arithmetic of conv.h, compiled once per instruction set (vector.h).
#include <algorithm>
#include <utility>

#include "cpu/conv.h"
#include "cpu/join_row.h"
#include "cpu/pixel_order.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

// The register tile. Wide vectors: 8 pixels by 3 vectors, from up to three blocks of packed weights; others: what the
// 16 registers hold, inside one block.
constexpr int kTilePixels = tile_pixels(kLanes == 16 ? Isa::avx512 : kLanes == 8 ? Isa::avx2 : Isa::portable);
constexpr int kTileVectors = kLanes == 16 ? 3 : kBlock / kLanes;
constexpr int64_t kFewWeights = 1 << 15;  // numbers that the nearest caches hold

// Types of this namespace, for the vectors that grow here: functions of a std::vector<float> compiled here could end
// up, by the linker's choice, in code for other processors.
struct Run {
  const float* input;
};

struct Place {
  int64_t weights;
};

// A pixel's patch comes in runs of numbers that lie side by side in the input and, [channel][16], in the weights.
struct Tile {
  const Run* runs;      // [count][pixels]: where they start in the input
  const Place* places;  // [count]: where their weights start
  int64_t count, length;
  const float* weights;  // of the first vector
  int64_t block;         // from one block of 16 filters to the next
  const float* bias;
  float low, high;
  float* const* out;  // [pixels]
};

typedef float HalfWide __attribute__((vector_size(2 * MFP_LANES)));
typedef float LooseHalfWide __attribute__((vector_size(2 * MFP_LANES), aligned(4), may_alias));

inline HalfWide load_half(const float* p) { return *reinterpret_cast<const LooseHalfWide*>(p); }
inline HalfWide lower_half(Vec v) {
  HalfWide half;
  std::memcpy(&half, &v, sizeof half);
  return half;
}

template <class V>
inline V clamp_to(V v, V low, V high) {  // NaN stays NaN
  v = low > v ? low : v;
  return v > high ? high : v;
}

// kHalf: half a vector more, for filters that do not fill another one.
template <int kPixels, int kVectors, bool kHalf>
void sum_tile(const Tile& tile) {
  Vec sums[kPixels][kVectors];
  HalfWide halves[kPixels];
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[p][v] = load(tile.bias + v * kLanes);
    if constexpr (kHalf) halves[p] = load_half(tile.bias + kVectors * kLanes);
  }
  const Run* runs = tile.runs;
  for (int64_t i = 0; i < tile.count; ++i, runs += kPixels) {
    const float* run[kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) run[p] = runs[p].input;
    const float* weights = tile.weights + tile.places[i].weights;
    for (int64_t c = 0; c < tile.length; ++c, weights += kBlock) {
      Vec w[kVectors];
      HalfWide half;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        w[v] = load(weights + v * kLanes / kBlock * tile.block + v * kLanes % kBlock);
      }
      if constexpr (kHalf) half = load_half(weights + kVectors * tile.block);
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) {
        const Vec x = broadcast(run[p][c]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[p][v] += x * w[v];
        if constexpr (kHalf) halves[p] += lower_half(x) * half;
      }
    }
  }
  const Vec low = broadcast(tile.low), high = broadcast(tile.high);
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(tile.out[p] + v * kLanes, clamp_to(sums[p][v], low, high));
    if constexpr (kHalf) {
      *reinterpret_cast<LooseHalfWide*>(tile.out[p] + kVectors * kLanes) =
          clamp_to(halves[p], lower_half(low), lower_half(high));
    }
  }
}

typedef void (*SumTile)(const Tile&);

// [pixels - 1][vectors - 1][half]
template <int... kPixels>
SumTile sum_tile_of(int pixels, int vectors, bool half, std::integer_sequence<int, kPixels...>) {
  static constexpr int k2 = std::min(2, kTileVectors), k3 = std::min(3, kTileVectors), k4 = std::min(4, kTileVectors);
  static constexpr bool kHalf = kLanes == kBlock;
  static constexpr SumTile table[][4][2] = {{{sum_tile<kPixels + 1, 1, false>, sum_tile<kPixels + 1, 1, kHalf>},
                                             {sum_tile<kPixels + 1, k2, false>, sum_tile<kPixels + 1, k2, kHalf>},
                                             {sum_tile<kPixels + 1, k3, false>, sum_tile<kPixels + 1, k3, false>},
                                             {sum_tile<kPixels + 1, k4, false>, sum_tile<kPixels + 1, k4, false>}}...};
  return table[pixels - 1][vectors - 1][half];
}

// Filters that one register tile computes, and the channels of the output that it settles: the residual's up to where
// the next strip begins.
struct Strip {
  int64_t first, width;
  int vectors;
  bool half;
  int64_t out_first, out_last;
};

int64_t strip_count(const Conv& conv) {
  const int64_t wide = kTileVectors * kLanes;
  return (conv.filters + wide - 1) / wide;
}

Strip strip_of(const Conv& conv, int64_t number) {
  const int64_t vectors = (conv.filters + kLanes - 1) / kLanes, count = strip_count(conv);
  int64_t begin = number * kTileVectors, end = std::min(begin + kTileVectors, vectors);
  if (kLanes == kBlock) begin = vectors * number / count, end = vectors * (number + 1) / count;  // of like width
  const int64_t first = begin * kLanes, last = std::min(end * kLanes, conv.filters);
  Strip strip = {first, last - first, static_cast<int>(end - begin), false, first, last};
  if (kLanes == kBlock && strip.vectors > 1 && strip.width <= strip.vectors * kLanes - kLanes / 2) {
    --strip.vectors, strip.half = true;
  }
  if (conv.landing != nullptr) {
    strip.out_first = first == 0 ? 0 : conv.index[first];
    strip.out_last = last == conv.filters ? conv.residual_channels : conv.index[last];
  }
  return strip;
}

ConvTasks conv_tasks(const Conv& conv, int64_t tiles, int threads) {
  const int64_t strips = strip_count(conv), wanted = 8 * threads;
  const int64_t numbers = conv.channels + conv.filters;  // of one pixel; a range's should fit the second-level cache
  const int64_t range = std::clamp<int64_t>(65536 / numbers, 48, 256) / kTilePixels;
  // First by pixels, which leaves the next layer's inputs in the caches of the same threads.
  ConvTasks tasks = {std::max((tiles + range - 1) / range, std::min(wanted, (tiles + 3) / 4)), 1};
  if (tasks.tile_ranges < wanted) tasks.filter_ranges = std::min(strips, (wanted - 1) / tasks.tile_ranges + 1);
  if (tasks.count() < wanted) tasks.tile_ranges = std::min(tiles, (wanted - 1) / tasks.filter_ranges + 1);
  return tasks;
}

// What all strips of a task need to know of an output pixel.
struct Spot {
  const float* input;   // where its patch starts, in the padding perhaps
  int64_t row, column;  // of that
  int64_t out;          // its number in the output
};

struct TileStart {
  int64_t first;  // the tile's first spot; the next tile's begins where it ends
  bool inside;
};

// The pixels of a range of tiles.
void find_spots(const Conv& conv, const PixelOrder& order, int64_t first_tile, int64_t last_tile,
                std::vector<Spot>& spots, std::vector<TileStart>& tiles) {
  spots.clear(), tiles.clear();
  order.walk(
      first_tile, last_tile, [&](bool inside) { tiles.push_back({static_cast<int64_t>(spots.size()), inside}); },
      [&](int64_t image, int64_t row, int64_t column) {
        const int64_t y = row * conv.stride[0] - conv.padding[0], x = column * conv.stride[1] - conv.padding[1];
        const float* input = conv.input + ((image * conv.size[0] + y) * conv.size[1] + x) * conv.channels;
        spots.push_back({input, y, x, (image * conv.out_size[0] + row) * conv.out_size[1] + column});
      });
  tiles.push_back({static_cast<int64_t>(spots.size()), false});
}

// The runs of a tile inside the image; returns their number. A run is a row of the kernel where that lies side by side
// in the input.
int64_t runs_inside(const Conv& conv, const Spot* spots, int pixels, Run* runs, Place* places) {
  int64_t count = 0;
  for (int64_t h = 0; h < conv.kernel[0]; ++h) {
    for (int64_t w = 0; w < conv.kernel[1]; w += conv.row_taps(), ++count) {
      const int64_t shift = (h * conv.dilation[0] * conv.size[1] + w * conv.dilation[1]) * conv.channels;
      for (int p = 0; p < pixels; ++p) (runs++)->input = spots[p].input + shift;
      places[count].weights = (h * conv.kernel[1] + w) * conv.channels * kBlock;
    }
  }
  return count;
}

// The same near the border, where a run is a tap; taps that no pixel has are left out.
int64_t runs_at_border(const Conv& conv, const Spot* spots, int pixels, Run* runs, Place* places) {
  int64_t count = 0;
  for (int64_t h = 0; h < conv.kernel[0]; ++h) {
    for (int64_t w = 0; w < conv.kernel[1]; ++w) {
      const int64_t down = h * conv.dilation[0], right = w * conv.dilation[1];
      const int64_t shift = (down * conv.size[1] + right) * conv.channels;
      bool any = false;
      for (int p = 0; p < pixels; ++p) {
        const int64_t row = spots[p].row + down, column = spots[p].column + right;
        const bool inside = row >= 0 && row < conv.size[0] && column >= 0 && column < conv.size[1];
        runs[p].input = inside ? spots[p].input + shift : conv.zeros;
        any |= inside;
      }
      if (!any) continue;
      places[count++].weights = (h * conv.kernel[1] + w) * conv.channels * kBlock;
      runs += pixels;
    }
  }
  return count;
}

void conv_task(const Conv& shared, const PixelOrder& order, const ConvTasks& tasks, int64_t task) {
  const Conv conv = shared;  // the original lies among variables that another thread writes
  const int64_t filter_range = task / tasks.tile_ranges, tile_range = task % tasks.tile_ranges;
  static thread_local std::vector<Spot> spots;
  static thread_local std::vector<TileStart> tiles;
  find_spots(conv, order, order.tiles() * tile_range / tasks.tile_ranges,
             order.tiles() * (tile_range + 1) / tasks.tile_ranges, spots, tiles);
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
  tile.runs = runs.data(), tile.places = places.data(), tile.out = out, tile.low = conv.low, tile.high = conv.high;
  tile.block = conv.taps() * conv.channels * kBlock;

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
    tile.weights = conv.weights + strip.first / kBlock * tile.block, tile.bias = conv.bias + strip.first;
    sum_tile_of(pixels, strip.vectors, strip.half, std::make_integer_sequence<int, kTilePixels>())(tile);
    if (direct) return;
    for (int p = 0; p < pixels; ++p) {
      if (conv.landing == nullptr) {
        std::memcpy(row_of(p) + strip.first, sums[p], strip.width * sizeof(float));
      } else if (conv.relu) {
        join_row<Float, true, false>(row_of(p), sums[p], conv.landing, strip.out_first, strip.out_last);
      } else {
        join_row<Float, false, false>(row_of(p), sums[p], conv.landing, strip.out_first, strip.out_last);
      }
    }
  };
  const auto prepare = [&](int64_t number) {
    const int pixels = static_cast<int>(tiles[number + 1].first - tiles[number].first);
    const Spot* spot = spots.data() + tiles[number].first;
    tile.length = tiles[number].inside ? conv.channels * conv.row_taps() : conv.channels;
    tile.count = tiles[number].inside ? runs_inside(conv, spot, pixels, runs.data(), places.data())
                                      : runs_at_border(conv, spot, pixels, runs.data(), places.data());
  };
  const int64_t count = static_cast<int64_t>(tiles.size()) - 1;
  const int64_t weights = static_cast<int64_t>(strips.size()) * kTileVectors * kLanes * conv.taps() * conv.channels;
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
