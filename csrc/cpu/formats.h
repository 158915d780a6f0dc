// Numbers in memory as float vectors, and back: float32, bfloat16, float16. Included once per instruction set
// (vector.h).
#pragma once

#include "cpu/vector.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

struct Float {
  typedef float Stored;
  static Vec load_vector(const float* p) { return load(p); }
  static void store_vector(float* p, Vec v) { store(p, v); }
  static float load_one(const float* p) { return *p; }
  static void store_one(float* p, float x) { *p = x; }
};

inline BitsVec bits_of(Vec v) { return (BitsVec)v; }
inline BitsVec load_halves(const uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const LooseHalfVec*>(p), BitsVec);
}
inline void store_halves(uint16_t* p, BitsVec bits) {
  *reinterpret_cast<LooseHalfVec*>(p) = __builtin_convertvector(bits, HalfVec);
}

// One element through a vector: parameters in 16 bits are rarely short.
template <class Format>
struct Halves {
  typedef uint16_t Stored;
  static Vec load_vector(const uint16_t* p) { return Format::widen(load_halves(p)); }
  static void store_vector(uint16_t* p, Vec v) { store_halves(p, Format::narrow(v)); }
  static float load_one(const uint16_t* p) { return Format::widen(BitsVec{*p})[0]; }
  static void store_one(uint16_t* p, float x) { *p = static_cast<uint16_t>(Format::narrow(Vec{x})[0]); }
};

// Narrowing rounds to nearest, ties to even.
struct Bfloat16 {
  static Vec widen(BitsVec bits) { return (Vec)(bits << 16); }
  static BitsVec narrow(Vec v) {
    const BitsVec bits = bits_of(v);
    const BitsVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return v == v ? rounded : (bits >> 16) | 0x40;
  }
};

struct Float16 {
  static Vec widen(BitsVec half) {
    const BitsVec magnitude = half & 0x7fff;
    const Vec finite = (Vec)(magnitude << 13) * 0x1p112f;
    const BitsVec special = magnitude >= 0x7c00 ? BitsVec{} + 0x7f800000u : BitsVec{};
    return (Vec)(bits_of(finite) | special | (half & 0x8000) << 16);
  }
  static BitsVec narrow(Vec v) {
    const BitsVec bits = bits_of(v), magnitude = bits & 0x7fffffff;
    // Below 2^-14 the sum with 0.5 has the subnormal result as its low bits, rounded by the addition.
    const BitsVec subnormal = bits_of((Vec)magnitude + 0.5f) - 0x3f000000u;
    const BitsVec normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    BitsVec half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? BitsVec{} + 0x7c00u : half;  // 65520 and more round to infinity
    half = magnitude > 0x7f800000u ? BitsVec{} + 0x7e00u : half;
    return half | ((bits >> 16) & 0x8000);
  }
};

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA
#endif
