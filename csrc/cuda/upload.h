// Brings a kernel's table to the device, in the order of the current stream and without waiting for it.
#pragma once

#include <ATen/core/Tensor.h>

namespace mfp::cuda {

// A table in device memory. `owner` keeps the memory for as long as the caller needs to launch with it; after that the
// caching allocator reuses it in stream order.
struct Uploaded {
  at::Tensor owner;
  void* data;
};

// Copies `bytes` bytes to `device`. A table that was uploaded before on the same stream is found by its content and
// not copied again (the pruning step of every epoch, the optimiser step once its tensors stay put).
//
// While the stream is being captured, the copy becomes a node of the graph that reads the host memory again at each
// replay: that memory (a few KB a call) is then kept for the life of the process, and the cache is left alone.
Uploaded upload(const void* table, size_t bytes, c10::Device device);

}  // namespace mfp::cuda
