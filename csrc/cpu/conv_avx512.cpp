#define MFP_LANES 16
#define MFP_ISA avx512
#define MFP_TARGET "avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512"
#include "cpu/conv_kernels.h"
#include "cpu/depthwise_kernels.h"
#include "cpu/winograd_kernels.h"
