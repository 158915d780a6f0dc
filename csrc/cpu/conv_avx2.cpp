#define MFP_LANES 8
#define MFP_ISA avx2
#define MFP_TARGET "avx2,fma"
#include "cpu/conv_kernels.h"
#include "cpu/depthwise_kernels.h"
#include "cpu/winograd_kernels.h"
