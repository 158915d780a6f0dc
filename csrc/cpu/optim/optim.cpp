// Cuts the parameters into pieces and spreads them over the threads.
#include "cpu/optim/optim.h"

#include <algorithm>

#include "cpu/spread.h"

namespace mfp::cpu {

static OptimKernels kernels_of(Isa isa) {
  switch (isa) {
    case Isa::avx512: return avx512_optim_kernels();
    case Isa::avx2: return avx2_optim_kernels();
    default: return portable_optim_kernels();
  }
}

namespace {

constexpr int64_t kWeightsPerPiece = 1 << 15;

struct Piece {
  const Parameter* parameter;
  int64_t begin, end;  // rows
};

std::vector<Piece> pieces_of(const std::vector<Parameter>& parameters) {
  std::vector<Piece> pieces;
  for (const Parameter& parameter : parameters) {
    const int64_t step = std::max<int64_t>(1, kWeightsPerPiece / std::max<int64_t>(1, parameter.row_size));
    for (int64_t begin = 0; begin < parameter.rows; begin += step) {
      pieces.push_back({&parameter, begin, std::min(begin + step, parameter.rows)});
    }
  }
  return pieces;
}

// Calls kernel(parameter, step, begin, end) for all pieces.
template <class Kernel, class Step>
void run(Kernel kernel, const std::vector<Parameter>& parameters, const Step& step, int num_threads) {
  int64_t weights = 0;
  for (const Parameter& parameter : parameters) weights += parameter.rows * parameter.row_size;
  const std::vector<Piece> pieces = pieces_of(parameters);
  spread(pieces.size(), worth(num_threads, weights, 2 * kWeightsPerPiece),
         [&](int64_t i) { kernel(*pieces[i].parameter, step, pieces[i].begin, pieces[i].end); });
}

}  // namespace

void sgd_step(const std::vector<Parameter>& parameters, const SgdStep& step, int num_threads, Isa isa) {
  run(kernels_of(isa).sgd, parameters, step, num_threads);
}

void adamw_step(const std::vector<Parameter>& parameters, const AdamwStep& step, int num_threads, Isa isa) {
  run(kernels_of(isa).adamw, parameters, step, num_threads);
}

}  // namespace mfp::cpu
