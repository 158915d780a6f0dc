// The arithmetic of scatter.h, compiled once per instruction set (vector.h).
//
// With channels innermost, 16 channels of the residual take the next few numbers of the branch's row, spread out by a
// bit mask: AVX-512 has an instruction for it, AVX2 a permutation by table, other processors go number by number.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/formats.h"
#include "cpu/scatter.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

inline Vec rectified(Vec v, bool relu) { return relu ? (Vec{} > v ? Vec{} : v) : v; }  // NaN stays NaN

inline float rectified(float x, bool relu) { return relu && x < 0 ? 0.0f : x; }

template <class Format>
void add_row(typename Format::Stored* r, const typename Format::Stored* b, int64_t size, bool relu) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Format::store_vector(r + i, rectified(Format::load_vector(r + i) + Format::load_vector(b + i), relu));
  }
  for (; i < size; ++i) Format::store_one(r + i, rectified(Format::load_one(r + i) + Format::load_one(b + i), relu));
}

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
static constexpr Places places;  // no code of this instruction set may run when the library is loaded
inline Vec spread(Vec next, uint32_t bits) {
  const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(places.of[bits]));
  const __m256 spread = _mm256_permutevar8x32_ps((__m256)next, place);
  return (Vec)_mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
}
#endif

// kEnd: nothing may be read beyond the row of the branch.
template <class Format, bool kRelu, bool kEnd>
inline void scatter_row(const ScatterRows& work, typename Format::Stored* r, const typename Format::Stored* q) {
  const int64_t channels = work.channels;
  int64_t c = 0;
#if MFP_LANES >= 8 && defined(__x86_64__)
  const uint16_t* landing = work.landing;
  for (; c + kLanes <= channels; c += kLanes) {
    const uint32_t bits = landing[c / 16] >> (c % 16) & ((1u << kLanes) - 1);
    const int count = __builtin_popcount(bits);
    Vec next;
    if (kEnd) {
      typename Format::Stored some[kLanes] = {};
      std::memcpy(some, q, count * sizeof *q);
      next = Format::load_vector(some);
    } else {
      next = Format::load_vector(q);
    }
    Format::store_vector(r + c, rectified(Format::load_vector(r + c) + spread(next, bits), kRelu));
    q += count;
  }
#endif
  for (; c < channels; ++c) {
    float value = Format::load_one(r + c);
    if (work.source[c] >= 0) value += Format::load_one(q++);
    Format::store_one(r + c, rectified(value, kRelu));
  }
}

template <class Format, bool kRelu>
void scatter_some(const ScatterRows& work, int64_t begin, int64_t end) {
  typedef typename Format::Stored Stored;
  const auto residual = [&](int64_t row) { return static_cast<Stored*>(work.residual) + row * work.channels; };
  const auto branch = [&](int64_t row) { return static_cast<const Stored*>(work.branch) + row * work.branch_channels; };
  if (work.branch_channels == work.channels) {
    return add_row<Format>(residual(begin), branch(begin), (end - begin) * work.channels, kRelu);
  }
  int64_t row = begin;
  if (work.branch_channels >= kLanes) {  // reads beyond a row end in the next one
    for (; row + 1 < end; ++row) scatter_row<Format, kRelu, false>(work, residual(row), branch(row));
  }
  for (; row < end; ++row) scatter_row<Format, kRelu, true>(work, residual(row), branch(row));
}

template <class Format>
void plane(const ScatterPlane& work) {
  typename Format::Stored* r = static_cast<typename Format::Stored*>(work.residual);
  if (work.branch != nullptr) {
    return add_row<Format>(r, static_cast<const typename Format::Stored*>(work.branch), work.size, work.relu);
  }
  int64_t i = 0;
  for (; i + kLanes <= work.size; i += kLanes) {
    Format::store_vector(r + i, rectified(Format::load_vector(r + i), work.relu));
  }
  for (; i < work.size; ++i) Format::store_one(r + i, rectified(Format::load_one(r + i), work.relu));
}

void scatter_rows(const ScatterRows& work, int64_t begin, int64_t end) {
  const auto run = [&](auto format) {
    typedef decltype(format) Format;
    return work.relu ? scatter_some<Format, true>(work, begin, end) : scatter_some<Format, false>(work, begin, end);
  };
  switch (work.dtype) {
    case DType::float32: return run(Float());
    case DType::bfloat16: return run(Halves<Bfloat16>());
    case DType::float16: return run(Halves<Float16>());
  }
}

void scatter_plane(const ScatterPlane& work) {
  if (work.branch == nullptr && !work.relu) return;
  switch (work.dtype) {
    case DType::float32: return plane<Float>(work);
    case DType::bfloat16: return plane<Halves<Bfloat16>>(work);
    case DType::float16: return plane<Halves<Float16>>(work);
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void scatter_rows(const ScatterRows&, int64_t, int64_t) {}
void scatter_plane(const ScatterPlane&) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
