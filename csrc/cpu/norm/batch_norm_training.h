// BatchNorm with the statistics of its batch, and its gradients, on rows of channels. Compiled once per instruction
// set.
//
// Rows are summed in blocks whose number does not depend on the threads; what the blocks found is put together in
// double precision. Rows of any length are whole vectors and a part of one: after pruning they are seldom multiples.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mfp::cpu {

struct NormRows {
  const float* input;  // [rows, channels]
  int64_t rows, channels;
};

// Means of the rows begin to end, and their sums of squared distances from these: found is [2, channels].
// Sums of the gradient, and of the gradient times the input's distance from the mean: found is [2, channels].
// output = (input - mean) * scale + shift.
// input_gradient = gradient * scale + (input - mean) * slope + shift.
#define MFP_DECLARE(isa)                                                                                           \
  namespace isa {                                                                                                  \
  void row_moments(const NormRows& x, int64_t begin, int64_t end, float* found);                                   \
  void gradient_sums(const NormRows& x, const float* gradient, const float* mean, int64_t begin, int64_t end,      \
                     float* found);                                                                                \
  void normalize_rows(const NormRows& x, const float* mean, const float* scale, const float* shift, int64_t begin, \
                      int64_t end, float* output);                                                                 \
  void input_gradients(const NormRows& x, const float* gradient, const float* mean, const float* scale,            \
                       const float* slope, const float* shift, int64_t begin, int64_t end, float* input_gradient); \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
