// scatter_add_ on CPU tensors. The schema is in mfp/schemas.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cpu/join/landing.h"
#include "cpu/join/scatter.h"
#include "dtype_of.h"

namespace mfp::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // numbers of the residual per task

struct Work {
  int64_t channels, branch_channels;
  int64_t outer, inner;         // channels innermost: rows and 1; otherwise batch and positions
  std::vector<int32_t> source;  // [channels]: the branch's channel that lands here, or -1
  std::vector<uint16_t> landing;
  bool last, relu;
};

Work describe(const at::Tensor& residual, const at::Tensor& branch, const at::Tensor& index, bool relu) {
  Work work;
  work.channels = residual.size(1), work.branch_channels = branch.size(1), work.relu = relu;
  work.landing = landing_bits("scatter_add_", index, work.channels);
  const int64_t* places = index.const_data_ptr<int64_t>();
  work.source.assign(work.channels, -1);
  for (int64_t i = 0; i < index.numel(); ++i) work.source[places[i]] = static_cast<int32_t>(i);
  work.last = !residual.is_contiguous();
  const int64_t numbers = residual.numel();
  work.outer = work.last ? numbers / work.channels : residual.size(0);
  work.inner = work.last ? 1 : numbers / std::max<int64_t>(residual.size(0) * work.channels, 1);
  if (work.inner == 1 && !work.last) work.last = true;  // [B, C]: rows in either reading
  return work;
}

void run(const Work& work, void* residual, const void* branch, DType dtype) {
  const Isa isa = current_isa();
  if (work.last) {
    const ScatterRows rows = {residual, branch, dtype, work.landing.data(), work.channels, work.branch_channels,
                              work.relu};
    const auto run = MFP_OF_ISA(isa, scatter_rows);
    at::parallel_for(0, work.outer, std::max<int64_t>(kGrain / work.channels, 1),
                     [&](int64_t begin, int64_t end) { run(rows, begin, end); });
    return;
  }
  const auto run = MFP_OF_ISA(isa, scatter_plane);
  const int64_t bytes = work.inner * (dtype == DType::float32 ? 4 : 2);
  at::parallel_for(
      0, work.outer * work.channels, std::max<int64_t>(kGrain / work.inner, 1), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
          const int64_t batch = plane / work.channels, from = work.source[plane % work.channels];
          const char* added = static_cast<const char*>(branch) + (batch * work.branch_channels + from) * bytes;
          run({static_cast<char*>(residual) + plane * bytes, from < 0 ? nullptr : added, dtype, work.inner, work.relu});
        }
      });
}

void scatter_add_(const at::Tensor& residual, const at::Tensor& branch, const at::Tensor& index, bool relu) {
  TORCH_CHECK(
      residual.dim() >= 2 && branch.dim() == residual.dim() && index.dim() == 1 && branch.size(1) == index.numel(),
      "scatter_add_: residual is ", residual.sizes(), ", branch ", branch.sizes(), ", index ", index.sizes(),
      "; expected index to name one channel of the residual for each channel of the branch");
  for (int64_t d = 0; d < residual.dim(); ++d) {
    TORCH_CHECK(d == 1 || residual.size(d) == branch.size(d), "scatter_add_: residual is ", residual.sizes(),
                ", branch ", branch.sizes(), "; expected sizes that differ in the channels alone");
  }
  TORCH_CHECK(branch.scalar_type() == residual.scalar_type() && index.scalar_type() == at::kLong && branch.is_cpu() &&
                  index.is_cpu(),
              "scatter_add_: branch is ", branch.scalar_type(), " on ", branch.device(), ", residual ",
              residual.scalar_type(), " on ", residual.device(), ", index ", index.scalar_type(), " on ",
              index.device(), "; expected one dtype, int64 index, one device");
  // not suggest_memory_format(), which looks at the strides of dimensions of size 1
  const auto format = residual.dim() == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
  TORCH_CHECK(residual.is_contiguous() || (residual.dim() > 3 && residual.is_contiguous(format)),
              "scatter_add_: residual has strides ", residual.strides(), "; expected contiguous or channels_last");
  if (residual.numel() == 0) return;
  const Work work = describe(residual, branch, index.contiguous(), relu);
  const at::Tensor source = residual.is_contiguous() ? branch.contiguous() : branch.contiguous(format);
  run(work, residual.mutable_data_ptr(), source.const_data_ptr(), dtype_of(residual));
  if (!residual.is_inference()) residual.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) { m.impl("scatter_add_", &scatter_add_); }

}  // namespace mfp::cpu
