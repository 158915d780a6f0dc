// Where the channels of a branch land in its residual, checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mfp::cpu {

// A bit per channel of the residual: whether the next channel of the branch lands there; and one word more.
inline std::vector<uint16_t> landing_bits(const char* op, const at::Tensor& index, int64_t channels) {
  std::vector<uint16_t> bits((channels + 15) / 16 + 1, 0);
  const int64_t* places = index.const_data_ptr<int64_t>();
  for (int64_t i = 0, before = -1; i < index.numel(); before = places[i++]) {
    TORCH_CHECK(places[i] > before && places[i] < channels, op, ": index[", i, "] is ", places[i], " after ", before,
                "; expected strictly increasing numbers below ", channels);
    bits[places[i] / 16] |= static_cast<uint16_t>(1u << places[i] % 16);
  }
  return bits;
}

}  // namespace mfp::cpu
