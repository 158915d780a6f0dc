// The arithmetic of activation.h, and the ends of rows that no vector fills. Included once per instruction set
// (vector.h).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/activation.h"
#include "cpu/vector.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

// The first `count` numbers of a vector, then zeros; nothing beyond them is touched.
#if MFP_LANES == 16 && defined(__x86_64__)
inline __mmask16 some(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vec load_some(const float* p, int64_t count) { return (Vec)_mm512_maskz_loadu_ps(some(count), p); }
inline void store_some(float* p, Vec v, int64_t count) { _mm512_mask_storeu_ps(p, some(count), (__m512)v); }
#elif MFP_LANES == 8 && defined(__x86_64__)
inline __m256i some(int64_t count) {
  const IntVec number = {0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)(number < static_cast<int32_t>(count));
}
inline Vec load_some(const float* p, int64_t count) { return (Vec)_mm256_maskload_ps(p, some(count)); }
inline void store_some(float* p, Vec v, int64_t count) { _mm256_maskstore_ps(p, some(count), (__m256)v); }
#else
inline Vec load_some(const float* p, int64_t count) {
  if (count == kLanes) return load(p);
  Vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void store_some(float* p, Vec v, int64_t count) {
  if (count == kLanes) return store(p, v);
  std::memcpy(p, &v, count * sizeof(float));
}
#endif

// a * b + c, rounded once where the instruction set can: which products of `a * b + c` are is the compiler's choice,
// and differs between copies of a loop.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if MFP_LANES == 16 && defined(__x86_64__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif MFP_LANES == 8 && defined(__x86_64__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

template <class V>
inline V clamp_to(V v, V low, V high) {  // NaN stays NaN
  v = low > v ? low : v;
  return v > high ? high : v;
}

// e to the power of v, to 2e-7 of it, and infinity above 88.4: 2^n by the exponent's bits, the rest by its series.
inline Vec exponential(Vec v) {
  v = clamp_to(v, broadcast(-87.3f), broadcast(88.8f));
  const Vec magic = broadcast(0x1.8p23f), shifted = v * 1.44269504f + magic, n = shifted - magic;
  const IntVec power = (IntVec)shifted - (IntVec)magic;
  const Vec rest = v - n * 0.693359375f + n * 2.12194440e-4f;  // minus n times the logarithm of 2, in two parts
  Vec sum = broadcast(1.0f / 5040);
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + factor;
  return sum * (Vec)((power + 127) << 23);
}

inline Vec bent(Vec v, Curve curve) {
  if (curve == Curve::hardswish) return v * clamp_to(v + 3.0f, Vec{}, broadcast(6)) * (1.0f / 6);
  return v / (exponential(-v) + 1.0f);
}

// Numbers that lie side by side, in place.
static __attribute__((noinline)) void bend(float* numbers, int64_t count, Curve curve) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(numbers + i, bent(load(numbers + i), curve));
  if (i < count) store_some(numbers + i, bent(load_some(numbers + i, count - i), curve), count - i);
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA
#endif
