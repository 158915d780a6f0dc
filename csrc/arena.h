// The memory of a tape's results (tape.cpp), which stays from call to call, each at the same address in every call.
//
// Malloc gives large blocks back to the system and gets pages of zeros in their place each time: 23 ms of system time
// in MobileNetV2's call with 8 images.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace mfp {

// At first one call of the tape after the other is noted: what it asks for is laid out so that memory that nobody holds
// any more serves later calls. After that, a call that is made again is given the same addresses, but for those that
// somebody still holds.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() {
    const std::lock_guard<std::mutex> lock(mutex());
    for (void* memory : owned_) {
      Place& place = places().at(memory);
      place.arena = nullptr;
      if (!place.held) forget(memory);
    }
  }

  static bool made(const c10::DataPtr& memory) { return memory.get_deleter() == &release; }

  // From here on what is asked for belongs to the next call, or to one that was noted.
  void begin_call() {
    const std::lock_guard<std::mutex> lock(mutex());
    noted_.emplace_back(), call_ = noted_.size() - 1, noting_ = true;
  }
  void repeat_call(size_t call) {
    const std::lock_guard<std::mutex> lock(mutex());
    call_ = call, next_ = 0, noting_ = false;
  }

  // What was given back meanwhile may be used again. Not within a call: another order of its steps must not matter.
  void end_call() {
    const std::lock_guard<std::mutex> lock(mutex());
    for (void* memory : given_back_) free_.emplace(places().at(memory).size, memory);
    given_back_.clear();
  }

  c10::DataPtr allocate(size_t bytes, c10::Allocator& others) {
    void* const memory = bytes == 0 ? nullptr : take(bytes);
    if (memory == nullptr) return others.allocate(bytes);
    return {memory, memory, &release, c10::DeviceType::CPU};
  }

  // Whether that was the memory of an arena. Those who hold it may do so for longer than the arena is there.
  static bool give_back(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex());
    const auto found = places().find(memory);
    if (found == places().end()) return false;
    found->second.held = false;
    if (found->second.arena == nullptr) {
      forget(memory);
    } else if (found->second.arena->noting_) {
      found->second.arena->given_back_.push_back(memory);
    }
    return true;
  }

 private:
  struct Place {
    size_t size;
    Arena* arena;  // or null, if it is no more
    bool held;
  };
  struct Noted {
    size_t bytes;
    void* memory;
  };

  // All memory of all arenas.
  static std::unordered_map<void*, Place>& places() {
    static auto* const all = new std::unordered_map<void*, Place>;  // for good: tensors may outlive static variables
    return *all;
  }
  static std::mutex& mutex() {
    static auto* const one = new std::mutex;
    return *one;
  }

  static void release(void* memory) { give_back(memory); }
  static void forget(void* memory) { places().erase(memory), std::free(memory); }

  // Null where a call that is made again asks for something else than before, or where somebody holds that.
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex());
    void* memory = nullptr;
    if (noting_) {
      memory = take_new(bytes);
      noted_[call_].push_back({bytes, memory});
    } else if (const std::vector<Noted>& noted = noted_[call_]; next_ < noted.size() && noted[next_].bytes == bytes) {
      memory = noted[next_++].memory;
    }
    if (memory == nullptr || places().at(memory).held) return nullptr;
    places().at(memory).held = true;
    return memory;
  }

  void* take_new(size_t bytes) {
    if (const auto found = free_.lower_bound(bytes); found != free_.end() && found->first <= 2 * bytes) {
      void* const memory = found->second;
      free_.erase(found);
      return memory;
    }
    const size_t size = (bytes + 63) / 64 * 64;
    void* const memory = std::aligned_alloc(64, size);
    if (memory == nullptr) throw std::bad_alloc();
    owned_.push_back(memory), places()[memory] = {size, this, false};
    return memory;
  }

  std::vector<std::vector<Noted>> noted_;  // per call
  size_t call_ = 0, next_ = 0;
  bool noting_ = true;
  std::vector<void*> given_back_, owned_;
  std::multimap<size_t, void*> free_;
};

// Whose memory the operators that this thread calls get, or null.
inline Arena*& current_arena() {
  static thread_local Arena* arena = nullptr;
  return arena;
}

// torch's allocator, except in a thread that runs a tape.
class ArenaAllocator final : public c10::Allocator {
 public:
  // From the first tape on, for good.
  static void install() {
    static const bool installed = [] {
      torchs() = c10::GetCPUAllocator();
      c10::SetCPUAllocator(new ArenaAllocator);
      return true;
    }();
    (void)installed;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Arena* const arena = current_arena();
    return arena == nullptr ? torchs()->allocate(bytes) : arena->allocate(bytes, *torchs());
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  static c10::Allocator*& torchs() {
    static c10::Allocator* allocator = nullptr;
    return allocator;
  }

  // Of what was asked for as plain memory, by oneDNN for one.
  static void release(void* memory) {
    if (!Arena::give_back(memory)) torchs()->raw_deleter()(memory);
  }
};

}  // namespace mfp
