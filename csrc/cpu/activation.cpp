#include "cpu/activation.h"

#include <stdexcept>

namespace mfp::cpu {

Activation activation_of(const std::string& name) {
  Activation found;
  if (name == "relu" || name == "relu6") {
    found.low = 0;
    if (name == "relu6") found.high = 6;
  } else if (name == "hardswish") {
    found.curve = Curve::hardswish;
  } else if (name == "silu") {
    found.curve = Curve::silu;
  } else if (name != "none") {
    throw std::runtime_error("activation " + name + "; known are none, relu, relu6, hardswish, silu");
  }
  return found;
}

}  // namespace mfp::cpu
