// The arithmetic of scatter.h, compiled once per instruction set (vector.h).
#include "cpu/join/join_row.h"
#include "cpu/join/scatter.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

// out = r + b, each of which may be null: zeros.
template <class Format>
void add_row(typename Format::Stored* out, const typename Format::Stored* r, const typename Format::Stored* b,
             int64_t size, bool relu) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec first = r == nullptr ? Vec{} : Format::load_vector(r + i);
    const Vec second = b == nullptr ? Vec{} : Format::load_vector(b + i);
    Format::store_vector(out + i, rectified(first + second, relu));
  }
  for (; i < size; ++i) {
    const float first = r == nullptr ? 0 : Format::load_one(r + i), second = b == nullptr ? 0 : Format::load_one(b + i);
    Format::store_one(out + i, rectified(first + second, relu));
  }
}

template <class Format, bool kRelu>
void scatter_some(const ScatterRows& work, int64_t begin, int64_t end) {
  typedef typename Format::Stored Stored;
  const auto out = [&](int64_t row) { return static_cast<Stored*>(work.out) + row * work.channels; };
  const auto residual = [&](int64_t row) {
    return work.residual == nullptr ? nullptr : static_cast<const Stored*>(work.residual) + row * work.channels;
  };
  const auto branch = [&](int64_t row) { return static_cast<const Stored*>(work.branch) + row * work.branch_channels; };
  if (work.branch_channels == work.channels) {
    return add_row<Format>(out(begin), residual(begin), branch(begin), (end - begin) * work.channels, kRelu);
  }
  int64_t row = begin;
  if (work.branch_channels >= kLanes) {  // reads beyond a row end in the next one
    for (; row + 1 < end; ++row) {
      join_row<Format, kRelu, false>(out(row), residual(row), branch(row), work.landing, 0, work.channels);
    }
  }
  for (; row < end; ++row) {
    join_row<Format, kRelu, true>(out(row), residual(row), branch(row), work.landing, 0, work.channels);
  }
}

template <class Format>
void plane(const ScatterPlane& work) {
  typedef typename Format::Stored Stored;
  add_row<Format>(static_cast<Stored*>(work.out), static_cast<const Stored*>(work.residual),
                  static_cast<const Stored*>(work.branch), work.size, work.relu);
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
  if (work.branch == nullptr && !work.relu && work.residual == work.out) return;
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
