// What BatchNorm computes once it is trained, over channels that come from several tensors, with the activation behind
// it: one pass over memory. Compiled once per instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/activation.h"
#include "cpu/isa.h"

namespace mfp::cpu {

struct NormPart {
  const float* numbers;  // [rows, channels]
  int64_t channels;
};

struct Norm {
  std::vector<NormPart> parts;
  const float *scale, *shift;  // [channels of all parts]
  float* output;               // [rows, channels of all parts]
  int64_t channels;
  Activation activation;
};

// norm_rows: rows begin to end.
#define MFP_DECLARE(isa)                                        \
  namespace isa {                                               \
  void norm_rows(const Norm& norm, int64_t begin, int64_t end); \
  }
MFP_DECLARE(portable)
MFP_DECLARE(avx2)
MFP_DECLARE(avx512)
#undef MFP_DECLARE

}  // namespace mfp::cpu
