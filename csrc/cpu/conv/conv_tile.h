// The register tile that the convolutions are made of, and the strips of filters that it computes at once. Included
// once per instruction set (vector.h).
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/activate.h"
#include "cpu/conv/conv.h"
#include "cpu/join/join_row.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

// The register tile. Wide vectors: 8 pixels by 3 vectors, from up to three blocks of packed weights; others: what the
// 16 registers hold, inside one block.
constexpr int kTilePixels = tile_pixels(kLanes == 16 ? Isa::avx512 : kLanes == 8 ? Isa::avx2 : Isa::portable);
constexpr int kTileVectors = kLanes == 16 ? 3 : kBlock / kLanes;

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
  Activation activation;
  float* const* out;  // [pixels]
  int64_t channel;    // the group's first one in the input
};

typedef float HalfWide __attribute__((vector_size(2 * MFP_LANES)));
typedef float LooseHalfWide __attribute__((vector_size(2 * MFP_LANES), aligned(4), may_alias));

inline HalfWide load_half(const float* p) { return *reinterpret_cast<const LooseHalfWide*>(p); }
inline HalfWide lower_half(Vec v) {
  HalfWide half;
  std::memcpy(&half, &v, sizeof half);
  return half;
}

// kHalf: half a vector more, for filters that do not fill another one; alone for 8 filters, which takes 0.6 of the time
// of a vector that is half used (Zen 4, 1x1 convs).
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
    for (int p = 0; p < kPixels; ++p) run[p] = runs[p].input + tile.channel;
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
        if constexpr (kVectors == 0) {  // broadcast to half a vector, within the multiplication
          halves[p] += (run[p][c] - HalfWide{}) * half;
          continue;
        }
        const Vec x = broadcast(run[p][c]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[p][v] += x * w[v];
        if constexpr (kHalf) halves[p] += lower_half(x) * half;
      }
    }
  }
  if (tile.activation.curve != Curve::none) {
    constexpr int kRow = kVectors + kHalf;
    Vec bent[kPixels * kRow] = {};
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) bent[p * kRow + v] = sums[p][v];
      if constexpr (kHalf) std::memcpy(bent + p * kRow + kVectors, halves + p, sizeof halves[p]);
    }
    bend(reinterpret_cast<float*>(bent), kPixels * kRow * kLanes, tile.activation.curve);
    for (int p = 0; p < kPixels; ++p) {
      std::memcpy(tile.out[p], bent + p * kRow, (kVectors * kLanes + (kHalf ? kLanes / 2 : 0)) * sizeof(float));
    }
    return;
  }
  const Vec low = broadcast(tile.activation.low), high = broadcast(tile.activation.high);
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

// [pixels - 1][vectors][half]
template <int... kPixels>
SumTile sum_tile_of(int pixels, int vectors, bool half, std::integer_sequence<int, kPixels...>) {
  static constexpr int k2 = std::min(2, kTileVectors), k3 = std::min(3, kTileVectors), k4 = std::min(4, kTileVectors);
  static constexpr bool kHalf = kLanes == kBlock;
  static constexpr int k0 = kHalf ? 0 : 1;  // with a half only
  static constexpr SumTile table[][5][2] = {{{nullptr, sum_tile<kPixels + 1, k0, kHalf>},
                                             {sum_tile<kPixels + 1, 1, false>, sum_tile<kPixels + 1, 1, kHalf>},
                                             {sum_tile<kPixels + 1, k2, false>, sum_tile<kPixels + 1, k2, kHalf>},
                                             {sum_tile<kPixels + 1, k3, false>, sum_tile<kPixels + 1, k3, false>},
                                             {sum_tile<kPixels + 1, k4, false>, sum_tile<kPixels + 1, k4, false>}}...};
  return table[pixels - 1][vectors][half];
}

// Filters of a group that one register tile computes, and the channels of the output that it settles: the residual's up
// to where the next strip begins.
struct Strip {
  int64_t first, width;
  int64_t packed;   // the first one's place in the packed bias
  int64_t channel;  // the group's first one in the input
  int vectors;
  bool half;
  int64_t out_first, out_last;
};

inline int64_t strip_count(const Conv& conv) {
  const int64_t wide = kTileVectors * kLanes;
  return conv.groups * ((conv.group_filters() + wide - 1) / wide);
}

inline Strip strip_of(const Conv& conv, int64_t number) {
  const int64_t filters = conv.group_filters(), vectors = (filters + kLanes - 1) / kLanes;
  const int64_t count = strip_count(conv) / conv.groups, group = number / count;
  number %= count;
  int64_t begin = number * kTileVectors, end = std::min(begin + kTileVectors, vectors);
  if (kLanes == kBlock) begin = vectors * number / count, end = vectors * (number + 1) / count;  // of like width
  const int64_t width = std::min(end * kLanes, filters) - begin * kLanes;
  const int64_t first = group * filters + begin * kLanes, last = first + width;
  const int64_t packed = group * ((filters + kBlock - 1) / kBlock * kBlock) + begin * kLanes;
  Strip strip = {first, width, packed, group * conv.group_channels(), static_cast<int>(end - begin),
                 false, first, last};
  if (kLanes == kBlock && strip.width <= strip.vectors * kLanes - kLanes / 2) {
    --strip.vectors, strip.half = true;
  }
  if (conv.landing != nullptr) {
    strip.out_first = first == 0 ? 0 : conv.index[first];
    strip.out_last = last == conv.filters ? conv.residual_channels : conv.index[last];
  }
  return strip;
}

// What the register tiles have summed for one output pixel, some filters from `first` on, goes where it belongs: into
// channels out_first to out_last of the residual, or into the output. One vector more than `width` may be read.
inline void put_row(const Conv& conv, int64_t pixel, const float* sums, int64_t first, int64_t width, int64_t out_first,
                    int64_t out_last) {
  float* row = conv.output + pixel * conv.out_channels();
  if (conv.landing == nullptr) {
    std::memcpy(row + first, sums, width * sizeof(float));
  } else if (conv.relu) {
    join_row<Float, true, false>(row, row, sums, conv.landing, out_first, out_last);
  } else {
    join_row<Float, false, false>(row, row, sums, conv.landing, out_first, out_last);
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA
#endif
