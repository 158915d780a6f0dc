// What this machine's arithmetic can do at most, measured: the yardstick of `mfp bench`. No torch here.
#pragma once

#include "cpu/isa.h"

namespace mfp::cpu {

// Operations on single floats per second, all threads together, with everything in registers.
struct Limits {
  double adds;           // additions alone
  double fmas;           // fused multiply-adds alone
  double adds_and_fmas;  // pairs of one addition and one fused multiply-add
};

Limits measure_limits(int num_threads, Isa isa);

// One instruction set's loops; limits_kernels.h implements them three times. Each runs `count` operations on each of
// kChains vectors, and returns something that depends on all of them.
struct LimitLoops {
  int lanes;
  float (*adds)(long count);
  float (*fmas)(long count);
  float (*adds_and_fmas)(long count);
};
constexpr int kChains = 12;  // enough to hide a latency of 4 or 5 cycles on two units, few enough for 16 registers

LimitLoops portable_limit_loops();
LimitLoops avx2_limit_loops();
LimitLoops avx512_limit_loops();

}  // namespace mfp::cpu
