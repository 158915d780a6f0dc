// Optimiser steps for all parameters of a model in one pass over memory. No torch here (see score.h).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "cpu/score/score.h"

namespace mfp::cpu {

// A parameter with what an optimiser keeps for it, all dense and laid out alike, seen as [rows, row_size].
struct Parameter {
  void* values;
  const void* gradient;
  void* first;   // momentum, or the mean of gradients; unused without momentum
  void* second;  // mean of squared gradients; AdamW only
  DType dtype;
  const bool* keep;  // [rows], or null: rows that are not kept are neither read nor written
  int64_t rows, row_size;
};

struct SgdStep {
  float lr, momentum, dampening_rest /* 1 - dampening */, weight_decay;
  bool nesterov, maximize;
  bool first_step;  // the momentum starts as the gradient
};

struct AdamwStep {
  float decay;              // 1 - lr * weight_decay
  float beta1_rest;         // 1 - beta1
  float beta2, beta2_rest;  // beta2, 1 - beta2
  float correction2_root;   // sqrt(1 - beta2^step)
  float eps;
  float step_size;  // lr / (1 - beta1^step)
  bool maximize;
};

void sgd_step(const std::vector<Parameter>& parameters, const SgdStep& step, int num_threads, Isa isa);
void adamw_step(const std::vector<Parameter>& parameters, const AdamwStep& step, int num_threads, Isa isa);

// One instruction set's kernels, for rows [begin, end) of one parameter; optim_kernels.h implements them three times.
struct OptimKernels {
  void (*sgd)(const Parameter& parameter, const SgdStep& step, int64_t begin, int64_t end);
  void (*adamw)(const Parameter& parameter, const AdamwStep& step, int64_t begin, int64_t end);
};

OptimKernels portable_optim_kernels();
OptimKernels avx2_optim_kernels();
OptimKernels avx512_optim_kernels();

}  // namespace mfp::cpu
