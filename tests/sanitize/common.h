// What the checks of all kernels share: awkward numbers, in buffers exactly as long as what they hold, so that one
// element too far is found, and comparisons.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "dtype.h"

using mfp::DType;
using namespace mfp::cpu;

inline int failures = 0;

inline void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

inline std::vector<Isa> levels() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (isa <= current_isa()) found.push_back(isa);
  }
  return found;
}

inline float value_of(uint16_t bits, DType dtype) {
  if (dtype == DType::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Memory of a tensor on the heap, no byte longer than it must be.
struct Numbers {
  DType dtype;
  std::vector<char> bytes;
  int64_t count;

  Numbers(DType type, int64_t n, std::mt19937& random, float scale = 1) : dtype(type), count(n) {
    bytes.resize(n * (type == DType::float32 ? 4 : 2));
    bytes.shrink_to_fit();
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = 0; i < n; ++i) {
      const float value = normal(random);
      if (type == DType::float32) {
        std::memcpy(&bytes[i * 4], &value, 4);
      } else {  // any pattern is a number; take the sign and the low bits of the float, and a moderate exponent
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        const uint16_t half = type == DType::bfloat16 ? wide >> 16 : (wide >> 16 & 0x83ff) | ((12 + wide % 4) << 10);
        std::memcpy(&bytes[i * 2], &half, 2);
      }
    }
  }
  double operator[](int64_t i) const {
    if (dtype == DType::float32) {
      float value;
      std::memcpy(&value, &bytes[i * 4], 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, &bytes[i * 2], 2);
    return value_of(half, dtype);
  }
  void zero(int64_t begin, int64_t end) {
    const int64_t size = dtype == DType::float32 ? 4 : 2;
    std::memset(bytes.data() + begin * size, 0, (end - begin) * size);
  }
};

inline double tolerance(DType dtype) {
  return dtype == DType::float32 ? 3e-6 : dtype == DType::bfloat16 ? 0.004 : 0.001;
}

inline void compare(const char* what, double got, double expected, DType dtype) {
  expect(std::fabs(got - expected) <= tolerance(dtype) * (std::fabs(expected) + 0.05),
         std::string(what) + ": " + std::to_string(got) + ", expected " + std::to_string(expected));
}

struct Shape {
  int64_t filters, size;
};

void check_all_scores(std::mt19937& random);
void check_all_optimizers(std::mt19937& random);
void check_all_joins(std::mt19937& random);
void check_all_convs(std::mt19937& random);
void check_all_norms(std::mt19937& random);
void check_all_excites(std::mt19937& random);
