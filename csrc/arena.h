// The memory of a tape's results (tape.cpp), which stays from call to call, each at the same address in every call.
//
// Malloc gives large blocks back to the system and gets pages of zeros in their place each time: 23 ms of system time
// in MobileNetV2's call with 8 images.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace mfp {

// At first one call of the tape after the other is noted: what it asks for is laid out so that memory that nobody holds
// any more serves later calls. After that, a call that is made again is given the same addresses.
class Arena : public std::enable_shared_from_this<Arena> {
 public:
  ~Arena() {
    for (void* memory : owned_) std::free(memory);
  }

  static bool made(const c10::DataPtr& memory) { return memory.get_deleter() == &give_back; }

  // From here on what is asked for belongs to the next call, or to one that was noted.
  void begin_call() { noted_.emplace_back(), call_ = noted_.size() - 1, noting_ = true; }
  void repeat_call(size_t call) { call_ = call, next_ = 0, noting_ = false; }

  // What was given back meanwhile may be used again. Not within a call: another order of its steps must not matter.
  void end_call() {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.insert(given_back_.begin(), given_back_.end());
    given_back_.clear();
  }

  c10::DataPtr allocate(size_t bytes, c10::Allocator& others) {
    std::vector<Noted>& noted = noted_[call_];
    if (bytes == 0) return others.allocate(bytes);
    if (!noting_) {
      const bool as_noted = next_ < noted.size() && noted[next_].bytes == bytes;
      return as_noted ? c10::DataPtr(noted[next_++].memory, c10::DeviceType::CPU) : others.allocate(bytes);
    }
    const auto [size, memory] = take(bytes);
    noted.push_back({bytes, memory});
    return {memory, new Block{shared_from_this(), size, memory}, &give_back, c10::DeviceType::CPU};
  }

 private:
  struct Noted {
    size_t bytes;
    void* memory;
  };
  struct Block {
    std::shared_ptr<Arena> arena;
    size_t size;
    void* memory;
  };

  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    const std::lock_guard<std::mutex> lock(block->arena->mutex_);
    block->arena->given_back_.emplace_back(block->size, block->memory);
  }

  std::pair<size_t, void*> take(size_t bytes) {
    const auto found = free_.lower_bound(bytes);
    if (found != free_.end() && found->first <= 2 * bytes) {
      const std::pair<size_t, void*> block = *found;
      free_.erase(found);
      return block;
    }
    const size_t size = (bytes + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, size);
    if (memory == nullptr) throw std::bad_alloc();
    owned_.push_back(memory);
    return {size, memory};
  }

  std::vector<std::vector<Noted>> noted_;  // per call
  size_t call_ = 0, next_ = 0;
  bool noting_ = true;
  std::mutex mutex_;  // of what is given back, perhaps by other threads
  std::vector<std::pair<size_t, void*>> given_back_;
  std::multimap<size_t, void*> free_;
  std::vector<void*> owned_;
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
    static ArenaAllocator* const installed = [] {
      auto* allocator = new ArenaAllocator(c10::GetCPUAllocator());
      c10::SetCPUAllocator(allocator);
      return allocator;
    }();
    (void)installed;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Arena* const arena = current_arena();
    return arena == nullptr ? torchs_->allocate(bytes) : arena->allocate(bytes, *torchs_);
  }
  c10::DeleterFnPtr raw_deleter() const override { return torchs_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  explicit ArenaAllocator(c10::Allocator* torchs) : torchs_(torchs) {}
  c10::Allocator* torchs_;
};

}  // namespace mfp
