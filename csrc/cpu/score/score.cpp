// Cuts the layers into tiles of filter pairs, spreads them over the threads and adds the partial sums up.
#include "cpu/score/score.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/score/tiles.h"
#include "cpu/spread.h"

namespace mfp::cpu {

static Kernels kernels_of(Isa isa) {
  switch (isa) {
    case Isa::avx512: return avx512_kernels();
    case Isa::avx2: return avx2_kernels();
    default: return portable_kernels();
  }
}

namespace {

struct Range {
  size_t layer;
  int64_t begin, end;
};

struct LayerOffsets {
  std::vector<int64_t> begin;  // of each layer on the flat filter axis, and F at the end
  explicit LayerOffsets(const std::vector<Layer>& layers) : begin(1, 0) {
    for (const Layer& layer : layers) begin.push_back(begin.back() + layer.num_filters);
  }
  int64_t total() const { return begin.back(); }
};

// Calls work(layer, filter) for all filters; a thread takes some 64 K weights at a time.
template <class Work>
void for_each_filter(const std::vector<Layer>& layers, int num_threads, Work work) {
  constexpr int64_t kWeightsPerItem = 1 << 16;
  std::vector<Range> items;
  int64_t weights = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    weights += layers[l].num_filters * layers[l].filter_size;
    const int64_t step = std::max<int64_t>(1, kWeightsPerItem / std::max<int64_t>(1, layers[l].filter_size));
    for (int64_t begin = 0; begin < layers[l].num_filters; begin += step) {
      items.push_back({l, begin, std::min(begin + step, layers[l].num_filters)});
    }
  }
  spread(items.size(), worth(num_threads, weights, 2 * kWeightsPerItem), [&](int64_t i) {
    for (int64_t filter = items[i].begin; filter < items[i].end; ++filter) work(items[i].layer, filter);
  });
}

// Tiles of all layers, the costliest first, so that the last ones to run are short.
std::vector<TileWork> all_tiles(const std::vector<Layer>& layers) {
  std::vector<TileWork> tiles;
  for (const Layer& layer : layers) {
    if (layer.filter_size == 0) continue;  // nothing to sum
    for (int64_t row = 0; row < layer.num_filters; row += kTileRows) {
      const int64_t row_end = std::min(row + kTileRows, layer.num_filters);
      for (int64_t column = 0; column < row_end - 1; column += kTileColumns) {
        TileWork work = {};
        work.layer = &layer;
        work.row_begin = row, work.row_end = row_end;
        work.column_begin = column, work.column_end = std::min(column + kTileColumns, row_end);
        tiles.push_back(work);
      }
    }
  }
  const auto cost = [](const TileWork& work) {
    return (work.row_end - std::max(work.row_begin, work.column_begin)) * work.layer->filter_size;
  };
  std::stable_sort(tiles.begin(), tiles.end(), [&](auto& a, auto& b) { return cost(a) > cost(b); });
  return tiles;
}

// One sweep over all pairs of all layers, for the relations asked for in `wanted`: [relations][F] sums.
std::vector<std::vector<double>> sum_relations(const std::vector<Layer>& layers, const LayerOffsets& offsets,
                                               const TileWork& wanted, const std::vector<double>& norms,
                                               const Kernels& kernels, int num_threads) {
  const int relations = wanted.exponent > 0 ? 1 : wanted.l1 + wanted.l2 + wanted.cosine + wanted.hybrid;
  std::vector<TileWork> tiles = all_tiles(layers);
  const int64_t stride = relations * kSumsPerRelation;
  std::vector<double> partial(tiles.size() * stride);
  spread(tiles.size(), num_threads, [&](int64_t i) {
    TileWork work = wanted;
    work.layer = tiles[i].layer;
    work.row_begin = tiles[i].row_begin, work.row_end = tiles[i].row_end;
    work.column_begin = tiles[i].column_begin, work.column_end = tiles[i].column_end;
    work.norms = norms.empty() ? nullptr : norms.data() + offsets.begin[work.layer - layers.data()];
    work.sums = partial.data() + i * stride;
    kernels.tile(work);
  });
  // In the order of the tiles, on one thread: the sums are the same whoever computed the parts.
  std::vector<std::vector<double>> sums(relations, std::vector<double>(offsets.total()));
  for (size_t i = 0; i < tiles.size(); ++i) {
    const TileWork& tile = tiles[i];
    for (int relation = 0; relation < relations; ++relation) {
      const double* part = partial.data() + i * stride + relation * kSumsPerRelation;
      double* target = sums[relation].data() + offsets.begin[tile.layer - layers.data()];
      for (int64_t row = tile.row_begin; row < tile.row_end; ++row) target[row] += part[row - tile.row_begin];
      for (int64_t c = tile.column_begin; c < tile.column_end; ++c)
        target[c] += part[kTileRows + c - tile.column_begin];
    }
  }
  return sums;
}

bool any_of(const std::vector<Criterion>& criteria, Kind kind, double exponent = 0) {
  return std::any_of(criteria.begin(), criteria.end(),
                     [&](const Criterion& c) { return c.kind == kind && (exponent == 0 || c.exponent == exponent); });
}

bool is_general(const Criterion& c) { return c.exponent != 1 && c.exponent != 2; }

}  // namespace

