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

inline Vec rectified(Vec v, bool relu) { return relu ? (v < 0 ? Vec{} : v) : v; }  // NaN stays NaN

inline float rectified(float x, bool relu) { return relu && x < 0 ? 0.0f : x; }

// Vec-sized pieces of a row for as long as they fit, then single numbers.
inline void add_row(float* r, const float* b, int64_t size, bool relu) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(r + i, rectified(load(r + i) + load(b + i), relu));
  for (; i < size; ++i) r[i] = rectified(r[i] + b[i], relu);
}

#if MFP_LANES == 16 && defined(__x86_64__)
inline Vec spread(const float* q, uint32_t bits) {
  const __mmask16 first = static_cast<__mmask16>((1u << __builtin_popcount(bits)) - 1);
  return (Vec)_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_maskz_loadu_ps(first, q));
}
#elif MFP_LANES == 8 && defined(__x86_64__)
// places[bits][lane]: which of the next numbers lands in the lane; -1 (sign bit set) where none does.
struct Places {
  alignas(32) int32_t of[256][8];
  Places() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int lane = 0, next = 0; lane < 8; ++lane) of[bits][lane] = (bits >> lane & 1) ? next++ : -1;
    }
  }
};
inline Vec spread(const float* q, uint32_t bits) {
  static const Places places;
  const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(places.of[bits]));
  const int count = __builtin_popcount(bits);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);  // do not read past the branch's end
  const __m256 next = _mm256_maskload_ps(q, there);
  const __m256 spread = _mm256_permutevar8x32_ps(next, place);
  return (Vec)_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)), spread);
}
#endif

inline void scatter_row(const ScatterRows& work, float* r, const float* q) {
  int64_t c = 0;
#if MFP_LANES >= 8 && defined(__x86_64__)
  for (; c + kLanes <= work.channels; c += kLanes) {
    const uint32_t bits = work.landing[c / 16] >> (c % 16) & ((1u << kLanes) - 1);
    store(r + c, rectified(load(r + c) + spread(q, bits), work.relu));
    q += __builtin_popcount(bits);
  }
#endif
  const float* row = q;
  for (; c < work.channels; ++c) {
    float value = r[c];
    if (work.source[c] >= 0) value += *row++;
    r[c] = rectified(value, work.relu);
  }
}

void scatter_rows(const ScatterRows& work, int64_t begin, int64_t end) {
  const bool all = work.branch_channels == work.channels;
  for (int64_t row = begin; row < end; ++row) {
    float* r = work.residual + row * work.channels;
    const float* q = work.branch + row * work.branch_channels;
    if (all) {
      add_row(r, q, work.channels, work.relu);
    } else {
      scatter_row(work, r, q);
    }
  }
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
