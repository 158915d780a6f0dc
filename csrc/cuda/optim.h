// Optimiser steps for all parameters of a model in one launch; rows of pruned filters are neither read nor written.
#pragma once

#include <vector>

#include "cuda/runtime.h"

namespace mfp::cuda {

// A parameter with what an optimiser keeps for it: all dense, laid out alike, of one dtype.
struct Parameter {
  void* values;
  const void* gradient;
  void* first;   // momentum, or mean of the gradients; null for SGD without momentum
  void* second;  // mean of the squared gradients; AdamW only
  int64_t numel;
  int64_t row_size;     // elements that one filter owns
  int64_t keep_offset;  // of its first filter in the mask; -1: not masked
  int64_t first_item;
  DType dtype;
  int32_t vectors;  // four elements at a time: rows and pointers are aligned to that
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

int64_t plan_step(std::vector<Parameter>& parameters);  // fills first_item and vectors; returns the number of items
cudaError_t launch_sgd(const Parameter* parameters, int32_t count, int64_t items, const bool* keep, SgdStep step,
                       cudaStream_t stream);
cudaError_t launch_adamw(const Parameter* parameters, int32_t count, int64_t items, const bool* keep, AdamwStep step,
                         cudaStream_t stream);

}  // namespace mfp::cuda
