// One launch that scores the filters of all layers and, if asked, selects and zeroes. docs/kernels.md has the drawing.
//
// The work is a numbered list of items, cut into segments: sums over rows, tiles of pairs (longest filters first), rows
// to zero. Persistent blocks draw the next number from a counter. A block only ever waits for items with lower numbers
// than its own, which are being worked on, so the launch makes progress with any number of blocks.
#pragma once

#include <string>
#include <vector>

#include "cuda/launch.h"

namespace mfp::cuda {

constexpr int kTile = 64;  // filters along each side of a tile of pairs

// Counters of the whole launch; then come two for each layer: arrivals, and arrivals of norms.
enum Counter : int32_t { kNextItem, kLayersDone, kNotFinite, kMaskReady, kBlocksDone, kNumCounters };

enum class Kind : int32_t { norm = 0, distance = 1, cosine_distance = 2, weighted_hybrid = 3, taylor = 4 };

struct Request {
  Kind kind;
  float exponent;
  int32_t channel;  // which partial sums it is made of; -1 for what one row gives: a norm, Kind::taylor
};

struct ScoredLayer {
  const void* weights;
  const void* gradients;  // laid out like the weights; null where no request is Kind::taylor
  int64_t filters;        // N
  int64_t filter_size;    // K
  int64_t offset;         // of its first filter among all filters
  int64_t slots;          // of its first partial sum in a channel: [tiles][tiles * kTile]
  DType dtype, gradient_dtype;
  int32_t num_pruned;
  int32_t index;       // of the layer in the table
  int32_t tiles;       // ceil(N / kTile)
  int32_t norm_items;  // arrivals after which its norms are there
  int32_t items;       // arrivals after which all its sums are there
  bool aligned;        // rows start at multiples of 16 bytes
};

enum class Step : int32_t { norms, pairs, powers, zero };

struct Segment {
  int64_t first_item;
  Step step;
  int32_t index;    // of the layer; of the MaskedRows for Step::zero
  int32_t request;  // for Step::powers
};

struct ScoreArguments {
  const ScoredLayer* layers;
  const Segment* segments;
  const Request* requests;
  const MaskedRows* zeroed;
  int32_t* counters;     // zero before and after each launch: kNumCounters, then per layer arrivals and norm arrivals
  int32_t num_layers;    // that have filters
  int32_t table_layers;  // with those that have none
  int32_t num_segments, num_requests;
  int32_t chosen;                  // request that selects; -1: only score
  int32_t l1, l2, cosine, hybrid;  // channels, -1 if not asked for
  bool row_norms;                  // whether norms are asked for, or needed by the pairs
  int32_t items;
  int64_t filters, slots;  // F; partial sums a channel
  float* scores;           // [num_requests, F]
  bool* keep;              // [F]
  float* partial;          // [channels, slots]
  float2* norms;           // [F]: Euclidean norm as a sum of two floats

  __host__ __device__ int32_t* arrivals(const ScoredLayer& layer) const {
    return counters + kNumCounters + 2 * layer.index;
  }
  __host__ __device__ int32_t* norm_arrivals(const ScoredLayer& layer) const { return arrivals(layer) + 1; }
};

// About 32 K weights an item, at least one row for each of a block's warps.
__host__ __device__ inline int64_t rows_per_norm_item(int64_t filter_size) {
  const int64_t rows = 32768 / (filter_size > 0 ? filter_size : 1);
  return rows < 4 ? 4 : rows > 256 ? 256 : rows;
}

// What a call needs, in host memory: `bytes` goes to the device as it is.
struct ScorePlan {
  std::vector<unsigned char> bytes;
  size_t segments_at, requests_at, zeroed_at, counters_at;
  ScoreArguments arguments;  // pointers are unset
  int64_t partial_floats;
  bool powers;  // some distance has an exponent other than 1 and 2
  std::string error;
};

// layers: weights, gradients, filters, filter_size, dtypes and num_pruned are read, the rest is filled. followers: rows
// to zero with the filters of a layer, keep_offset set. chosen = -1: nothing is selected or zeroed.
ScorePlan plan_scores(std::vector<ScoredLayer> layers, std::vector<Request> requests,
                      const std::vector<MaskedRows>& followers, int32_t chosen);

// table: `bytes` on the device. keep may be null when chosen is -1.
cudaError_t launch_scores(const ScorePlan& plan, void* table, float* scores, bool* keep, float* partial, float2* norms,
                          cudaStream_t stream);

}  // namespace mfp::cuda
