// What is computed from one filter: its norms, and the sum of its weights times gradients. Compiled once per
// instruction set (vector.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/score/tiles.h"
#include "cpu/vector.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

// x^p for x >= 0, relative error 1e-6 as long as |p log2 x| < 32; below 2^-126 it is 0.
inline Vec power(Vec x, float p) {
  const BitsVec bits = (BitsVec)x;
  const IntVec exponent = (IntVec)(bits - 0x3f3504f3u) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const Vec t = (Vec)(bits - ((BitsVec)exponent << 23)) - 1.0f;
  Vec log = t * -0.1102016f + 0.18631209f;
  log = log * t - 0.19102497f;
  log = log * t + 0.20457532f;
  log = log * t - 0.23961905f;
  log = log * t + 0.28856888f;
  log = log * t - 0.36069664f;
  log = log * t + 0.48089820f;
  log = log * t - 0.72134733f;
  log = log * t + 1.44269502f;
  const Vec y = p * (__builtin_convertvector(exponent, Vec) + t * log);
  const Vec shifted = y + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const Vec f = y - (shifted - 12582912.0f);
  Vec result = f * 1.546973e-4f + 1.3400433e-3f;
  result = result * f + 9.618025e-3f;
  result = result * f + 5.550327e-2f;
  result = result * f + 2.4022651e-1f;
  result = result * f + 6.9314718e-1f;
  result = result * f + 1.0f;
  const Vec scaled = (Vec)((BitsVec)result + (((BitsVec)shifted - 0x4b400000u) << 23));
  return select((x > 0.0f) & (y > -126.0f), scaled);
}

// ---- reading weights ----------------------------------------------------------------------------------------------

// `count` weights of a filter from `begin` on: in place for float32, else converted into `buffer`.
inline const float* read(const Layer& layer, int64_t filter, int64_t begin, int64_t count, float* buffer) {
  const int64_t at = filter * layer.filter_size + begin;
  if (layer.dtype == DType::float32) return static_cast<const float*>(layer.weights) + at;
  const uint16_t* source = static_cast<const uint16_t*>(layer.weights) + at;
  if (layer.dtype == DType::bfloat16) {
    for (int64_t k = 0; k < count; ++k) buffer[k] = from_bits(static_cast<uint32_t>(source[k]) << 16);
  } else {
    for (int64_t k = 0; k < count; ++k) buffer[k] = half_to_float(source[k]);
  }
  return buffer;
}

// ---- norms --------------------------------------------------------------------------------------------------------

// Doubles in a full vector, and as many floats.
constexpr int kWide = kLanes / 2;
typedef double Wide __attribute__((vector_size(8 * kWide)));
typedef int64_t WideBits __attribute__((vector_size(8 * kWide)));

inline Wide widen(const float* p) {
  Wide v;
  for (int i = 0; i < kWide; ++i) v[i] = p[i];
  return v;
}

Norms norms(const Layer& layer, int64_t filter) {
  constexpr int kChains = 4;       // independent sums, so that the memory is waited for and not the additions
  constexpr int64_t kAhead = 512;  // weights; the next filters lie there, and reading past the last is harmless
  alignas(64) float buffer[kBlock];
  Wide magnitudes[kChains] = {}, squares[kChains] = {};
  Norms result = {};
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* w = read(layer, filter, begin, count, buffer);
    int64_t k = 0;
    for (; k + kChains * kWide <= count; k += kChains * kWide) {
      __builtin_prefetch(w + k + kAhead);
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) {
        const Wide v = widen(w + k + i * kWide);
        magnitudes[i] += (Wide)((WideBits)v & INT64_MAX);
        squares[i] += v * v;
      }
    }
    for (; k < count; ++k) {
      const double v = w[k];
      result.l1 += std::fabs(v);
      result.squares += v * v;
    }
  }
  for (int i = 1; i < kChains; ++i) magnitudes[0] += magnitudes[i], squares[0] += squares[i];
  for (int lane = 0; lane < kWide; ++lane) {
    result.l1 += magnitudes[0][lane];
    result.squares += squares[0][lane];
  }
  return result;
}

float largest_weight(const Layer& layer, int64_t filter) {
  alignas(64) float buffer[kBlock];
  Vec most{};
  float rest = 0;
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* w = read(layer, filter, begin, count, buffer);
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) most = maximum(most, absolute(load(w + k)));
    for (; k < count; ++k) rest = std::max(rest, std::fabs(w[k]));
  }
  for (int i = 0; i < kLanes; ++i) rest = std::max(rest, most[i]);
  return rest;
}

double general_norm(const Layer& layer, int64_t filter, double exponent) {
  const float largest = largest_weight(layer, filter);
  if (largest == 0) return 0;
  alignas(64) float buffer[kBlock];
  double sum = 0;
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* w = read(layer, filter, begin, count, buffer);
    Vec part{};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) part += power(absolute(load(w + k)) / largest, exponent);
    for (; k < count; ++k) part[0] += std::pow(std::fabs(w[k]) / largest, static_cast<float>(exponent));
    sum += sum_of_lanes(part);
  }
  return largest * std::pow(sum, 1 / exponent);
}

// ---- weights and gradients ----------------------------------------------------------------------------------------

// The sum of weight times gradient, squared. In double: the terms have both signs and cancel.
double taylor(const Layer& layer, const Layer& gradients, int64_t filter) {
  constexpr int kChains = 4;
  constexpr int64_t kAhead = 512;  // as for norms
  alignas(64) float weight_buffer[kBlock], gradient_buffer[kBlock];
  Wide sums[kChains] = {};
  double sum = 0;
  for (int64_t begin = 0; begin < layer.filter_size; begin += kBlock) {
    const int64_t count = std::min(kBlock, layer.filter_size - begin);
    const float* w = read(layer, filter, begin, count, weight_buffer);
    const float* g = read(gradients, filter, begin, count, gradient_buffer);
    int64_t k = 0;
    for (; k + kChains * kWide <= count; k += kChains * kWide) {
      __builtin_prefetch(w + k + kAhead);
      __builtin_prefetch(g + k + kAhead);
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) sums[i] += widen(w + k + i * kWide) * widen(g + k + i * kWide);
    }
    for (; k < count; ++k) sum += static_cast<double>(w[k]) * static_cast<double>(g[k]);
  }
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  for (int lane = 0; lane < kWide; ++lane) sum += sums[0][lane];
  return sum * sum;
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA
#endif
