// scatter_add_ and join_channels on CPU tensors. The schemas are in mfp/schemas.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/join/landing.h"
#include "cpu/join/scatter.h"
#include "cpu/tasks.h"
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

// out: of the residual's shape and layout.
Work describe(const at::Tensor& out, const at::Tensor& branch, const at::Tensor& index, bool relu) {
  Work work;
  work.channels = out.size(1), work.branch_channels = branch.size(1), work.relu = relu;
  work.landing = landing_bits("join", index, work.channels);
  const int64_t* places = index.const_data_ptr<int64_t>();
  work.source.assign(work.channels, -1);
  for (int64_t i = 0; i < index.numel(); ++i) work.source[places[i]] = static_cast<int32_t>(i);
  work.last = !out.is_contiguous();
  const int64_t numbers = out.numel();
  work.outer = work.last ? numbers / work.channels : out.size(0);
  work.inner = work.last ? 1 : numbers / std::max<int64_t>(out.size(0) * work.channels, 1);
  if (work.inner == 1 && !work.last) work.last = true;  // [B, C]: rows in either reading
  return work;
}

// Calls work(begin, end) for stretches of the rows below count, a row of that many numbers each.
template <class Rows>
void by_rows(int64_t count, int64_t numbers, const Rows& work) {
  const int64_t tasks = std::clamp<int64_t>(count * numbers / kGrain, 1, count);
  run_phase(tasks, [=](int64_t task) { work(count * task / tasks, count * (task + 1) / tasks); });
}

void run(Work given, void* out, const void* residual, const void* branch, DType dtype) {
  const auto kept = std::make_shared<const Work>(std::move(given));
  const Isa isa = current_isa();
  if (kept->last) {
    const ScatterRows rows = {
        out, residual, branch, dtype, kept->landing.data(), kept->channels, kept->branch_channels, kept->relu};
    const auto run = MFP_OF_ISA(isa, scatter_rows);
    return by_rows(kept->outer, kept->channels,
                   [=, kept = kept](int64_t begin, int64_t end) { run(rows, begin, end); });
  }
  const auto run = MFP_OF_ISA(isa, scatter_plane);
  by_rows(kept->outer * kept->channels, kept->inner, [=](int64_t begin, int64_t end) {
    const Work& work = *kept;
    const int64_t bytes = work.inner * (dtype == DType::float32 ? 4 : 2);
    const auto at_byte = [](const void* p, int64_t place) { return p ? static_cast<const char*>(p) + place : nullptr; };
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t batch = plane / work.channels, from = work.source[plane % work.channels];
      const void* added = from < 0 ? nullptr : at_byte(branch, (batch * work.branch_channels + from) * bytes);
      run({static_cast<char*>(out) + plane * bytes, at_byte(residual, plane * bytes), added, dtype, work.inner,
           work.relu});
    }
  });
}

void check(const at::Tensor& residual, const at::Tensor& branch, const at::Tensor& index) {
  TORCH_CHECK(
      residual.dim() >= 2 && branch.dim() == residual.dim() && index.dim() == 1 && branch.size(1) == index.numel(),
      "join: residual is ", residual.sizes(), ", branch ", branch.sizes(), ", index ", index.sizes(),
      "; expected index to name one channel of the residual for each channel of the branch");
  for (int64_t d = 0; d < residual.dim(); ++d) {
    TORCH_CHECK(d == 1 || residual.size(d) == branch.size(d), "join: residual is ", residual.sizes(), ", branch ",
                branch.sizes(), "; expected sizes that differ in the channels alone");
  }
  TORCH_CHECK(branch.scalar_type() == residual.scalar_type() && index.scalar_type() == at::kLong && branch.is_cpu() &&
                  index.is_cpu(),
              "join: branch is ", branch.scalar_type(), " on ", branch.device(), ", residual ", residual.scalar_type(),
              " on ", residual.device(), ", index ", index.scalar_type(), " on ", index.device(),
              "; expected one dtype, int64 index, one device");
}

// not suggest_memory_format(), which looks at the strides of dimensions of size 1
at::MemoryFormat channels_last(int64_t dims) {
  return dims == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

bool is_channels_last(const at::Tensor& tensor) {
  return tensor.dim() > 3 && tensor.dim() < 6 && tensor.is_contiguous(channels_last(tensor.dim()));
}

void scatter_add_(const at::Tensor& residual, const at::Tensor& branch, const at::Tensor& index, bool relu) {
  check(residual, branch, index);
  TORCH_CHECK(residual.is_contiguous() || is_channels_last(residual), "join: residual has strides ", residual.strides(),
              "; expected contiguous or channels_last");
  if (residual.numel() == 0) return;
  Work work = describe(residual, branch, index.contiguous(), relu);
  const at::Tensor source =
      in_order(branch, residual.is_contiguous() ? at::MemoryFormat::Contiguous : channels_last(residual.dim()));
  void* const out = residual.mutable_data_ptr();
  run(std::move(work), out, out, source.const_data_ptr(), dtype_of(residual));
  if (!residual.is_inference()) residual.unsafeGetTensorImpl()->bump_version();
}

// The join as a tensor of its own, in the residual's layout; without a residual zeros, in the branch's.
at::Tensor join_channels(const std::optional<at::Tensor>& given, const at::Tensor& branch, const at::Tensor& index,
                         int64_t channels) {
  const at::Tensor& like = given ? *given : branch;
  const auto format = !like.is_contiguous() && (like.dim() == 4 || like.dim() == 5) ? channels_last(like.dim())
                                                                                    : at::MemoryFormat::Contiguous;
  std::vector<int64_t> sizes = branch.sizes().vec();
  if (sizes.size() > 1) sizes[1] = channels;
  const at::Tensor out = at::empty(sizes, branch.options().memory_format(format));
  check(given ? *given : out, branch, index);
  TORCH_CHECK(!given || given->size(1) == channels, "join: residual is ", like.sizes(), "; expected ", channels,
              " channels");
  if (out.numel() == 0) return out;
  Work work = describe(out, branch, index.contiguous(), false);
  const at::Tensor source = in_order(branch, format);
  const at::Tensor residual = given ? in_order(*given, format) : at::Tensor();
  run(std::move(work), out.mutable_data_ptr(), given ? residual.const_data_ptr() : nullptr, source.const_data_ptr(),
      dtype_of(branch));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(mfp, CPU, m) {
  m.impl("scatter_add_", &scatter_add_);
  m.impl("join_channels", &join_channels);
}

}  // namespace mfp::cpu
