#include "cuda/upload.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <cstring>
#include <list>
#include <mutex>
#include <vector>

namespace mfp::cuda {
namespace {

constexpr size_t kCached = 64;  // tables kept; the least recently used goes first

struct Entry {
  std::vector<char> content;
  c10::cuda::CUDAStream stream;  // the copy is ordered before any later use on this stream, and only there
  at::Tensor host, device;
};

std::mutex mutex;
// Never destroyed: at exit the CUDA context may be gone before static objects are.
std::list<Entry>& cache() {
  static auto* entries = new std::list<Entry>;
  return *entries;
}
std::vector<at::Tensor>& captured() {
  static auto* tables = new std::vector<at::Tensor>;
  return *tables;
}

at::Tensor pinned_copy(const void* table, size_t bytes) {
  const c10::cuda::CUDAStreamCaptureModeGuard allow_allocation(cudaStreamCaptureModeRelaxed);
  auto host = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  std::memcpy(host.mutable_data_ptr(), table, bytes);
  return host;
}

}  // namespace

Uploaded upload(const void* table, size_t bytes, c10::Device device) {
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& entries = cache();
  if (!capturing) {
    for (auto entry = entries.begin(); entry != entries.end(); ++entry) {
      if (entry->stream == stream && entry->content.size() == bytes &&
          std::memcmp(entry->content.data(), table, bytes) == 0) {
        entries.splice(entries.begin(), entries, entry);
        return {entry->device, entry->device.mutable_data_ptr()};
      }
    }
  }
  at::Tensor host = pinned_copy(table, bytes);
  at::Tensor on_device = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device));
  on_device.copy_(host, /*non_blocking=*/true);
  if (capturing) {
    captured().push_back(host);
  } else {
    const char* begin = static_cast<const char*>(table);
    entries.push_front({std::vector<char>(begin, begin + bytes), stream, host, on_device});
    if (entries.size() > kCached) entries.pop_back();
  }
  return {on_device, on_device.mutable_data_ptr()};
}

}  // namespace mfp::cuda
