// Activations of numbers that are still in registers or in the nearest cache.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

namespace mfp::cpu {

enum class Curve { none, hardswish, silu };

// A clamp between two numbers, then a curve; at most one of them does anything.
struct Activation {
  float low = -std::numeric_limits<float>::infinity(), high = std::numeric_limits<float>::infinity();
  Curve curve = Curve::none;
};

// Throws std::runtime_error where the name is none of "none", "relu", "relu6", "hardswish" and "silu".
Activation activation_of(const std::string& name);

}  // namespace mfp::cpu
