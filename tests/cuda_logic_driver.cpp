// The kernels of csrc/cuda as a shared library for tests/test_cuda_logic.py, compiled by g++ on top of cuda_on_cpu.h.
#include <algorithm>
#include <cmath>

#include "cuda/mask.cu"
#include "cuda/optim.cu"
#include "cuda/scatter.cu"
#include "cuda/score.cu"
#include "cuda/score_plan.cpp"

using namespace mfp::cuda;

extern "C" {

// How the fibers take turns and how many blocks are on the "device" at once.
void configure(unsigned seed, int processors, int blocks_per_processor) {
  shim::seed = seed;
  shim::processors = processors;
  shim::blocks_per_processor = blocks_per_processor;
}

int mask_filters(void** data, const int64_t* rows, const int64_t* row_bytes, const int64_t* offsets, int count,
                 const bool* keep) {
  std::vector<MaskedRows> table;
  for (int i = 0; i < count; ++i) {
    table.push_back({static_cast<unsigned char*>(data[i]), rows[i], row_bytes[i], offsets[i], 0});
  }
  return launch_mask(table.data(), count, plan_mask(table), keep, nullptr);
}

// Launches `launches` times with one table, as the cache of tables does. Returns -1 where the plan has an error.
int prune_filters(void** weights, void** gradients, const int64_t* filters, const int64_t* sizes, const int* dtypes,
                  const int* gradient_dtypes, const int* num_pruned, int layers, void** followers,
                  const int64_t* follower_row_bytes, const int* follower_layers, int num_followers, const int* kinds,
                  const float* exponents, int requests, int chosen, float* scores, bool* keep, int launches) {
  std::vector<ScoredLayer> table(static_cast<size_t>(layers));
  std::vector<int64_t> offsets;
  int64_t total = 0;
  for (int i = 0; i < layers; ++i) {
    table[i].weights = weights[i];
    table[i].filters = filters[i];
    table[i].filter_size = sizes[i];
    table[i].dtype = static_cast<mfp::DType>(dtypes[i]);
    if (gradients != nullptr) {
      table[i].gradients = gradients[i];
      table[i].gradient_dtype = static_cast<mfp::DType>(gradient_dtypes[i]);
    }
    table[i].num_pruned = num_pruned[i];
    offsets.push_back(total);
    total += filters[i];
  }
  std::vector<MaskedRows> rows;
  for (int i = 0; i < num_followers; ++i) {
    const int layer = follower_layers[i];
    rows.push_back(
        {static_cast<unsigned char*>(followers[i]), filters[layer], follower_row_bytes[i], offsets[layer], 0});
  }
  std::vector<Request> asked;
  for (int i = 0; i < requests; ++i) asked.push_back({static_cast<Kind>(kinds[i]), exponents[i], -1});
  ScorePlan plan = plan_scores(table, asked, rows, chosen);
  if (!plan.error.empty()) return -1;
  std::vector<float> partial(static_cast<size_t>(plan.partial_floats) + 4, NAN);
  std::vector<float2> norms(static_cast<size_t>(total), float2{NAN, NAN});
  float* aligned = partial.data();
  while (reinterpret_cast<uintptr_t>(aligned) % 16 != 0) ++aligned;
  for (int i = 0; i < launches; ++i) {
    std::fill_n(scores, asked.size() * static_cast<size_t>(total), NAN);  // what a launch does not write shows
    const int error = launch_scores(plan, plan.bytes.data(), scores, keep, aligned, norms.data(), nullptr);
    if (error != 0) return error;
  }
  return 0;
}

// One step of SGD (adamw = 0: lr, momentum, dampening, weight_decay) or of AdamW (lr, beta1, beta2, eps, weight_decay).
int masked_step(int adamw, void** values, void** gradients, void** first, void** second, const int64_t* numel,
                const int64_t* row_sizes, const int64_t* offsets, const int* dtypes, int count, const bool* keep,
                const double* numbers, const int* flags) {
  std::vector<Parameter> table;
  for (int i = 0; i < count; ++i) {
    table.push_back({values[i], gradients[i], first[i], second[i], numel[i], row_sizes[i], offsets[i], 0,
                     static_cast<mfp::DType>(dtypes[i]), 0});
  }
  const int64_t items = plan_step(table);
  const auto number = [&](int i) { return static_cast<float>(numbers[i]); };
  if (adamw == 0) {
    const SgdStep step = {number(0),     number(1),    static_cast<float>(1 - numbers[2]), number(3), flags[0] != 0,
                          flags[1] != 0, flags[2] != 0};
    return launch_sgd(table.data(), count, items, keep, step, nullptr);
  }
  const double lr = numbers[0], beta1 = numbers[1], beta2 = numbers[2], steps = flags[2];
  const AdamwStep step = {static_cast<float>(1 - lr * numbers[4]),
                          static_cast<float>(1 - beta1),
                          number(2),
                          static_cast<float>(1 - beta2),
                          static_cast<float>(std::sqrt(1 - std::pow(beta2, steps))),
                          number(3),
                          static_cast<float>(lr / (1 - std::pow(beta1, steps))),
                          flags[1] != 0};
  return launch_adamw(table.data(), count, items, keep, step, nullptr);
}

int scatter_add(void* residual, const void* branch, const int64_t* index, int64_t outer, int64_t channels,
                int64_t branch_channels, int64_t inner, int dtype, int relu) {
  return launch_scatter_add(
      {residual, branch, index, outer, channels, branch_channels, inner, static_cast<mfp::DType>(dtype), relu != 0},
      nullptr);
}

int tile_size() { return kTile; }
}
