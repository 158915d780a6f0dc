// Vectors of MFP_LANES floats with the compiler's vector types, for code that is compiled once per instruction set: the
// including file defines MFP_LANES, MFP_ISA (a namespace) and, for x86, MFP_TARGET. MFP_HAVE_ISA is 1 where this
// compiler and processor know the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define MFP_JOIN2(a, b) a##b
#define MFP_JOIN(a, b) MFP_JOIN2(a, b)
#define MFP_PRAGMA2(text) _Pragma(#text)
#define MFP_PRAGMA(text) MFP_PRAGMA2(text)

#if !defined(MFP_TARGET) || (defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__))
#define MFP_HAVE_ISA 1
#else
#define MFP_HAVE_ISA 0
#endif

// After the standard headers: their inline functions must stay portable.
#if MFP_HAVE_ISA && defined(MFP_TARGET)
#define MFP_BEGIN_ISA MFP_PRAGMA(GCC push_options) MFP_PRAGMA(GCC target(MFP_TARGET))
#define MFP_END_ISA MFP_PRAGMA(GCC pop_options)
#else
#define MFP_BEGIN_ISA
#define MFP_END_ISA
#endif

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

constexpr int kLanes = MFP_LANES;

typedef float Vec __attribute__((vector_size(4 * MFP_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * MFP_LANES)));
typedef uint32_t BitsVec __attribute__((vector_size(4 * MFP_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * MFP_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * MFP_LANES), aligned(4), may_alias));
typedef uint16_t LooseHalfVec __attribute__((vector_size(2 * MFP_LANES), aligned(2), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec absolute(Vec v) { return (Vec)((IntVec)v & 0x7fffffff); }
inline Vec select(IntVec mask, Vec v) { return (Vec)((IntVec)v & mask); }  // v where the mask is set, else 0
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
inline Vec root(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
}
inline double sum_of_lanes(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
inline bool any(IntVec mask) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
}

// ---- 16-bit floats --------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Branch-free so that it vectorises; the multiplication rebiases the exponent and normalises subnormal numbers.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const float finite = from_bits(magnitude << 13) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &finite, sizeof bits);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinities and NaN keep the top exponent
  return from_bits(bits | special | sign);
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA
#endif
