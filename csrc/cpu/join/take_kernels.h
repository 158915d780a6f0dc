// The copies of take.h, compiled once per instruction set (vector.h). AVX-512 has an instruction that moves the numbers
// of a mask together; other processors go number by number.
#include "cpu/activate.h"
#include "cpu/join/take.h"

#if MFP_HAVE_ISA
MFP_BEGIN_ISA

namespace mfp::cpu {
namespace MFP_ISA {

void take_rows(const TakeRows& work, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* in = work.in + row * work.channels;
    float* out = work.out + row * work.taken;
#if MFP_LANES == 16 && defined(__x86_64__)
    for (int64_t c = 0; c < work.channels; c += kLanes) {
      const uint32_t bits = work.landing[c / kLanes];
      const __m512 together = _mm512_maskz_compress_ps(bits, _mm512_maskz_loadu_ps(bits, in + c));
      const int count = __builtin_popcount(bits);
      store_some(out, (Vec)together, count);
      out += count;
    }
#else
    for (int64_t i = 0; i < work.taken; ++i) out[i] = in[work.index[i]];
#endif
  }
}

}  // namespace MFP_ISA
}  // namespace mfp::cpu

MFP_END_ISA

#else

namespace mfp::cpu {
namespace MFP_ISA {
void take_rows(const TakeRows&, int64_t, int64_t) {}
}  // namespace MFP_ISA
}  // namespace mfp::cpu

#endif
