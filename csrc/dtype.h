// The numbers that weights come in. No torch here: the kernels know no tensors.
#pragma once

#include <cstdint>

namespace mfp {

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace mfp
