"""BatchNorm for training networks whose channels are any number, after pruning: torch's wants whole vectors of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mfp import backend as backends
from mfp import layer_ops
from mfp.moves import is_plain_call

# Channels that torch's own kernel takes as fast: whole vectors, and so many that memory is what is waited for.
WHOLE, MANY = 16, 64


class NarrowBatchNorm2d(nn.BatchNorm2d):
    """Trains by mfp's op where torch's kernel is slow: on a CPU, in float32 and channels_last, with few channels or a
    number that is no multiple of 16. All else is left to :class:`torch.nn.BatchNorm2d`."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.is_slow(x)):
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.momentum, self.eps
        return BatchNormTraining.apply(x, self.weight, self.bias, *statistics)

    def is_slow(self, x: Tensor) -> bool:
        if not is_plain_call(x, 1) or x.device.type != "cpu" or x.dim() != 4 or x.dtype != torch.float32:
            return False
        if x.numel() <= x.shape[1] or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        if not self.track_running_stats or self.momentum is None or self.eps <= 0:
            return False
        if not all(map(is_plain_vector, (self.weight, self.bias, self.running_mean, self.running_var))):
            return False
        fast = x.shape[1] % WHOLE == 0 and x.shape[1] > MANY
        return not fast and backends.choose(x.device).name == "cpu"


def is_plain_vector(x: Tensor | None) -> bool:
    return x is not None and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


class BatchNormTraining(torch.autograd.Function):
    """:func:`mfp.layer_ops.batch_norm_training_` with its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps) -> Tensor:
        out, mean, inverse_std = layer_ops.batch_norm_training_(
            x, weight, bias, running_mean, running_var, momentum, eps
        )
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        x, weight, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient's own gradient will be asked for
            found = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, None, None, *saved, True, ctx.eps, [True, True, True]
            )
        else:
            found = layer_ops.batch_norm_gradients(gradient, x, weight, *saved)
        return *found, None, None, None, None
