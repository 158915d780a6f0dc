// The convolution of conv.h by Winograd's F(4x4, 3x3), compiled once per instruction set (vector.h): 36 multiplications
// for 16 outputs of a 3x3 kernel instead of 144.
//
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308, with other points than theirs:
// 0, +-3/4, +-3/2 and infinity have a third of the rounding error of 0, +-1, +-2 (Barabasz et al., arXiv 1803.10986).
// For each of the 36 places of a transformed patch the sum over channels is a matrix product, made of the direct
// convolution's register tiles. The order of each sum depends on nothing but the layer.
#include "cpu/conv/conv_tile.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

constexpr int kPatch = kWinogradOut + 2, kPlaces = kPatch * kPatch;
constexpr float kA = 0.75f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;  // the points; all of these are exact

inline void transform_input(const Vec* d, Vec* out) {
  const Vec even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
  const Vec even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
  out[0] = kA2 * kB2 * d[0] + (d[4] - (kA2 + kB2) * d[2]);
  out[1] = even_a + odd_a, out[2] = even_a - odd_a;
  out[3] = even_b + odd_b, out[4] = even_b - odd_b;
  out[5] = kA2 * kB2 * d[1] + (d[5] - (kA2 + kB2) * d[3]);
}

inline void transform_output(const Vec* m, Vec* out) {
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  out[0] = m[0] + (even_a + even_b);
  out[1] = kA * odd_a + kB * odd_b;
  out[2] = kA2 * even_a + kB2 * even_b;
  out[3] = kA2 * kA * odd_a + (kB2 * kB * odd_b + m[5]);
}

// A type of this namespace, for the vectors that grow here (conv_tile.h).
struct Number {
  float value;
};

// Tiles of 4x4 outputs, image by image and row by row.
struct OutTile {
  int64_t image, row, column;
};

struct OutTiles {
  int64_t rows, columns, count;
  explicit OutTiles(const Conv& conv)
      : rows((conv.out_size[0] + kWinogradOut - 1) / kWinogradOut),
        columns((conv.out_size[1] + kWinogradOut - 1) / kWinogradOut),
        count(conv.batch * rows * columns) {}
  OutTile operator[](int64_t number) const {
    return {number / (rows * columns), number / columns % rows * kWinogradOut, number % columns * kWinogradOut};
  }
};

ConvTasks winograd_tasks(const Conv& conv, int threads) {
  // A range's transformed patches and sums: what the second-level cache holds, but enough tiles to use a weight often.
  const int64_t range = std::clamp<int64_t>(8192 / (conv.channels + conv.filters), 24, 96), least = 2 * kTilePixels;
  const int64_t tiles = OutTiles(conv).count;
  const int64_t ranges = std::max((tiles + range - 1) / range, std::min<int64_t>(threads, tiles / least));
  if (ranges >= threads) return {std::min(tiles, (ranges + threads - 1) / threads * threads), 1};
  return {ranges, std::min(strip_count(conv), (threads + ranges - 1) / ranges)};  // each transforms the patches anew
}

// `count` channels of one patch, from pixels[row * kPatch + column] on; kWhole: they fill a vector.
template <bool kWhole>
inline void transform_patch(const float* const* pixels, int64_t c, int64_t count, float* patch, int64_t step) {
  Vec half[kPatch][kPatch], d[kPatch], out[kPatch];
  for (int j = 0; j < kPatch; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kPatch; ++i) {
      const float* pixel = pixels[i * kPatch + j] + c;
      d[i] = kWhole ? load(pixel) : load_some(pixel, count);
    }
    transform_input(d, out);
#pragma GCC unroll 8
    for (int i = 0; i < kPatch; ++i) half[i][j] = out[i];
  }
  for (int i = 0; i < kPatch; ++i) {
    transform_input(half[i], out);
#pragma GCC unroll 8
    for (int j = 0; j < kPatch; ++j) store(patch + (i * kPatch + j) * step + c, out[j]);
  }
}

// Patches of the input to [place][tile][channels filled up to whole vectors]; places are `step` numbers apart.
void transform_patches(const Conv& conv, const OutTiles& tiles, int64_t first, int64_t last, float* patches,
                       int64_t step) {
  const int64_t width = (conv.channels + kLanes - 1) / kLanes * kLanes;
  for (int64_t number = first; number < last; ++number, patches += width) {
    const OutTile tile = tiles[number];
    const float* pixels[kPlaces];
    for (int i = 0; i < kPlaces; ++i) {
      const int64_t row = tile.row - conv.padding[0] + i / kPatch, column = tile.column - conv.padding[1] + i % kPatch;
      const bool inside = row >= 0 && row < conv.size[0] && column >= 0 && column < conv.size[1];
      const int64_t place = (tile.image * conv.size[0] + row) * conv.size[1] + column;
      pixels[i] = inside ? conv.input + place * conv.channels : conv.zeros;
    }
    int64_t c = 0;
    for (; c + kLanes <= conv.channels; c += kLanes) transform_patch<true>(pixels, c, kLanes, patches, step);
    if (c < conv.channels) transform_patch<false>(pixels, c, conv.channels - c, patches, step);
  }
}

