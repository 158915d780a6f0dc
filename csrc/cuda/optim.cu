// masked_sgd_ and masked_adamw_. Memory-bound: 16 bytes an access, several of them on their way at once.
//
// Products and sums are joined (fmaf) where the CPU kernels join them, so that both give the same bits.
#include "cuda/device.h"
#include "cuda/optim.h"

namespace mfp::cuda {
namespace {

constexpr int kStepThreads = 256;
constexpr int kUnroll = 4;                                // vectors of four that a thread has on their way
constexpr int kPerItem = 4 * kStepThreads * 4 * kUnroll;  // elements of one item

struct Sgd {
  SgdStep step;
  __device__ bool reads_first() const { return step.momentum != 0.0f && !step.first_step; }
  __device__ bool writes_first() const { return step.momentum != 0.0f; }
  static constexpr bool kHasSecond = false;

  __device__ void update(float gradient, float& value, float& momentum, float&) const {
    if (step.maximize) gradient = -gradient;
    if (step.weight_decay != 0.0f) gradient = fmaf(step.weight_decay, value, gradient);
    if (step.momentum != 0.0f) {
      momentum = step.first_step ? gradient : fmaf(step.dampening_rest, gradient, __fmul_rn(momentum, step.momentum));
      gradient = step.nesterov ? fmaf(step.momentum, momentum, gradient) : momentum;
    }
    value = fmaf(-step.lr, gradient, value);
  }
};

struct Adamw {
  AdamwStep step;
  __device__ bool reads_first() const { return true; }
  __device__ bool writes_first() const { return true; }
  static constexpr bool kHasSecond = true;

  __device__ void update(float gradient, float& value, float& mean, float& squares) const {
    if (step.maximize) gradient = -gradient;
    mean = fmaf(step.beta1_rest, gradient - mean, mean);
    squares = fmaf(__fmul_rn(step.beta2_rest, gradient), gradient, __fmul_rn(squares, step.beta2));
    const float scale = sqrtf(squares) / step.correction2_root + step.eps;
    value = __fmul_rn(value, step.decay) - __fmul_rn(step.step_size, mean) / scale;
  }
};

// Which filter an element belongs to, without a 64-bit division for each.
struct Rows {
  const bool* keep;  // of the first filter of the item; null: all are kept
  int64_t row_size;
  int64_t into_row;  // where in its row the item begins

