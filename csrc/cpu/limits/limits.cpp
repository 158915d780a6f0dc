#include "cpu/limits/limits.h"

#include <algorithm>
#include <chrono>

namespace mfp::cpu {

static LimitLoops loops_of(Isa isa) {
  switch (isa) {
    case Isa::avx512: return avx512_limit_loops();
    case Isa::avx2: return avx2_limit_loops();
    default: return portable_limit_loops();
  }
}

static volatile float kept_result;  // so that the loops have a purpose

// The best of several short runs: a run that was interrupted says nothing about the machine.
static double best_rate(float (*loop)(long), int lanes, int num_threads) {
  constexpr int kRuns = 30;
  constexpr long kSteps = 400000;  // about 1 ms
  double best = 0;

  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(num_threads)
    {
      const float result = loop(kSteps);
#pragma omp critical
      kept_result = result;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(kSteps) * kChains * lanes * num_threads / seconds.count());
  }
  return best;
}

Limits measure_limits(int num_threads, Isa isa) {
  const LimitLoops loops = loops_of(isa);
  return {best_rate(loops.adds, loops.lanes, num_threads), best_rate(loops.fmas, loops.lanes, num_threads),
          best_rate(loops.adds_and_fmas, loops.lanes, num_threads)};
}

}  // namespace mfp::cpu
