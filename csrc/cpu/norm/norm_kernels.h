// The arithmetic of norm.h, compiled once per instruction set (vector.h).
#include "cpu/activate.h"
#include "cpu/norm/norm.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

void norm_rows(const Norm& norm, int64_t begin, int64_t end) {
  const Vec low = broadcast(norm.activation.low), high = broadcast(norm.activation.high);
  for (int64_t row = begin; row < end; ++row) {
    float* out = norm.output + row * norm.channels;
    int64_t first = 0;
    for (const NormPart& part : norm.parts) {
      const float* in = part.numbers + row * part.channels;
      const float *scale = norm.scale + first, *shift = norm.shift + first;
      int64_t c = 0;
      for (; c + kLanes <= part.channels; c += kLanes) {
        store(out + first + c, clamp_to(load(in + c) * load(scale + c) + load(shift + c), low, high));
      }
      if (c < part.channels) {
        const int64_t count = part.channels - c;
        const Vec sum = load_some(in + c, count) * load_some(scale + c, count) + load_some(shift + c, count);
        store_some(out + first + c, clamp_to(sum, low, high), count);
      }
      first += part.channels;
    }
    if (norm.activation.curve != Curve::none) bend(out, norm.channels, norm.activation.curve);
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void norm_rows(const Norm&, int64_t, int64_t) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
