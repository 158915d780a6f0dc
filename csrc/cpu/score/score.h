// Scores of all filters of all layers on the CPU. No torch here: a small driver runs this under the sanitizers.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "dtype.h"

namespace mfp::cpu {

enum class Kind : int64_t { norm = 0, distance = 1, cosine_distance = 2, weighted_hybrid = 3, taylor = 4 };

// One conv layer: N filters of K numbers, one dense block each, one after the other.
struct Layer {
  const void* weights;
  DType dtype;
  int64_t num_filters;  // N
  int64_t filter_size;  // K
};

struct Criterion {
  Kind kind;
  double exponent;  // p of norms and distances
};

// gradients: of the layers' weights, laid out like them; may be empty where no criterion is Kind::taylor.
// scores: [criteria, F], F = all filters of all layers in order. The result does not depend on num_threads.
void compute_scores(const std::vector<Layer>& layers, const std::vector<Layer>& gradients,
                    const std::vector<Criterion>& criteria, float* scores, int num_threads, Isa isa);

// keep[j] = false for the `count` lowest of scores[0..n), the lower index first among equals.
void select_lowest(const float* scores, int64_t n, int64_t count, bool* keep);

}  // namespace mfp::cpu