// sums: [place][tile][width]; rows: [pixel of the tile][width and a vector more].
void transform_sums(const Conv& conv, const float* sums, int64_t step, const float* bias, int64_t width, float* rows) {
  const Vec low = broadcast(conv.activation.low), high = broadcast(conv.activation.high);
  for (int64_t f = 0; f < width; f += kLanes) {
    Vec half[kWinogradOut][kPatch], m[kPatch], out[kWinogradOut];
    for (int j = 0; j < kPatch; ++j) {
#pragma GCC unroll 8
      for (int i = 0; i < kPatch; ++i) m[i] = load(sums + (i * kPatch + j) * step + f);
      transform_output(m, out);
#pragma GCC unroll 8
      for (int i = 0; i < kWinogradOut; ++i) half[i][j] = out[i];
    }
    const Vec shift = load(bias + f);
    for (int i = 0; i < kWinogradOut; ++i) {
      transform_output(half[i], out);
#pragma GCC unroll 8
      for (int j = 0; j < kWinogradOut; ++j) {
        store(rows + (i * kWinogradOut + j) * (width + kLanes) + f, clamp_to(out[j] + shift, low, high));
      }
    }
  }
}

void winograd_task(const Conv& shared, const ConvTasks& tasks, int64_t task) {
  static constexpr float no_bias[kTileVectors * kLanes + kLanes] = {};
  const Conv conv = shared;  // the original lies among variables that another thread writes
  const OutTiles tiles(conv);
  const int64_t filter_range = tasks.filter_range(task), tile_range = tasks.tile_range(task);
  const int64_t first = tiles.count * tile_range / tasks.tile_ranges;
  const int64_t last = tiles.count * (tile_range + 1) / tasks.tile_ranges, count = last - first;
  const int64_t first_strip = strip_count(conv) * filter_range / tasks.filter_ranges;
  const int64_t last_strip = strip_count(conv) * (filter_range + 1) / tasks.filter_ranges;
  const Strip begin = strip_of(conv, first_strip), end = strip_of(conv, last_strip - 1);
  const int64_t filters = end.first + end.width - begin.first;
  const int64_t width = (filters + kBlock - 1) / kBlock * kBlock;
  const int64_t channels = (conv.channels + kLanes - 1) / kLanes * kLanes;

  // A line of a cache between places, which would otherwise share the few lines that powers of two fall on.
  const int64_t patch_step = count * channels + kBlock, sum_step = count * width + kBlock;
  static thread_local std::vector<Number> patch_space, sum_space, row_space;
  const auto space = [](std::vector<Number>& numbers, int64_t size) {
    if (static_cast<int64_t>(numbers.size()) < size) numbers.resize(size);
    return &numbers[0].value;
  };
  float* patches = space(patch_space, patch_step * kPlaces);
  float* sums = space(sum_space, sum_step * kPlaces);
  float* rows = space(row_space, kWinogradOut * kWinogradOut * (width + kLanes));
  transform_patches(conv, tiles, first, last, patches, patch_step);

  const Place place = {0};
  Run runs[kTilePixels];
  float* out[kTilePixels];
  Tile tile = {runs, &place, 1, conv.channels, nullptr, kPlaces * conv.channels * kBlock, no_bias, {}, out};
  const int64_t groups = (count + kTilePixels - 1) / kTilePixels;
  for (int64_t p = 0; p < kPlaces; ++p) {
    for (int64_t s = first_strip; s < last_strip; ++s) {
      const Strip strip = strip_of(conv, s);
      tile.weights = conv.weights + strip.first / kBlock * tile.block + p * conv.channels * kBlock;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t from = count * group / groups, to = count * (group + 1) / groups;
        for (int64_t t = from; t < to; ++t) {
          runs[t - from].input = patches + p * patch_step + t * channels;
          out[t - from] = sums + p * sum_step + t * width + strip.first - begin.first;
        }
        sum_tile_of(static_cast<int>(to - from), strip.vectors, strip.half,
                    std::make_integer_sequence<int, kTilePixels>())(tile);
      }
    }
  }

  for (int64_t t = 0; t < count; ++t) {
    transform_sums(conv, sums + t * width, sum_step, conv.bias + begin.first, width, rows);
    const OutTile at = tiles[first + t];
    for (int64_t i = 0; i < std::min<int64_t>(kWinogradOut, conv.out_size[0] - at.row); ++i) {
      for (int64_t j = 0; j < std::min<int64_t>(kWinogradOut, conv.out_size[1] - at.column); ++j) {
        const int64_t pixel = (at.image * conv.out_size[0] + at.row + i) * conv.out_size[1] + at.column + j;
        float* row = rows + (i * kWinogradOut + j) * (width + kLanes);
        if (conv.activation.curve != Curve::none) bend(row, filters, conv.activation.curve);
        put_row(conv, pixel, row, begin.first, filters, begin.out_first, end.out_last);
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
ConvTasks winograd_tasks(const Conv&, int) { return {}; }
void winograd_task(const Conv&, const ConvTasks&, int64_t) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
