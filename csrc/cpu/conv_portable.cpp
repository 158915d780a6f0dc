// 128-bit vectors: SSE2, NEON, or whatever the compiler makes of them.
#define MFP_LANES 4
#define MFP_ISA portable
#include "cpu/conv_kernels.h"
#include "cpu/depthwise_kernels.h"
#include "cpu/winograd_kernels.h"
