// One row of a join with channels innermost: out = residual + branch at some channels, then ReLU. Included once per
// instruction set (vector.h).
//
// A vector of the residual takes the next few numbers of the branch, spread out by a bit mask: AVX-512 has an
// instruction for it, AVX2 a permutation by table, other processors go number by number.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "cpu/activate.h"
#include "cpu/formats.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

inline Vec rectified(Vec v, bool relu) { return relu ? (Vec{} > v ? Vec{} : v) : v; }  // NaN stays NaN

inline float rectified(float x, bool relu) { return relu && x < 0 ? 0.0f : x; }

// The first numbers of `next` go where the bits are, zeros elsewhere.
#if MFP_LANES == 16 && defined(__x86_64__)
inline Vec spread(Vec next, uint32_t bits) {
  return (Vec)_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), (__m512)next);
}
#elif MFP_LANES == 8 && defined(__x86_64__)
// of[bits][lane]: which of the next numbers lands in the lane; -1 (sign bit set) where none does.
struct Places {
  alignas(32) int32_t of[256][8] = {};
  constexpr Places() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int lane = 0, next = 0; lane < 8; ++lane) of[bits][lane] = (bits >> lane & 1) ? next++ : -1;
    }
  }
};
static constexpr Places spread_places;  // no code of this instruction set may run when the library is loaded
inline Vec spread(Vec next, uint32_t bits) {
  const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(spread_places.of[bits]));
  const __m256 spread = _mm256_permutevar8x32_ps((__m256)next, place);
  return (Vec)_mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
}
#endif

// Channels first to last of a row; r is the residual's, or null where it is zero, and may be out; q is the branch's
// first number that lands there, and landing has one bit per channel, with a word more than the row needs. kEnd:
// nothing may be read beyond the branch's last number.
template <class Format, bool kRelu, bool kEnd>
inline void join_row(typename Format::Stored* out, const typename Format::Stored* r, const typename Format::Stored* q,
                     const uint16_t* landing, int64_t first, int64_t last) {
  int64_t c = first;
#if MFP_LANES >= 8 && defined(__x86_64__)
  for (; c + kLanes <= last; c += kLanes) {
    const uint32_t words = landing[c / 16] | static_cast<uint32_t>(landing[c / 16 + 1]) << 16;
    const uint32_t bits = words >> (c % 16) & ((1u << kLanes) - 1);
    const int count = __builtin_popcount(bits);
    Vec next;
    if constexpr (kEnd && std::is_same_v<Format, Float>) {
      next = load_some(q, count);
    } else if (kEnd) {
      typename Format::Stored some[kLanes] = {};
      std::memcpy(some, q, count * sizeof *q);
      next = Format::load_vector(some);
    } else {
      next = Format::load_vector(q);
    }
    const Vec before = r == nullptr ? Vec{} : Format::load_vector(r + c);
    Format::store_vector(out + c, rectified(before + spread(next, bits), kRelu));
    q += count;
  }
#endif
#if MFP_LANES == 16 && defined(__x86_64__)
  if constexpr (std::is_same_v<Format, Float>) {
    if (c == last) return;
    const uint32_t words = landing[c / 16] | static_cast<uint32_t>(landing[c / 16 + 1]) << 16;
    const __mmask16 left = (1u << (last - c)) - 1, bits = words >> (c % 16) & left;
    const Vec next = (Vec)_mm512_maskz_expandloadu_ps(bits, q);
    const Vec sum = (r == nullptr ? Vec{} : (Vec)_mm512_maskz_loadu_ps(left, r + c)) + next;
    _mm512_mask_storeu_ps(out + c, left, (__m512)rectified(sum, kRelu));
    return;
  }
#endif
  for (; c < last; ++c) {
    float value = r == nullptr ? 0.0f : Format::load_one(r + c);
    if (landing[c / 16] >> (c % 16) & 1) value += Format::load_one(q++);
    Format::store_one(out + c, rectified(value, kRelu));
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA
#endif
