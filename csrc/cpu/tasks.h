// Tasks of an operator over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace mfp::cpu {

struct alignas(64) Stretch {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls task(number) for all numbers below count. Each thread does its own stretch of them, whose data the layer before
// has left in its caches, and then what is left of the others'. Results do not depend on who computes.
template <class Task>
void run_tasks(int64_t count, int threads, Task task) {
  std::vector<Stretch> stretches(threads);
  for (int i = 0; i < threads; ++i) {
    stretches[i].next = count * i / threads, stretches[i].end = count * (i + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end + threads - 1; ++i) {
      Stretch& stretch = stretches[i % threads];
      for (int64_t number; (number = stretch.next++) < stretch.end;) task(number);
    }
  });
}

}  // namespace mfp::cpu
