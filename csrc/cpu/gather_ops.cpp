// gather_channels on CPU tensors: what a join by index gives back to its branch. The schema is in mfp/ops.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "dtype_of.h"

namespace mfp::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // numbers of the result per task

// Channels innermost: rows of `channels` numbers become rows of `index.size()`.
template <class Stored>
void gather_rows(const Stored* from, Stored* to, int64_t rows, int64_t channels, const std::vector<int32_t>& index) {
  const int64_t kept = static_cast<int64_t>(index.size());
  const int32_t* const places = index.data();
  at::parallel_for(0, rows, std::max<int64_t>(kGrain / kept, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Stored* const source = from + row * channels;
      Stored* const target = to + row * kept;
      for (int64_t i = 0; i < kept; ++i) target[i] = source[places[i]];
    }
  });
}

// Positions innermost: whole planes are copied.
void gather_planes(const char* from, char* to, int64_t batch, int64_t channels, int64_t bytes,
                   const std::vector<int32_t>& index) {
  const int64_t kept = static_cast<int64_t>(index.size());
  at::parallel_for(0, batch * kept, std::max<int64_t>(4 * kGrain / bytes, 1), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      std::memcpy(to + plane * bytes, from + (plane / kept * channels + index[plane % kept]) * bytes, bytes);
    }
  });
}

at::Tensor gather_channels(const at::Tensor& x, const at::Tensor& index) {
  TORCH_CHECK(x.dim() >= 2 && index.dim() == 1 && index.scalar_type() == at::kLong && index.is_cpu(),
              "gather_channels: x is ", x.sizes(), ", index ", index.sizes(), " of ", index.scalar_type(), " on ",
              index.device(), "; expected x [B, C, ...] and an int64 index [K] on the same device");
  const auto format = x.suggest_memory_format();
  const at::Tensor dense = x.is_contiguous() ? x : x.contiguous(format);
  const int64_t channels = x.size(1);
  const at::Tensor channel_numbers = index.contiguous();
  const int64_t* const wanted = channel_numbers.const_data_ptr<int64_t>();
  std::vector<int32_t> places(index.numel());
  for (size_t i = 0; i < places.size(); ++i) {
    TORCH_CHECK(wanted[i] >= 0 && wanted[i] < channels, "gather_channels: index[", i, "] is ", wanted[i],
                "; expected a channel below ", channels);
    places[i] = static_cast<int32_t>(wanted[i]);
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[1] = index.numel();
  const bool last = !dense.is_contiguous();
  at::Tensor out = at::empty(sizes, x.options().memory_format(last ? format : at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const int64_t positions = x.numel() / x.size(0) / channels;
  const DType dtype = dtype_of(x);
  if (!last && positions > 1) {
    gather_planes(static_cast<const char*>(dense.const_data_ptr()), static_cast<char*>(out.mutable_data_ptr()),
                  x.size(0), channels, positions * (dtype == DType::float32 ? 4 : 2), places);
  } else if (dtype == DType::float32) {
    gather_rows(static_cast<const float*>(dense.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
                x.size(0) * positions, channels, places);
  } else {
    gather_rows(static_cast<const uint16_t*>(dense.const_data_ptr()), static_cast<uint16_t*>(out.mutable_data_ptr()),
                x.size(0) * positions, channels, places);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) { m.impl("gather_channels", &gather_channels); }

}  // namespace mfp::cpu
