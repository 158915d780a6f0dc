// Which instruction set the CPU kernels use: the best this machine has, capped by MFP_CPU_ISA.
#pragma once

namespace mfp::cpu {

enum class Isa { portable, avx2, avx512 };

// Read once per call, so that a test can go through all levels in one process.
// Throws std::runtime_error when MFP_CPU_ISA names no level, or one that this machine does not have.
Isa current_isa();

const char* isa_name(Isa isa);

// The function of that name that is compiled for the instruction set.
#define MFP_OF_ISA(isa, name) (isa == Isa::avx512 ? avx512::name : isa == Isa::avx2 ? avx2::name : portable::name)

}  // namespace mfp::cpu
