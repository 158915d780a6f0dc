// Memory of a tape's results that is used again from call to call. malloc gives large blocks back to the system and
// gets pages of zeros in their place each time: 23 ms of system time in MobileNetV2's call with 8 images.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>

namespace mfp {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  static constexpr size_t kLeast = 1 << 18;  // bytes; malloc keeps smaller ones itself

  ~Pool() { clear(); }

  // The memory comes back when no tensor uses it any more.
  c10::DataPtr allocate(size_t bytes) {
    const auto [size, memory] = take(bytes);
    return {memory, new Block{shared_from_this(), size, memory}, &give_back, c10::DeviceType::CPU};
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [size, memory] : free_) std::free(memory);
    free_.clear();
  }

 private:
  struct Block {
    std::shared_ptr<Pool> pool;
    size_t size;
    void* memory;
  };

  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    const std::lock_guard<std::mutex> lock(block->pool->mutex_);
    block->pool->free_.emplace(block->size, block->memory);
  }

  std::pair<size_t, void*> take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.lower_bound(bytes);
      if (found != free_.end() && found->first <= 2 * bytes) {
        const std::pair<size_t, void*> block = *found;
        free_.erase(found);
        return block;
      }
    }
    const size_t size = (bytes + 63) / 64 * 64;
    void* memory = std::aligned_alloc(64, size);
    if (memory == nullptr) throw std::bad_alloc();
    return {size, memory};
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
};

// The pool of the tape that this thread is running, or null.
inline Pool*& current_pool() {
  static thread_local Pool* pool = nullptr;
  return pool;
}

// torch's allocator, except for large results in a thread that runs a tape.
class PoolAllocator final : public c10::Allocator {
 public:
  // From the first tape on, for good.
  static void install() {
    static PoolAllocator* const installed = [] {
      auto* allocator = new PoolAllocator(c10::GetCPUAllocator());
      c10::SetCPUAllocator(allocator);
      return allocator;
    }();
    (void)installed;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Pool* pool = current_pool();
    return pool == nullptr || bytes < Pool::kLeast ? torchs_->allocate(bytes) : pool->allocate(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return torchs_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  explicit PoolAllocator(c10::Allocator* torchs) : torchs_(torchs) {}
  c10::Allocator* torchs_;
};

}  // namespace mfp