  __device__ Rows(const Parameter& parameter, const bool* mask, int64_t begin) {
    row_size = parameter.row_size;
    into_row = begin % row_size;
    keep = parameter.keep_offset < 0 ? nullptr : mask + parameter.keep_offset + begin / row_size;
  }
  __device__ bool kept(int offset) const {
    if (keep == nullptr) return true;
    const int64_t position = into_row + offset;
    if (row_size >= kPerItem) return keep[position >= row_size];
    return keep[static_cast<uint32_t>(position) / static_cast<uint32_t>(row_size)];
  }
};

template <class Number>
struct alignas(4 * sizeof(Number)) Four {
  Number at[4];
};

template <class Number, class Step>
__device__ void update_vectors(const Step& step, const Parameter& parameter, const Rows& rows, int64_t begin,
                               int count) {
  using Vector = Four<Number>;
  Vector* values = reinterpret_cast<Vector*>(static_cast<Number*>(parameter.values) + begin);
  Vector* firsts = reinterpret_cast<Vector*>(static_cast<Number*>(parameter.first) + begin);
  Vector* seconds = reinterpret_cast<Vector*>(static_cast<Number*>(parameter.second) + begin);
  const Vector* gradients = reinterpret_cast<const Vector*>(static_cast<const Number*>(parameter.gradient) + begin);
  for (int base = static_cast<int>(threadIdx.x); base < count / 4; base += kStepThreads * kUnroll) {
    Vector value[kUnroll], gradient[kUnroll], first[kUnroll], second[kUnroll];
    bool kept[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = base + u * kStepThreads;
      kept[u] = at < count / 4 && rows.kept(4 * at);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = base + u * kStepThreads;
      if (!kept[u]) continue;
      value[u] = values[at];
      gradient[u] = gradients[at];
      if (step.reads_first()) first[u] = firsts[at];
      if (Step::kHasSecond) second[u] = seconds[at];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = base + u * kStepThreads;
      if (!kept[u]) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float x = value[u].at[e].widen(), m = 0.0f, v = 0.0f;
        if (step.reads_first()) m = first[u].at[e].widen();
        if (Step::kHasSecond) v = second[u].at[e].widen();
        step.update(gradient[u].at[e].widen(), x, m, v);
        value[u].at[e] = Number::narrow(x);
        first[u].at[e] = Number::narrow(m);
        second[u].at[e] = Number::narrow(v);
      }
      values[at] = value[u];
      if (step.writes_first()) firsts[at] = first[u];
      if (Step::kHasSecond) seconds[at] = second[u];
    }
  }
}

// Elements [from, count) of an item one by one: the rest of a parameter, and parameters with rows of odd sizes.
template <class Number, class Step>
__device__ void update_singles(const Step& step, const Parameter& parameter, const Rows& rows, int64_t begin, int from,
                               int count) {
  Number* values = static_cast<Number*>(parameter.values) + begin;
  Number* firsts = static_cast<Number*>(parameter.first) + begin;
  Number* seconds = static_cast<Number*>(parameter.second) + begin;
  const Number* gradients = static_cast<const Number*>(parameter.gradient) + begin;
#pragma unroll 4
  for (int at = from + static_cast<int>(threadIdx.x); at < count; at += kStepThreads) {
    if (!rows.kept(at)) continue;
    float x = values[at].widen(), m = 0.0f, v = 0.0f;
    if (step.reads_first()) m = firsts[at].widen();
    if (Step::kHasSecond) v = seconds[at].widen();
    step.update(gradients[at].widen(), x, m, v);
    values[at] = Number::narrow(x);
    if (step.writes_first()) firsts[at] = Number::narrow(m);
    if (Step::kHasSecond) seconds[at] = Number::narrow(v);
  }
}

template <class Number, class Step>
__device__ void update_item(const Step& step, const Parameter& parameter, const Rows& rows, int64_t begin, int count) {
  const int vectors = parameter.vectors != 0 ? count / 4 * 4 : 0;
  update_vectors<Number>(step, parameter, rows, begin, vectors);
  update_singles<Number>(step, parameter, rows, begin, vectors, count);
}

template <class Step>
__global__ void __launch_bounds__(kStepThreads)
    step_kernel(const Parameter* parameters, int32_t parameter_count, const bool* keep, const Step step) {
  const int64_t item = blockIdx.x;
  const Parameter parameter = parameters[find_entry(parameters, parameter_count, item)];
  const int64_t begin = (item - parameter.first_item) * kPerItem, left = parameter.numel - begin;
  const int count = left < kPerItem ? static_cast<int>(left) : kPerItem;
  const Rows rows(parameter, keep, begin);
  if (parameter.dtype == DType::float32) {
    update_item<Float32>(step, parameter, rows, begin, count);
  } else if (parameter.dtype == DType::bfloat16) {
    update_item<Bfloat16>(step, parameter, rows, begin, count);
  } else {
    update_item<Float16>(step, parameter, rows, begin, count);
  }
}

template <class Step>
cudaError_t launch_step(const Parameter* parameters, int32_t count, int64_t items, const bool* keep, const Step& step,
                        cudaStream_t stream) {
  if (items == 0) return cudaSuccess;
  if (!fits_grid(items)) return cudaErrorInvalidConfiguration;
  MFP_LAUNCH(step_kernel<Step>, static_cast<unsigned>(items), kStepThreads, 0, stream, parameters, count, keep, step);
  return cudaGetLastError();
}

}  // namespace

int64_t plan_step(std::vector<Parameter>& parameters) {
  int64_t items = 0;
  for (Parameter& parameter : parameters) {
    const uintptr_t alignment = parameter.dtype == DType::float32 ? 16 : 8;
    const auto aligned = [&](const void* data) { return reinterpret_cast<uintptr_t>(data) % alignment == 0; };
    parameter.vectors = (parameter.keep_offset < 0 || parameter.row_size % 4 == 0) && aligned(parameter.values) &&
                        aligned(parameter.gradient) && aligned(parameter.first) && aligned(parameter.second);
    parameter.first_item = items;
    items += (parameter.numel + kPerItem - 1) / kPerItem;
  }
  return items;
}

cudaError_t launch_sgd(const Parameter* parameters, int32_t count, int64_t items, const bool* keep, SgdStep step,
                       cudaStream_t stream) {
  return launch_step(parameters, count, items, keep, Sgd{step}, stream);
}

cudaError_t launch_adamw(const Parameter* parameters, int32_t count, int64_t items, const bool* keep, AdamwStep step,
                         cudaStream_t stream) {
  return launch_step(parameters, count, items, keep, Adamw{step}, stream);
}

}  // namespace mfp::cuda
