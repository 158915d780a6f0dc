// score_filters and prune_filters_: the persistent kernel. score.h tells how the work is cut, pairs.h how a tile is
// computed, finish.h how a layer ends.
#include "cuda/cosine.h"
#include "cuda/finish.h"
#include "cuda/norms.h"
#include "cuda/powers.h"
#include "cuda/rows.h"
#include "cuda/tensor.h"

namespace mfp::cuda {
namespace {

template <bool kL1, bool kL2>
__device__ void score_pairs(const ScoreArguments& arguments, const ScoredLayer& layer, int64_t item,
                            BlockMemory& memory) {
  const Tile tile(layer, item);
  Sums l1, l2;
  const bool products = !kL1 && kL2 && squares_from_products(arguments, layer, tile, memory, l2);
  if (!products) sum_differences<kL1, kL2>(layer, tile, memory, l1, l2);
  const auto slots = [&](int32_t channel) { return arguments.partial + channel * arguments.slots + layer.slots; };
  const auto store = [&](int32_t channel, auto pair) {
    if (channel >= 0) store_sums(tile, memory, slots(channel), layer.tiles, pair);
  };
  if (kL1) store(arguments.l1, [&](int i, int j) { return make_float2(l1.at[i][j], l1.at[i][j]); });
  if (!kL2) return;
  const bool scaled = out_of_range(tile, l2);
  if (scaled) scaled_distances(layer, tile, memory, Square{}, l2);
  store(arguments.l2, [&](int i, int j) {
    const float distance = scaled ? l2.at[i][j] : sqrtf(l2.at[i][j]);
    return make_float2(distance, distance);
  });
  if (!kL1 || (arguments.cosine < 0 && arguments.hybrid < 0)) return;
  Cosines cosines;
  find_cosines(arguments, layer, tile, memory, l2, scaled, cosines);
  store(arguments.cosine, [&](int i, int j) { return make_float2(cosines.distance(i, j), cosines.distance(i, j)); });
  store(arguments.hybrid, [&](int i, int j) {
    const float share = cosines.share.at[i][j];
    return make_float2(memory.high[kTile + Tile::column(j)] * share, memory.high[Tile::row(i)] * share);
  });
}

__device__ void score_powers(const ScoreArguments& arguments, const ScoredLayer& layer, int64_t item, int32_t index,
                             BlockMemory& memory) {
  const Tile tile(layer, item);
  const Request request = arguments.requests[index];
  Sums distance;
  scaled_distances(layer, tile, memory, Power{request.exponent}, distance);
  store_sums(tile, memory, arguments.partial + request.channel * arguments.slots + layer.slots, layer.tiles,
             [&](int i, int j) { return make_float2(distance.at[i][j], distance.at[i][j]); });
}

__device__ void zero_rows(const ScoreArguments& arguments, const MaskedRows& tensor, int64_t item) {
  wait_for(arguments.counters + kMaskReady, 1);
  const int64_t step = rows_per_item(tensor.row_bytes), begin = item * step;
  const int64_t end = begin + step < tensor.rows ? begin + step : tensor.rows;
  zero_pruned_rows(tensor.data, tensor.row_bytes, arguments.keep + tensor.keep_offset, begin, end);
}

// The number of the next item, the same in all threads.
__device__ int32_t next_item(const ScoreArguments& arguments, BlockMemory& memory) {
  __syncthreads();
  if (threadIdx.x == 0) memory.item = atomicAdd(arguments.counters + kNextItem, 1);
  __syncthreads();
  return memory.item;
}

// The last block to leave makes the counters ready for the next launch.
__device__ void leave(const ScoreArguments& arguments, BlockMemory& memory) {
  if (!arrive(arguments.counters + kBlocksDone, static_cast<int32_t>(gridDim.x), &memory.flag)) return;
  const int32_t count = kNumCounters + 2 * arguments.table_layers;
  for (int32_t index = static_cast<int32_t>(threadIdx.x); index < count; index += kThreads) {
    arguments.counters[index] = 0;
  }
}

// Blocks a multiprocessor: as many as the registers of the sums allow without spilling. Two are enough: a warp has 32
// independent sums to work on, and a barrier comes once in 3,000 instructions.
template <bool kL1, bool kL2>
__global__ void __launch_bounds__(kThreads, kL1&& kL2    ? 2
                                            : kL1 || kL2 ? 3
                                                         : 4) score_kernel(const ScoreArguments arguments) {
  MFP_SHARED_BYTES(bytes);
  BlockMemory& memory = *reinterpret_cast<BlockMemory*>(bytes);
  for (;;) {
    const int32_t number = next_item(arguments, memory);
    if (number >= arguments.items) break;
    const Segment segment = arguments.segments[find_entry(arguments.segments, arguments.num_segments, int64_t{number})];
    const int64_t item = number - segment.first_item;
    if (segment.step == Step::zero) {
      zero_rows(arguments, arguments.zeroed[segment.index], item);
      continue;
    }
    if (threadIdx.x == 0) memory.layer = arguments.layers[segment.index];
    __syncthreads();
    const ScoredLayer& layer = memory.layer;
    if (segment.step == Step::norms) {
      score_norms(arguments, layer, item);
      arrive(arguments.norm_arrivals(layer), 0, &memory.flag);
    } else if (segment.step == Step::pairs) {
      if (kL1 || kL2) score_pairs<kL1, kL2>(arguments, layer, item, memory);
    } else if (kL1 && kL2) {
      score_powers(arguments, layer, item, segment.request, memory);
    }
    if (arrive(arguments.arrivals(layer), layer.items, &memory.flag)) finish_layer(arguments, layer, memory);
  }
  leave(arguments, memory);
}

using Kernel = void (*)(ScoreArguments);

// One for everything, and three that are faster or smaller for one thing alone.
Kernel choose_kernel(const ScorePlan& plan) {
  const bool l1 = plan.arguments.l1 >= 0, l2 = plan.arguments.l2 >= 0;
  const bool cosine = plan.arguments.cosine >= 0 || plan.arguments.hybrid >= 0;
  if (cosine || plan.powers || (l1 && l2)) return score_kernel<true, true>;
  if (l1) return score_kernel<true, false>;
  if (l2) return score_kernel<false, true>;
  return score_kernel<false, false>;
}

// As many blocks as fit on the device at once, or one an item.
cudaError_t grid_size(Kernel kernel, int64_t items, unsigned& blocks) {
  int device = 0, processors = 0, per_processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, sizeof(BlockMemory));
  }
  const int64_t fitting = int64_t{processors} * (per_processor > 0 ? per_processor : 1);
  blocks = static_cast<unsigned>(items < fitting ? items : fitting);
  return error;
}

}  // namespace

