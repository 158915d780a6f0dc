// Autograd notices by its version that a tensor was changed in place. One kernel raises the versions of what an op
// writes to, whichever backend does the work: it runs before the backends', where torch has the same for its own
// operators.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <vector>

namespace mfp {
namespace {

void raise_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].alias_info() == nullptr || !arguments[i].alias_info()->isWrite()) continue;
    const c10::IValue& given = torch::jit::peek(*stack, i, arguments.size());
    const std::vector<at::Tensor> tensors = given.isTensor() ? std::vector{given.toTensor()} : given.toTensorVector();
    written.insert(written.end(), tensors.begin(), tensors.end());
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : written) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

TORCH_LIBRARY_IMPL(mfp, ADInplaceOrView, library) {
  for (const char* op : {"mask_filters_", "prune_filters_", "masked_sgd_", "masked_adamw_", "scatter_add_",
                         "conv2d_join_", "squeeze_excite_", "batch_norm_training_"}) {
    library.impl(op, torch::CppFunction::makeFromBoxedFunction<&raise_versions>());
  }
}

}  // namespace
}  // namespace mfp
