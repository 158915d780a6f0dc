// The host side of the scoring launch: which items there are and in which order. Plain C++.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "cuda/score.h"

namespace mfp::cuda {
namespace {

bool is_power(const Request& request) {
  return request.kind == Kind::distance && request.exponent != 1.0f && request.exponent != 2.0f;
}

bool of_a_row(const Request& request) { return request.kind == Kind::norm || request.kind == Kind::taylor; }

// Gives each request its channel. Requests of the same sums share one.
int32_t assign_channels(std::vector<Request>& requests, ScoreArguments& arguments) {
  int32_t channels = 0;
  arguments.l1 = arguments.l2 = arguments.cosine = arguments.hybrid = -1;
  for (Request& request : requests) {
    request.channel = -1;
    if (of_a_row(request)) continue;
    if (is_power(request)) {
      request.channel = channels++;
      continue;
    }
    int32_t& shared = request.kind == Kind::cosine_distance   ? arguments.cosine
                      : request.kind == Kind::weighted_hybrid ? arguments.hybrid
                      : request.exponent == 1.0f              ? arguments.l1
                                                              : arguments.l2;
    if (shared < 0) shared = channels++;
    request.channel = shared;
  }
  return channels;
}

template <class T>
size_t append(std::vector<unsigned char>& bytes, const T* data, size_t count) {
  const size_t at = (bytes.size() + 15) / 16 * 16;
  bytes.resize(at + count * sizeof(T));
  if (count > 0) std::memcpy(bytes.data() + at, data, count * sizeof(T));
  return at;
}

class ItemList {
 public:
  void add(Step step, size_t index, int64_t items, int32_t request = -1) {
    if (items > 0) segments.push_back({count, step, static_cast<int32_t>(index), request});
    count += items;
  }
  std::vector<Segment> segments;
  int64_t count = 0;
};

}  // namespace

ScorePlan plan_scores(std::vector<ScoredLayer> layers, std::vector<Request> requests,
                      const std::vector<MaskedRows>& followers, int32_t chosen) {
  ScorePlan plan{};
  ScoreArguments& arguments = plan.arguments;
  const int32_t channels = assign_channels(requests, arguments);
  const bool pairs = arguments.l1 >= 0 || arguments.l2 >= 0 || arguments.cosine >= 0 || arguments.hybrid >= 0;
  const auto is_norm = [](const Request& request) { return request.kind == Kind::norm; };
  const bool norms = arguments.cosine >= 0 || arguments.hybrid >= 0 ||
                     (arguments.l2 >= 0 && arguments.l1 < 0) ||  // its tiles are matrix products
                     std::any_of(requests.begin(), requests.end(), is_norm);
  const bool rows = norms || std::any_of(requests.begin(), requests.end(), of_a_row);
  arguments.row_norms = norms;
  const auto powers = std::count_if(requests.begin(), requests.end(), is_power);
  plan.powers = powers > 0;

  for (ScoredLayer& layer : layers) {
    const int64_t row_bytes = layer.filter_size * (layer.dtype == DType::float32 ? 4 : 2);
    layer.index = static_cast<int32_t>(&layer - layers.data());
    layer.offset = arguments.filters;
    layer.slots = arguments.slots;
    layer.aligned = row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(layer.weights) % 16 == 0;
    const int64_t tiles = (layer.filters + kTile - 1) / kTile, triangle = tiles * (tiles + 1) / 2;
    const int64_t norm_items =
        rows ? (layer.filters + rows_per_norm_item(layer.filter_size) - 1) / rows_per_norm_item(layer.filter_size) : 0;
    layer.tiles = static_cast<int32_t>(tiles);
    layer.norm_items = static_cast<int32_t>(norm_items);
    layer.items = static_cast<int32_t>(norm_items + triangle * ((pairs ? 1 : 0) + powers));
    arguments.filters += layer.filters;
    arguments.slots += tiles * tiles * kTile;
  }

  // Longest filters first, so that the launch does not end with a long item.
  std::vector<size_t> order(layers.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return layers[a].filter_size > layers[b].filter_size; });
  ItemList list;
  for (size_t index : order) list.add(Step::norms, index, layers[index].norm_items);
  for (size_t index : order) {
    const int64_t triangle = int64_t{layers[index].tiles} * (layers[index].tiles + 1) / 2;
    if (pairs) list.add(Step::pairs, index, triangle);
    for (size_t request = 0; request < requests.size(); ++request) {
      if (is_power(requests[request])) list.add(Step::powers, index, triangle, static_cast<int32_t>(request));
    }
  }
  std::vector<MaskedRows> zeroed;
  if (chosen >= 0) {
    for (const ScoredLayer& layer : layers) {
      if (layer.num_pruned == 0) continue;
      const int64_t row_bytes = layer.filter_size * (layer.dtype == DType::float32 ? 4 : 2);
      auto* data = static_cast<unsigned char*>(const_cast<void*>(layer.weights));
      zeroed.push_back({data, layer.filters, row_bytes, layer.offset, 0});
    }
    zeroed.insert(zeroed.end(), followers.begin(), followers.end());
    for (size_t index = 0; index < zeroed.size(); ++index) {
      const int64_t step = rows_per_item(zeroed[index].row_bytes);
      zeroed[index].first_item = list.count;
      list.add(Step::zero, index, zeroed[index].row_bytes > 0 ? (zeroed[index].rows + step - 1) / step : 0);
    }
  }
  if (list.count > std::numeric_limits<int32_t>::max() / 2) {
    plan.error = "too many tiles for one launch: " + std::to_string(list.count);
  }

  const auto with_filters = [](const ScoredLayer& layer) { return layer.filters > 0; };
  arguments.num_layers = static_cast<int32_t>(std::count_if(layers.begin(), layers.end(), with_filters));
  arguments.table_layers = static_cast<int32_t>(layers.size());
  arguments.num_segments = static_cast<int32_t>(list.segments.size());
  arguments.num_requests = static_cast<int32_t>(requests.size());
  arguments.chosen = chosen;
  arguments.items = static_cast<int32_t>(list.count);
  plan.partial_floats = arguments.slots * channels;
  const std::vector<int32_t> counters(kNumCounters + 2 * layers.size(), 0);
  append(plan.bytes, layers.data(), layers.size());
  plan.segments_at = append(plan.bytes, list.segments.data(), list.segments.size());
  plan.requests_at = append(plan.bytes, requests.data(), requests.size());
  plan.zeroed_at = append(plan.bytes, zeroed.data(), zeroed.size());
  plan.counters_at = append(plan.bytes, counters.data(), counters.size());
  return plan;
}

}  // namespace mfp::cuda
