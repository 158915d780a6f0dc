// Work items over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mfp::cpu {

// As many threads as are worth their start: a second one where there is `enough` for one, and so on.
inline int worth(int num_threads, int64_t amount, int64_t enough) {
  return static_cast<int>(std::min<int64_t>(num_threads, 1 + amount / enough));
}

// Runs work(i) for all i < count. Which thread runs which i is left to chance; results must not depend on it.
template <class Work>
void spread(int64_t count, int num_threads, Work work) {
  std::atomic<int64_t> next{0};
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, count));
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
}

}  // namespace mfp::cpu