// A pair of an all-zero and another filter has cosine distance 1, two all-zero filters 0; the tiles leave both out.
static void add_zero_filters(const std::vector<Layer>& layers, const LayerOffsets& offsets,
                             const std::vector<double>& norms, std::vector<double>& cosine) {
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto begin = norms.begin() + offsets.begin[l], end = norms.begin() + offsets.begin[l + 1];
    const int64_t zeros = std::count(begin, end, 0.0);
    for (int64_t j = offsets.begin[l]; zeros > 0 && j < offsets.begin[l + 1]; ++j) {
      cosine[j] += static_cast<double>(norms[j] == 0 ? layers[l].num_filters - zeros : zeros);
    }
  }
}

void compute_scores(const std::vector<Layer>& layers, const std::vector<Layer>& gradients,
                    const std::vector<Criterion>& criteria, float* scores, int num_threads, Isa isa) {
  const Kernels kernels = kernels_of(isa);
  const LayerOffsets offsets(layers);
  const int64_t total = offsets.total();
  const bool cosine = any_of(criteria, Kind::cosine_distance), hybrid = any_of(criteria, Kind::weighted_hybrid);

  const bool norm = cosine || hybrid || any_of(criteria, Kind::norm), taylor = any_of(criteria, Kind::taylor);
  std::vector<Norms> norms(norm ? total : 0);
  std::vector<double> l2_norms, taylors(taylor ? total : 0);
  if (norm || taylor) {
    for_each_filter(layers, num_threads, [&](size_t l, int64_t filter) {
      const int64_t j = offsets.begin[l] + filter;
      if (norm) norms[j] = kernels.norms(layers[l], filter);
      if (taylor) taylors[j] = kernels.taylor(layers[l], gradients[l], filter);
    });
  }
  for (const Norms& n : norms) l2_norms.push_back(std::sqrt(n.squares));
  TileWork wanted = {};
  wanted.l1 = any_of(criteria, Kind::distance, 1), wanted.l2 = any_of(criteria, Kind::distance, 2);
  wanted.cosine = cosine, wanted.hybrid = hybrid;
  std::vector<std::vector<double>> sums;
  if (wanted.l1 || wanted.l2 || cosine || hybrid) {
    sums = sum_relations(layers, offsets, wanted, l2_norms, kernels, num_threads);
    if (cosine) add_zero_filters(layers, offsets, l2_norms, sums[wanted.l1 + wanted.l2]);
  }

  for (size_t c = 0; c < criteria.size(); ++c) {
    float* out = scores + c * total;
    const double p = criteria[c].exponent;
    switch (criteria[c].kind) {
      case Kind::norm:
        if (is_general(criteria[c])) {
          std::vector<size_t> layer_of;
          for (size_t l = 0; l < layers.size(); ++l) layer_of.insert(layer_of.end(), layers[l].num_filters, l);
          spread(total, num_threads, [&](int64_t j) {
            const size_t l = layer_of[j];
            out[j] =
                std::isfinite(norms[j].l1) ? kernels.general_norm(layers[l], j - offsets.begin[l], p) : norms[j].l1;
          });
        } else {
          for (int64_t j = 0; j < total; ++j) out[j] = p == 1 ? norms[j].l1 : l2_norms[j];
        }
        break;
      case Kind::distance: {
        std::vector<std::vector<double>> general;
        if (is_general(criteria[c])) {
          TileWork powers = {};
          powers.exponent = p;
          general = sum_relations(layers, offsets, powers, {}, kernels, num_threads);
        }
        const std::vector<double>& sum = is_general(criteria[c]) ? general[0] : sums[p == 1 ? 0 : wanted.l1];
        std::copy(sum.begin(), sum.end(), out);
        break;
      }
      case Kind::cosine_distance: {
        const std::vector<double>& sum = sums[wanted.l1 + wanted.l2];
        std::copy(sum.begin(), sum.end(), out);
        break;
      }
      case Kind::taylor: std::copy(taylors.begin(), taylors.end(), out); break;
      case Kind::weighted_hybrid: {
        const std::vector<double>& sum = sums[wanted.l1 + wanted.l2 + cosine];
        for (int64_t j = 0; j < total; ++j) out[j] = static_cast<float>(l2_norms[j] * sum[j]);
        break;
      }
    }
  }
}

void select_lowest(const float* scores, int64_t n, int64_t count, bool* keep) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + count, order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] < scores[b] : a < b; });
  std::fill_n(keep, n, true);
  for (int64_t i = 0; i < count; ++i) keep[order[i]] = false;
}

}  // namespace mfp::cpu
