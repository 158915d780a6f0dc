// scatter_add_: the join of a residual stream with a branch that kept some of its channels.
#include "cuda/device.h"
#include "cuda/scatter.h"

namespace mfp::cuda {
namespace {

constexpr int kScatterThreads = 256;
constexpr int64_t kPlaneChunk = 8 * kScatterThreads;  // contiguous: elements of a channel that a block takes
constexpr int64_t kPixels = 64;                       // channels_last: pixels that a block takes

// Where the index has this channel, or -1.
__device__ inline int64_t find_channel(const int64_t* index, int64_t count, int64_t channel) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (index[middle] < channel) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && index[low] == channel ? low : -1;
}

template <class Number>
__device__ inline void join(Number* residual, const Number* branch, bool relu) {
  float sum = residual->widen();
  if (branch != nullptr) sum += branch->widen();
  if (relu && sum < 0.0f) sum = 0.0f;  // keeps a NaN, as torch.relu does
  *residual = Number::narrow(sum);
}

// A channel that this thread has work on: every one if there is a ReLU, else those of the branch.
struct Channel {
  int64_t residual, branch;  // -1: not in the branch
  __device__ Channel(const ScatterAdd& s, int64_t number) {
    residual = s.relu ? number : s.index[number];
    branch = s.relu ? find_channel(s.index, s.branch_channels, number) : number;
  }
};

// inner > 1: a block has part of one plane.
template <class Number>
__global__ void __launch_bounds__(kScatterThreads) planes_kernel(const ScatterAdd s) {
  const int64_t channels = s.relu ? s.channels : s.branch_channels;
  const int64_t chunks = (s.inner + kPlaneChunk - 1) / kPlaneChunk;
  const int64_t plane = blockIdx.x / chunks, begin = blockIdx.x % chunks * kPlaneChunk;
  const int64_t outer = plane / channels;
  const Channel channel(s, plane % channels);
  Number* residual = static_cast<Number*>(s.residual) + (outer * s.channels + channel.residual) * s.inner;
  const Number* branch = static_cast<const Number*>(s.branch) + (outer * s.branch_channels + channel.branch) * s.inner;
  const int64_t end = begin + kPlaneChunk < s.inner ? begin + kPlaneChunk : s.inner;
#pragma unroll 4
  for (int64_t at = begin + threadIdx.x; at < end; at += kScatterThreads) {
    join(residual + at, channel.branch < 0 ? nullptr : branch + at, s.relu);
  }
}

// inner = 1: a thread keeps its channel and walks over pixels.
template <class Number>
__global__ void __launch_bounds__(kScatterThreads) pixels_kernel(const ScatterAdd s) {
  const int64_t channels = s.relu ? s.channels : s.branch_channels;
  const int64_t width = channels < kScatterThreads ? channels : kScatterThreads;  // channels side by side in a block
  const int64_t groups = (channels + width - 1) / width, lanes = kScatterThreads / width;
  const int64_t number = blockIdx.x % groups * width + threadIdx.x % width, lane = threadIdx.x / width;
  if (number >= channels || lane >= lanes) return;
  const Channel channel(s, number);
  const int64_t begin = blockIdx.x / groups * kPixels, end = begin + kPixels < s.outer ? begin + kPixels : s.outer;
#pragma unroll 4
  for (int64_t pixel = begin + lane; pixel < end; pixel += lanes) {
    const Number* branch = static_cast<const Number*>(s.branch) + pixel * s.branch_channels + channel.branch;
    join(static_cast<Number*>(s.residual) + pixel * s.channels + channel.residual,
         channel.branch < 0 ? nullptr : branch, s.relu);
  }
}

template <class Number>
cudaError_t launch(const ScatterAdd& s, cudaStream_t stream) {
  const int64_t channels = s.relu ? s.channels : s.branch_channels;
  if (channels == 0 || s.outer == 0 || s.inner == 0) return cudaSuccess;
  if (s.inner > 1) {
    const int64_t blocks = s.outer * channels * ((s.inner + kPlaneChunk - 1) / kPlaneChunk);
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    MFP_LAUNCH(planes_kernel<Number>, static_cast<unsigned>(blocks), kScatterThreads, 0, stream, s);
  } else {
    const int64_t width = channels < kScatterThreads ? channels : kScatterThreads;
    const int64_t blocks = (channels + width - 1) / width * ((s.outer + kPixels - 1) / kPixels);
    if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
    MFP_LAUNCH(pixels_kernel<Number>, static_cast<unsigned>(blocks), kScatterThreads, 0, stream, s);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_scatter_add(const ScatterAdd& arguments, cudaStream_t stream) {
  if (arguments.dtype == DType::float32) return launch<Float32>(arguments, stream);
  if (arguments.dtype == DType::bfloat16) return launch<Bfloat16>(arguments, stream);
  return launch<Float16>(arguments, stream);
}

}  // namespace mfp::cuda
