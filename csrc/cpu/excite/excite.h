// Squeeze-and-excitation in place: every channel of an image is multiplied by a gate, which two small dense layers
// compute from the means of all channels. Channels innermost. Compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/activation.h"
#include "cpu/isa.h"

namespace mfp::cpu {

struct Excite {
  float* images;  // [batch, pixels, channels]
  int64_t batch, pixels, channels, hidden;
  const float *reduce_weight, *reduce_bias;  // [hidden, channels], [hidden]
  const float *expand_weight, *expand_bias;  // [hidden, channels], [channels]
  Activation activation;                     // of the hidden numbers
  bool hard;                                 // the gates are hard sigmoids, not sigmoids

  // An image's pixels are summed in stretches, the same for any number of threads.
  int64_t stretches() const { return std::min<int64_t>((pixels + 63) / 64, 32); }
  int64_t first(int64_t stretch) const { return pixels * stretch / stretches(); }
};

// excite_sums: of one stretch of an image, [channels]. excite_means: of an image, from the sums of all of its
// stretches. excite_hidden: the hidden numbers first to last - 1, from the means. excite_gates: those of the channels
// first to last - 1, from all hidden numbers. excite_scale: multiplies the pixels of a stretch.
#define MFP_DECLARE(isa)                                                                                  \
  namespace isa {                                                                                         \
  void excite_sums(const Excite& work, int64_t image, int64_t stretch, float* sums);                      \
  void excite_means(const Excite& work, const float* sums, float* means);                                 \
  void excite_hidden(const Excite& work, const float* means, int64_t first, int64_t last, float* hidden); \
  void excite_gates(const Excite& work, const float* hidden, int64_t first, int64_t last, float* gates);  \
  void excite_scale(const Excite& work, int64_t image, int64_t stretch, const float* gates);              \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
