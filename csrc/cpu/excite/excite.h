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
  int64_t stretches() const { return (pixels + 63) / 64; }
  int64_t first(int64_t stretch) const { return pixels * stretch / stretches(); }
};

// excite_sums: of one stretch of an image, [channels]. excite_gates: from the sums of all of its stretches, [channels].
// excite_scale: multiplies the pixels of a stretch. `space` is of as many numbers as channels and hidden ones.
#define MFP_DECLARE(isa)                                                                     \
  namespace isa {                                                                            \
  void excite_sums(const Excite& work, int64_t image, int64_t stretch, float* sums);         \
  void excite_gates(const Excite& work, const float* sums, float* space, float* gates);      \
  void excite_scale(const Excite& work, int64_t image, int64_t stretch, const float* gates); \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
