// Arithmetic without memory, compiled once per instruction set (vector.h).
#include "cpu/limits/limits.h"
#include "cpu/vector.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

// Keeps the compiler from merging the steps of a loop into fewer.
inline Vec opaque(Vec v) {
#if defined(__x86_64__)
  asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#endif
  return v;
}

template <class Step>
inline float run_chains(long count, Step step) {
  Vec chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = broadcast(static_cast<float>(i));
  for (long n = 0; n < count; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = step(chains[i]);
  }
  Vec sum{};
  for (int i = 0; i < kChains; ++i) sum += chains[i];
  return static_cast<float>(sum_of_lanes(sum));
}

float adds(long count) {
  const Vec y = opaque(broadcast(1e-9f));
  return run_chains(count, [=](Vec chain) { return opaque(chain + y); });
}

float fmas(long count) {
  const Vec x = opaque(broadcast(0.999f)), y = opaque(broadcast(1e-9f));
  return run_chains(count, [=](Vec chain) { return opaque(chain * x + y); });
}

float adds_and_fmas(long count) {
  const Vec x = opaque(broadcast(0.999f)), y = opaque(broadcast(1e-9f));
  return run_chains(count, [=](Vec chain) { return opaque(opaque(chain + y) * x + y); });
}

}  // namespace MFP_ISA

LimitLoops MFP_JOIN(MFP_ISA, _limit_loops)() {
  return {MFP_ISA::kLanes, MFP_ISA::adds, MFP_ISA::fmas, MFP_ISA::adds_and_fmas};
}

}  // namespace mfp::cpu

MFP_END_ISA

#else  // this compiler or processor has no such instruction set; isa.cpp never chooses it
namespace mfp::cpu {
LimitLoops MFP_JOIN(MFP_ISA, _limit_loops)() { return portable_limit_loops(); }
}  // namespace mfp::cpu
#endif