cudaError_t launch_scores(const ScorePlan& plan, void* table, float* scores, bool* keep, float* partial, float2* norms,
                          cudaStream_t stream) {
  ScoreArguments arguments = plan.arguments;
  if (arguments.items == 0) return cudaSuccess;
  auto* bytes = static_cast<unsigned char*>(table);
  arguments.layers = reinterpret_cast<const ScoredLayer*>(bytes);
  arguments.segments = reinterpret_cast<const Segment*>(bytes + plan.segments_at);
  arguments.requests = reinterpret_cast<const Request*>(bytes + plan.requests_at);
  arguments.zeroed = reinterpret_cast<const MaskedRows*>(bytes + plan.zeroed_at);
  arguments.counters = reinterpret_cast<int32_t*>(bytes + plan.counters_at);
  arguments.scores = scores;
  arguments.keep = keep;
  arguments.partial = partial;
  arguments.norms = norms;
  const Kernel kernel = choose_kernel(plan);
  unsigned blocks = 0;
  const cudaError_t error = grid_size(kernel, arguments.items, blocks);
  if (error != cudaSuccess) return error;
  MFP_LAUNCH(kernel, blocks, kThreads, sizeof(BlockMemory), stream, arguments);
  return cudaGetLastError();
}

}  // namespace mfp::cuda
