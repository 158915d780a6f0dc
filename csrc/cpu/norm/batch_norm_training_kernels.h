// The arithmetic of batch_norm_training.h, compiled once per instruction set (vector.h).
#include "cpu/activate.h"
#include "cpu/norm/batch_norm_training.h"

#include <algorithm>
#include <type_traits>

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

constexpr int kMost = 4;  // vectors of a row that are read together

template <int kVectors>
struct Columns {
  static constexpr int kCount = kVectors;
  Vec v[kVectors] = {};

  template <class Count>
  static Columns of(const float* p, Count last) {
    Columns columns;
    for (int i = 0; i < kVectors - 1; ++i) columns.v[i] = load(p + i * kLanes);
    columns.v[kVectors - 1] = load_some(p + (kVectors - 1) * kLanes, last);
    return columns;
  }

  template <class Count>
  void write(float* p, Count last) const {
    for (int i = 0; i < kVectors - 1; ++i) store(p + i * kLanes, v[i]);
    store_some(p + (kVectors - 1) * kLanes, v[kVectors - 1], last);
  }
};

// Calls work(first row, end, first channel, columns without numbers, numbers of the last vector): parts of the rows
// with kMost vectors, the last one perhaps less. Rows that are longer are read one after the other, as they lie in
// memory.
template <class Work>
inline void by_parts(int64_t begin, int64_t end, int64_t channels, Work work) {
  using Whole = std::integral_constant<int64_t, kLanes>;
  const int64_t step = channels <= kMost * kLanes ? end - begin : 1;
  for (int64_t row = begin; row < end; row += step) {
    const int64_t stop = std::min(row + step, end);
    int64_t c = 0;
    for (; c + kMost * kLanes <= channels; c += kMost * kLanes) work(row, stop, c, Columns<kMost>(), Whole());
    const int64_t whole = (channels - c) / kLanes, last = (channels - c) % kLanes;
    if (whole == 0 && last > 0) work(row, stop, c, Columns<1>(), last);
    if (whole == 1 && last == 0) work(row, stop, c, Columns<1>(), Whole());
    if (whole == 1 && last > 0) work(row, stop, c, Columns<2>(), last);
    if (whole == 2 && last == 0) work(row, stop, c, Columns<2>(), Whole());
    if (whole == 2 && last > 0) work(row, stop, c, Columns<3>(), last);
    if (whole == 3 && last == 0) work(row, stop, c, Columns<3>(), Whole());
    if (whole == 3 && last > 0) work(row, stop, c, Columns<4>(), last);
  }
}

void row_moments(const NormRows& x, int64_t begin, int64_t end, float* found) {
  float *const means = found, *const squares = found + x.channels;
  const float* const base = x.input + begin * x.channels;  // differences from it keep the bits that a large mean takes
  by_parts(begin, end, x.channels, [&](int64_t row, int64_t stop, int64_t c, auto columns, auto last) {
    using Part = decltype(columns);
    const Part first = Part::of(base + c, last);
    Part sum = Part::of(means + c, last);
    for (; row < stop; ++row) {
      const Part in = Part::of(x.input + row * x.channels + c, last);
      for (int i = 0; i < Part::kCount; ++i) sum.v[i] += in.v[i] - first.v[i];
    }
    sum.write(means + c, last);
  });
  for (int64_t c = 0; c < x.channels; ++c) means[c] = base[c] + means[c] / (end - begin);
  by_parts(begin, end, x.channels, [&](int64_t row, int64_t stop, int64_t c, auto columns, auto last) {
    using Part = decltype(columns);
    const Part mean = Part::of(means + c, last);
    Part sum = Part::of(squares + c, last);
    for (; row < stop; ++row) {
      const Part in = Part::of(x.input + row * x.channels + c, last);
      for (int i = 0; i < Part::kCount; ++i) {
        const Vec away = in.v[i] - mean.v[i];
        sum.v[i] = multiply_add(away, away, sum.v[i]);
      }
    }
    sum.write(squares + c, last);
  });
}

void gradient_sums(const NormRows& x, const float* gradient, const float* mean, int64_t begin, int64_t end,
                   float* found) {
  by_parts(begin, end, x.channels, [&](int64_t row, int64_t stop, int64_t c, auto columns, auto last) {
    using Part = decltype(columns);
    const Part center = Part::of(mean + c, last);
    Part sum = Part::of(found + c, last), products = Part::of(found + x.channels + c, last);
    for (; row < stop; ++row) {
      const int64_t place = row * x.channels + c;
      const Part in = Part::of(x.input + place, last), slope = Part::of(gradient + place, last);
      for (int i = 0; i < Part::kCount; ++i) {
        sum.v[i] += slope.v[i];
        products.v[i] = multiply_add(in.v[i] - center.v[i], slope.v[i], products.v[i]);
      }
    }
    sum.write(found + c, last);
    products.write(found + x.channels + c, last);
  });
}

void normalize_rows(const NormRows& x, const float* mean, const float* scale, const float* shift, int64_t begin,
                    int64_t end, float* output) {
  by_parts(begin, end, x.channels, [&](int64_t row, int64_t stop, int64_t c, auto columns, auto last) {
    using Part = decltype(columns);
    const Part center = Part::of(mean + c, last), factor = Part::of(scale + c, last), add = Part::of(shift + c, last);
    for (; row < stop; ++row) {
      Part in = Part::of(x.input + row * x.channels + c, last);
      for (int i = 0; i < Part::kCount; ++i) in.v[i] = multiply_add(in.v[i] - center.v[i], factor.v[i], add.v[i]);
      in.write(output + row * x.channels + c, last);
    }
  });
}

void input_gradients(const NormRows& x, const float* gradient, const float* mean, const float* scale,
                     const float* slope, const float* shift, int64_t begin, int64_t end, float* input_gradient) {
  by_parts(begin, end, x.channels, [&](int64_t row, int64_t stop, int64_t c, auto columns, auto last) {
    using Part = decltype(columns);
    const Part center = Part::of(mean + c, last), factor = Part::of(scale + c, last);
    const Part tilt = Part::of(slope + c, last), add = Part::of(shift + c, last);
    for (; row < stop; ++row) {
      const int64_t place = row * x.channels + c;
      const Part in = Part::of(x.input + place, last);
      Part out = Part::of(gradient + place, last);
      for (int i = 0; i < Part::kCount; ++i) {
        const Vec rest = multiply_add(in.v[i] - center.v[i], tilt.v[i], add.v[i]);
        out.v[i] = multiply_add(out.v[i], factor.v[i], rest);
      }
      out.write(input_gradient + place, last);
    }
  });
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void row_moments(const NormRows&, int64_t, int64_t, float*) {}
void gradient_sums(const NormRows&, const float*, const float*, int64_t, int64_t, float*) {}
void normalize_rows(const NormRows&, const float*, const float*, const float*, int64_t, int64_t, float*) {}
void input_gradients(const NormRows&, const float*, const float*, const float*, const float*, const float*, int64_t,
                     int64_t, float*) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
