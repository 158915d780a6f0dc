#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mfp::cpu {

const char* isa_name(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

static Isa best_isa() {
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa current_isa() {
  static const Isa best = best_isa();
  const char* wanted = std::getenv("MFP_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
    if (isa > best) {
      throw std::runtime_error(std::string("MFP_CPU_ISA=") + wanted + ": this machine has only " + isa_name(best));
    }
    return isa;
  }
  throw std::runtime_error(std::string("MFP_CPU_ISA=") + wanted + ": known are portable, avx2, avx512");
}

}  // namespace mfp::cpu
