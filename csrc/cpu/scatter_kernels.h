// The arithmetic of scatter.h, compiled once per instruction set (vector.h).
//
// With channels innermost, 16 channels of the residual take the next few numbers of the branch's row, spread out by a
// bit mask: AVX-512 has an instruction for it, AVX2 a permutation by table, other processors go number by number.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/scatter.h"
#include "cpu/vector.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

inline Vec rectified(Vec v, bool relu) { return relu ? (Vec{} > v ? Vec{} : v) : v; }  // NaN stays NaN

inline float rectified(float x, bool relu) { return relu && x < 0 ? 0.0f : x; }

// Vec-sized pieces of a row for as long as they fit, then single numbers.
inline void add_row(float* r, const float* b, int64_t size, bool relu) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(r + i, rectified(load(r + i) + load(b + i), relu));
  for (; i < size; ++i) r[i] = rectified(r[i] + b[i], relu);
}

// kEnd: nothing may be read beyond the numbers that land.
#if MFP_LANES == 16 && defined(__x86_64__)
template <bool kEnd>
inline Vec spread(const float* q, uint32_t bits) {
  const __mmask16 first = static_cast<__mmask16>((1u << __builtin_popcount(bits)) - 1);
  const __m512 next = kEnd ? _mm512_maskz_loadu_ps(first, q) : _mm512_loadu_ps(q);
  return (Vec)_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), next);
}
#elif MFP_LANES == 8 && defined(__x86_64__)
// of[bits][lane]: which of the next numbers lands in the lane; -1 (sign bit set) where none does.
struct Places {
  alignas(32) int32_t of[256][8];
  Places() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int lane = 0, next = 0; lane < 8; ++lane) of[bits][lane] = (bits >> lane & 1) ? next++ : -1;
    }
  }
};
static const Places places;
template <bool kEnd>
inline Vec spread(const float* q, uint32_t bits) {
  const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(places.of[bits]));
  __m256 next;
  if (kEnd) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    next = _mm256_maskload_ps(q, _mm256_cmpgt_epi32(_mm256_set1_epi32(__builtin_popcount(bits)), lanes));
  } else {
    next = _mm256_loadu_ps(q);
  }
  const __m256 spread = _mm256_permutevar8x32_ps(next, place);
  return (Vec)_mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
}
#endif

template <bool kRelu, bool kEnd>
inline void scatter_row(const ScatterRows& work, float* r, const float* q) {
  const int64_t channels = work.channels;
  int64_t c = 0;
#if MFP_LANES >= 8 && defined(__x86_64__)
  const uint16_t* landing = work.landing;
  for (; c + kLanes <= channels; c += kLanes) {
    const uint32_t bits = landing[c / 16] >> (c % 16) & ((1u << kLanes) - 1);
    store(r + c, rectified(load(r + c) + spread<kEnd>(q, bits), kRelu));
    q += __builtin_popcount(bits);
  }
#endif
  for (; c < channels; ++c) {
    float value = r[c];
    if (work.source[c] >= 0) value += *q++;
    r[c] = rectified(value, kRelu);
  }
}

template <bool kRelu>
void scatter_some(const ScatterRows& work, int64_t begin, int64_t end) {
  const auto residual = [&](int64_t row) { return work.residual + row * work.channels; };
  const auto branch = [&](int64_t row) { return work.branch + row * work.branch_channels; };
  int64_t row = begin;
  if (work.branch_channels >= kLanes) {  // reads beyond a row end in the next one
    for (; row + 1 < end; ++row) scatter_row<kRelu, false>(work, residual(row), branch(row));
  }
  for (; row < end; ++row) scatter_row<kRelu, true>(work, residual(row), branch(row));
}

void scatter_rows(const ScatterRows& work, int64_t begin, int64_t end) {
  if (work.branch_channels == work.channels) {
    const int64_t first = begin * work.channels;
    return add_row(work.residual + first, work.branch + first, (end - begin) * work.channels, work.relu);
  }
  return work.relu ? scatter_some<true>(work, begin, end) : scatter_some<false>(work, begin, end);
}

void add_plane(float* residual, const float* branch, int64_t size, bool relu) {
  if (branch != nullptr) return add_row(residual, branch, size, relu);
  if (!relu) return;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(residual + i, rectified(load(residual + i), true));
  for (; i < size; ++i) residual[i] = rectified(residual[i], true);
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void scatter_rows(const ScatterRows&, int64_t, int64_t) {}
void add_plane(float*, const float*, int64_t, bool) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
