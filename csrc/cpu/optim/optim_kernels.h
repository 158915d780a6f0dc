// The optimisers' arithmetic, written once and compiled once per instruction set (vector.h).
//
// SGD joins products and sums (FMA) exactly where torch's single-tensor step joins them, so that both give the same
// bits; AdamW agrees to about 1e-7. The compiler joins a * b + c by itself; `apart` keeps it from that.
#include <algorithm>

#include "cpu/formats.h"
#include "cpu/optim/optim.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

// Hides a product's origin from the compiler, so that it is rounded before it is added to something.
template <class V>
inline V apart(V v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

inline float root(float x) { return std::sqrt(x); }

// V is a vector, or a single float for what is left over.
template <class V>
inline void update_sgd(const SgdStep& s, V gradient, V& value, V& momentum) {
  if (s.maximize) gradient = -gradient;
  if (s.weight_decay != 0) gradient = gradient + s.weight_decay * value;
  if (s.momentum != 0) {
    momentum = s.first_step ? gradient : apart(momentum * s.momentum) + s.dampening_rest * gradient;
    gradient = s.nesterov ? gradient + s.momentum * momentum : momentum;
  }
  value = value - s.lr * gradient;
}

template <class V>
inline void update_adamw(const AdamwStep& s, V gradient, V& value, V& mean, V& squares) {
  if (s.maximize) gradient = -gradient;
  mean = mean + s.beta1_rest * (gradient - mean);
  squares = apart(squares * s.beta2) + apart(s.beta2_rest * gradient) * gradient;
  const V scale = root(squares) / s.correction2_root + s.eps;
  value = apart(value * s.decay) - apart(s.step_size * mean) / scale;
}

// ---- rows ---------------------------------------------------------------------------------------------------------

// The hardware guesses that a stream of memory goes on, which is wrong at every pruned row: it is told what comes next.
inline void prefetch_row(const Parameter& p, int64_t row) {
  constexpr int64_t kLine = 64, kMostLines = 16;
  const int64_t bytes = p.row_size * (p.dtype == DType::float32 ? 4 : 2);
  for (int64_t at = row * bytes, end = at + std::min(bytes, kMostLines * kLine); at < end; at += kLine) {
    __builtin_prefetch(static_cast<const char*>(p.values) + at, 1);
    __builtin_prefetch(static_cast<const char*>(p.gradient) + at);
    __builtin_prefetch(static_cast<const char*>(p.first) + at, 1);
  }
}

// Calls visit(first element, one past the last) for each run of kept rows in [begin, end).
template <class Visit>
inline void each_kept_run(const Parameter& p, int64_t begin, int64_t end, Visit visit) {
  if (p.keep == nullptr) return visit(begin * p.row_size, end * p.row_size);
  const auto find = [&](int64_t row, bool kept) {
    while (row < end && p.keep[row] != kept) ++row;
    return row;
  };
  for (int64_t run = find(begin, true); run < end;) {
    const int64_t run_end = find(run, false), next = find(run_end, true);
    if (next < end) prefetch_row(p, next);
    visit(run * p.row_size, run_end * p.row_size);
    run = next;
  }
}

template <class Format>
void sgd_rows(const Parameter& p, const SgdStep& step, int64_t begin, int64_t end) {
  typedef typename Format::Stored Stored;
  const SgdStep s = step;
  Stored* values = static_cast<Stored*>(p.values);
  Stored* momenta = static_cast<Stored*>(p.first);
  const Stored* gradients = static_cast<const Stored*>(p.gradient);
  const bool reads_momentum = s.momentum != 0 && !s.first_step;
  each_kept_run(p, begin, end, [&](int64_t k, int64_t stop) {
    for (; k + kLanes <= stop; k += kLanes) {
      Vec value = Format::load_vector(values + k), momentum{};
      if (reads_momentum) momentum = Format::load_vector(momenta + k);
      update_sgd(s, Format::load_vector(gradients + k), value, momentum);
      Format::store_vector(values + k, value);
      if (s.momentum != 0) Format::store_vector(momenta + k, momentum);
    }
    for (; k < stop; ++k) {
      float value = Format::load_one(values + k), momentum = 0;
      if (reads_momentum) momentum = Format::load_one(momenta + k);
      update_sgd(s, Format::load_one(gradients + k), value, momentum);
      Format::store_one(values + k, value);
      if (s.momentum != 0) Format::store_one(momenta + k, momentum);
    }
  });
}

template <class Format>
void adamw_rows(const Parameter& p, const AdamwStep& step, int64_t begin, int64_t end) {
  typedef typename Format::Stored Stored;
  const AdamwStep s = step;
  Stored* values = static_cast<Stored*>(p.values);
  Stored* means = static_cast<Stored*>(p.first);
  Stored* squares = static_cast<Stored*>(p.second);
  const Stored* gradients = static_cast<const Stored*>(p.gradient);
  each_kept_run(p, begin, end, [&](int64_t k, int64_t stop) {
    for (; k + kLanes <= stop; k += kLanes) {
      Vec value = Format::load_vector(values + k), mean = Format::load_vector(means + k);
      Vec square = Format::load_vector(squares + k);
      update_adamw(s, Format::load_vector(gradients + k), value, mean, square);
      Format::store_vector(values + k, value);
      Format::store_vector(means + k, mean);
      Format::store_vector(squares + k, square);
    }
    for (; k < stop; ++k) {
      float value = Format::load_one(values + k), mean = Format::load_one(means + k);
      float square = Format::load_one(squares + k);
      update_adamw(s, Format::load_one(gradients + k), value, mean, square);
      Format::store_one(values + k, value);
      Format::store_one(means + k, mean);
      Format::store_one(squares + k, square);
    }
  });
}

void sgd(const Parameter& p, const SgdStep& step, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::float32: return sgd_rows<Float>(p, step, begin, end);
    case DType::bfloat16: return sgd_rows<Halves<Bfloat16>>(p, step, begin, end);
    case DType::float16: return sgd_rows<Halves<Float16>>(p, step, begin, end);
  }
}

void adamw(const Parameter& p, const AdamwStep& step, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::float32: return adamw_rows<Float>(p, step, begin, end);
    case DType::bfloat16: return adamw_rows<Halves<Bfloat16>>(p, step, begin, end);
    case DType::float16: return adamw_rows<Halves<Float16>>(p, step, begin, end);
  }
}

}  // namespace MFP_ISA

OptimKernels MFP_JOIN(MFP_ISA, _optim_kernels)() { return {MFP_ISA::sgd, MFP_ISA::adamw}; }

}  // namespace mfp::cpu

MFP_END_ISA

#else  // this compiler or processor has no such instruction set; isa.cpp never chooses it
namespace mfp::cpu {
OptimKernels MFP_JOIN(MFP_ISA, _optim_kernels)() { return portable_optim_kernels(); }
}  // namespace mfp::cpu
#endif
