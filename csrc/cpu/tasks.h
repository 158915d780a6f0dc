// Tasks of an operator over torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace mfp::cpu {

struct alignas(64) Counter {
  std::atomic<int64_t> number = 0;
};

// Tasks that may be done at the same time: each thread does its own stretch of them, whose data the layer before has
// left in its caches, and then what is left of the others'. Results do not depend on who computes.
class Stretches {
 public:
  Stretches(int64_t count, int threads) : count_(count), threads_(threads), counters_(new Counter[threads + 1]) {
    restart();
  }

  void restart() {
    for (int i = 0; i < threads_; ++i) counters_[i].number = count_ * i / threads_;
    done().number = 0;
  }

  // The share of one thread.
  template <class Task>
  void run(int thread, const Task& task) {
    int64_t finished = 0;
    for (int i = thread; i < thread + threads_; ++i) {
      std::atomic<int64_t>& next = counters_[i % threads_].number;
      const int64_t end = count_ * (i % threads_ + 1) / threads_;
      for (int64_t number; (number = next++) < end; ++finished) task(number);
    }
    done().number += finished;
  }

  // Until all tasks are done. A thread that has none is not waited for: it may be asleep.
  void wait() const {
    for (int looks = 0; done().number < count_; ++looks) {
      if (looks > kLooks) std::this_thread::yield();
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  static constexpr int kLooks = 2000;  // some 50 us

  Counter& done() const { return counters_[threads_]; }

  int64_t count_;
  int threads_;
  std::unique_ptr<Counter[]> counters_;  // the next task of each stretch, and how many are done
};

// One call of run_phase, which can be done again where the memory that it is about is still there.
struct Phase {
  Stretches stretches;
  std::function<void(int64_t)> task;
};

// What a call of an operator consists of: its phases, unless it did something beside them.
struct Notes {
  std::vector<Phase> phases;
  bool complete = true;
};

// Where the operators that this thread calls write that down, or null (csrc/tape.cpp).
inline Notes*& notes() {
  static thread_local Notes* current = nullptr;
  return current;
}

// Calls task(number) for all numbers below count.
template <class Task>
void run_tasks(int64_t count, int threads, const Task& task) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t number = 0; number < count; ++number) task(number);
    return;
  }
  Stretches stretches(count, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) stretches.run(static_cast<int>(thread), task);
  });
}

// The same, written down where that is asked: the task owns what it is about, but for tensors' memory.
template <class Task>
void run_phase(int64_t count, const Task& task) {
  const int threads = at::get_num_threads();
  if (Notes* noted = notes()) noted->phases.push_back({Stretches(count, threads), task});
  run_tasks(count, threads, task);
}

// The phases one after the other, by one team of as many threads as there were when they were written down.
inline void run_phases(Phase* first, Phase* last, int threads) {
  if (first == last) return;
  for (Phase* phase = first; phase != last; ++phase) phase->stretches.restart();
  std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
  for (Phase* phase = first; phase != last; ++phase) {
    phase->stretches.run(omp_get_thread_num(), [&](int64_t number) {
      try {
        phase->task(number);
      } catch (...) {
#pragma omp critical
        failure = std::current_exception();
      }
    });
    phase->stretches.wait();
  }
  if (failure) std::rethrow_exception(failure);
}

// The tensor in that order, by default with channels innermost. Where it is not it is copied, here and not in a phase.
inline at::Tensor in_order(const at::Tensor& tensor, at::MemoryFormat format = at::MemoryFormat::ChannelsLast) {
  if (notes() != nullptr && !tensor.is_contiguous(format)) notes()->complete = false;
  return tensor.contiguous(format);
}

}  // namespace mfp::cpu
