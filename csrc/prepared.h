// What is known of a tape (tape.cpp) that was run before.
#pragma once

#include <ATen/core/ivalue.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "arena.h"
#include "cpu/isa.h"
#include "cpu/tasks.h"

namespace mfp {

// A call of a tape that was run before.
struct Step {
  size_t first_phase, last_phase;
  bool calls;  // the operator, instead of the phases
};

// A tape that was run before: its steps, and all of its memory.
struct Prepared {
  int64_t tape;
  int threads;
  cpu::Isa isa;
  Arena arena;
  std::vector<Step> steps;
  std::vector<cpu::Phase> phases;
  std::vector<c10::IValue> slots;  // of those whose addresses stay; the others are empty between two runs
};

// What the tapes of one network share: the memory of the tape that ran last, once for each thread that ran it at a
// time.
class Memory {
 public:
  Memory() { ArenaAllocator::install(); }

  // What was prepared for runs like that, for this thread alone, or null.
  std::unique_ptr<Prepared> take(int64_t tape, int threads, cpu::Isa isa) {
    std::vector<std::unique_ptr<Prepared>> others;
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!free_.empty()) {
      std::unique_ptr<Prepared> last = std::move(free_.back());
      free_.pop_back();
      if (last->tape == tape && last->threads == threads && last->isa == isa) return last;
      others.push_back(std::move(last));
    }
    return nullptr;
  }

  void give_back(std::unique_ptr<Prepared> prepared) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(prepared));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Prepared>> free_;
};

// Operators that this thread calls get their memory from an arena and write down their phases, each where it is given.
class Watch {
 public:
  Watch(Arena* arena, cpu::Notes* notes)
      : arena_(std::exchange(current_arena(), arena)), notes_(std::exchange(cpu::notes(), notes)) {}
  ~Watch() { current_arena() = arena_, cpu::notes() = notes_; }

 private:
  Arena* arena_;
  cpu::Notes* notes_;
};

}  // namespace mfp
