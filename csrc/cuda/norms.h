// What one filter gives alone, norms and the product with its gradient: a warp a row, totals in double.
#pragma once

#include "cuda/device.h"
#include "cuda/score.h"

namespace mfp::cuda {

__device__ inline double warp_sum(double value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

__device__ inline float warp_max(float value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

struct RowSums {
  double absolute = 0, square = 0;
  float largest = 0;

  __device__ void add(float x) {
    absolute += static_cast<double>(fabsf(x));
    square += static_cast<double>(x) * static_cast<double>(x);
    largest = fmaxf(largest, fabsf(x));
  }
  __device__ void add(float4 x) {
    add(x.x);
    add(x.y);
    add(x.z);
    add(x.w);
  }
};

__device__ inline RowSums row_sums(const ScoredLayer& layer, int64_t row, int lane) {
  RowSums sums;
  const int64_t begin = row * layer.filter_size;
  if (layer.dtype == DType::float32 && layer.aligned) {
    const float4* vectors = reinterpret_cast<const float4*>(static_cast<const float*>(layer.weights) + begin);
#pragma unroll 4
    for (int64_t k = lane; k < layer.filter_size / 4; k += 32) sums.add(vectors[k]);
  } else {
#pragma unroll 4
    for (int64_t k = lane; k < layer.filter_size; k += 32) {
      sums.add(load_as_float(layer.weights, layer.dtype, begin + k));
    }
  }
  sums.absolute = warp_sum(sums.absolute);
  sums.square = warp_sum(sums.square);
  sums.largest = warp_max(sums.largest);
  return sums;
}

// x^p for x in [0, 1]. The error of log2 counts for p times as much in the power and for 1/p of that in the p-th root.
__device__ inline float power(float x, float p) { return exp2f(p * log2f(x)); }

// A norm of any exponent, scaled by the largest weight so that no power overflows or vanishes.
__device__ inline double power_norm(const ScoredLayer& layer, int64_t row, int lane, float largest, float p) {
  const float scale = largest > 0 ? largest : 1.0f;
  double sum = 0;
  for (int64_t k = lane; k < layer.filter_size; k += 32) {
    const float x = load_as_float(layer.weights, layer.dtype, row * layer.filter_size + k);
    sum += static_cast<double>(power(fabsf(x) / scale, p));
  }
  return static_cast<double>(scale) * pow(warp_sum(sum), 1.0 / static_cast<double>(p));
}

// The sum of weight times gradient, squared.
__device__ inline double row_taylor(const ScoredLayer& layer, int64_t row, int lane) {
  double sum = 0;
  const auto add = [&](float w, float g) { sum += static_cast<double>(w) * static_cast<double>(g); };
  const int64_t begin = row * layer.filter_size;
  const bool floats = layer.dtype == DType::float32 && layer.gradient_dtype == DType::float32;
  if (floats && layer.aligned && reinterpret_cast<uintptr_t>(layer.gradients) % 16 == 0) {
    const float4* weights = reinterpret_cast<const float4*>(static_cast<const float*>(layer.weights) + begin);
    const float4* gradients = reinterpret_cast<const float4*>(static_cast<const float*>(layer.gradients) + begin);
#pragma unroll 2
    for (int64_t k = lane; k < layer.filter_size / 4; k += 32) {
      const float4 w = weights[k], g = gradients[k];
      add(w.x, g.x);
      add(w.y, g.y);
      add(w.z, g.z);
      add(w.w, g.w);
    }
  } else {
#pragma unroll 2
    for (int64_t k = lane; k < layer.filter_size; k += 32) {
      add(load_as_float(layer.weights, layer.dtype, begin + k),
          load_as_float(layer.gradients, layer.gradient_dtype, begin + k));
    }
  }
  sum = warp_sum(sum);
  return sum * sum;
}

// One item: the scores of rows that were asked for, and the Euclidean norms that the cosine needs.
__device__ inline void score_norms(const ScoreArguments& arguments, const ScoredLayer& layer, int64_t item) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t step = rows_per_norm_item(layer.filter_size);
  const int64_t end = (item + 1) * step < layer.filters ? (item + 1) * step : layer.filters;
  for (int64_t row = item * step + threadIdx.x / 32; row < end; row += blockDim.x / 32) {
    const RowSums sums = arguments.row_norms ? row_sums(layer, row, lane) : RowSums();
    const double euclidean = sqrt(sums.square);
    if (lane == 0) {
      const float high = static_cast<float>(euclidean);
      arguments.norms[layer.offset + row] =
          make_float2(high, static_cast<float>(euclidean - static_cast<double>(high)));
    }
    for (int32_t index = 0; index < arguments.num_requests; ++index) {
      const Request request = arguments.requests[index];
      if (request.channel >= 0) continue;
      const double score = request.kind == Kind::taylor ? row_taylor(layer, row, lane)
                           : request.exponent == 1.0f   ? sums.absolute
                           : request.exponent == 2.0f   ? euclidean
                                                        : power_norm(layer, row, lane, sums.largest, request.exponent);
      if (lane == 0) arguments.scores[index * arguments.filters + layer.offset + row] = static_cast<float>(score);
    }
  }
}

}  // namespace mfp::cuda
