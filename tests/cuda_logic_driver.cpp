// The kernels of csrc/cuda as a shared library for tests/test_cuda_logic.py, compiled by g++ on top of cuda_on_cpu.h.
#include "cuda/mask.cu"
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
int prune_filters(void** weights, const int64_t* filters, const int64_t* sizes, const int* dtypes, const int* num_pruned,
                  int layers, void** followers, const int64_t* follower_row_bytes, const int* follower_layers,
                  int num_followers, const int* kinds, const float* exponents, int requests, int chosen, float* scores,
                  bool* keep, int launches) {
  std::vector<ScoredLayer> table(static_cast<size_t>(layers));
  std::vector<int64_t> offsets;
  int64_t total = 0;
  for (int i = 0; i < layers; ++i) {
    table[i].weights = weights[i];
    table[i].filters = filters[i];
    table[i].filter_size = sizes[i];
    table[i].dtype = static_cast<DType>(dtypes[i]);
    table[i].num_pruned = num_pruned[i];
    offsets.push_back(total);
    total += filters[i];
  }
  std::vector<MaskedRows> rows;
  for (int i = 0; i < num_followers; ++i) {
    const int layer = follower_layers[i];
    rows.push_back({static_cast<unsigned char*>(followers[i]), filters[layer], follower_row_bytes[i], offsets[layer], 0});
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
    const int error = launch_scores(plan, plan.bytes.data(), scores, keep, aligned, norms.data(), nullptr);
    if (error != 0) return error;
  }
  return 0;
}

int tile_size() { return kTile; }
}
