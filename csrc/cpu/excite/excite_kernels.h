// The arithmetic of excite.h, compiled once per instruction set (vector.h).
#include <type_traits>

#include "cpu/activate.h"
#include "cpu/excite/excite.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

// Calls work(c, count) for vectors of channels, the last one perhaps not full.
template <class Work>
inline void by_vectors(int64_t channels, Work work) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) work(c, std::integral_constant<int64_t, kLanes>());
  if (c < channels) work(c, channels - c);
}

void excite_sums(const Excite& work, int64_t image, int64_t stretch, float* sums) {
  const int64_t first = work.first(stretch), pixels = work.first(stretch + 1) - first;
  const float* in = work.images + (image * work.pixels + first) * work.channels;
  constexpr int kSide = 4;  // vectors at once: a whole line of additions is not waited for
  int64_t c = 0;
  for (; c + kSide * kLanes <= work.channels; c += kSide * kLanes) {
    Vec sum[kSide] = {};
    for (int64_t p = 0; p < pixels; ++p) {
      for (int v = 0; v < kSide; ++v) sum[v] += load(in + p * work.channels + c + v * kLanes);
    }
    for (int v = 0; v < kSide; ++v) store(sums + c + v * kLanes, sum[v]);
  }
  by_vectors(work.channels - c, [&](int64_t more, auto count) {
    Vec sum = {};
    for (int64_t p = 0; p < pixels; ++p) sum += load_some(in + p * work.channels + c + more, count);
    store_some(sums + c + more, sum, count);
  });
}

void excite_means(const Excite& work, const float* sums, float* means) {
  const float share = 1.0f / static_cast<float>(work.pixels);
  by_vectors(work.channels, [&](int64_t c, auto count) {
    Vec sum = {};
    for (int64_t s = 0; s < work.stretches(); ++s) sum += load_some(sums + s * work.channels + c, count);
    store_some(means + c, sum * share, count);
  });
}

void excite_hidden(const Excite& work, const float* means, int64_t first, int64_t last, float* hidden) {
  for (int64_t h = first; h < last; ++h) {
    Vec sum = {};
    by_vectors(work.channels, [&](int64_t c, auto count) {
      sum += load_some(means + c, count) * load_some(work.reduce_weight + h * work.channels + c, count);
    });
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    hidden[h] = total + work.reduce_bias[h];
  }
  const Vec low = broadcast(work.activation.low), high = broadcast(work.activation.high);
  by_vectors(last - first, [&](int64_t h, auto count) {
    store_some(hidden + first + h, clamp_to(load_some(hidden + first + h, count), low, high), count);
  });
  if (work.activation.curve != Curve::none) bend(hidden + first, last - first, work.activation.curve);
}

void excite_gates(const Excite& work, const float* hidden, int64_t first, int64_t last, float* gates) {
  by_vectors(last - first, [&](int64_t more, auto count) {
    const int64_t c = first + more;
    Vec sum = load_some(work.expand_bias + c, count);
    for (int64_t h = 0; h < work.hidden; ++h) {
      sum += load_some(work.expand_weight + h * work.channels + c, count) * hidden[h];
    }
    const Vec hard = clamp_to(sum * (1.0f / 6) + 0.5f, Vec{}, broadcast(1));
    store_some(gates + c, work.hard ? hard : 1.0f / (exponential(-sum) + 1.0f), count);
  });
}

void excite_scale(const Excite& work, int64_t image, int64_t stretch, const float* gates) {
  const int64_t first = work.first(stretch), last = work.first(stretch + 1);
  for (int64_t p = first; p < last; ++p) {
    float* row = work.images + (image * work.pixels + p) * work.channels;
    by_vectors(work.channels, [&](int64_t c, auto count) {
      store_some(row + c, load_some(row + c, count) * load_some(gates + c, count), count);
    });
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void excite_sums(const Excite&, int64_t, int64_t, float*) {}
void excite_means(const Excite&, const float*, float*) {}
void excite_hidden(const Excite&, const float*, int64_t, int64_t, float*) {}
void excite_gates(const Excite&, const float*, int64_t, int64_t, float*) {}
void excite_scale(const Excite&, int64_t, int64_t, const float*) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
