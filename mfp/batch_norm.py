"""BatchNorm for training networks whose channels are any number, after pruning: torch's wants whole vectors of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mfp import backend as backends
from mfp import ops
from mfp.moves import is_plain_call

# Channels that torch's own kernel takes as fast: whole vectors, and so many that memory is what is waited for.
WHOLE, MANY = 16, 64


class NarrowBatchNorm2d(nn.BatchNorm2d):
    """Trains by mfp's op where torch's kernel is slow: on a CPU, in float32 and channels_last, with few channels or a
    number that is no multiple of 16. The same as :class:`torch.nn.BatchNorm2d` in all else."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.is_slow(x)):
            return super().forward(x)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var, self.momentum, self.eps
        return BatchNormTraining.apply(x, self.weight, self.bias, *statistics)

    def is_slow(self, x: Tensor) -> bool:
        if not is_plain_call(x, 1) or x.device.type != "cpu" or x.dim() != 4 or x.dtype != torch.float32:
            return False
        if x.numel() <= x.shape[1] or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        if self.momentum is None or any(t is None or t.dtype != torch.float32 for t in tensors):
            return False
        fast = x.shape[1] % WHOLE == 0 and x.shape[1] > MANY
        return not fast and backends.choose(x.device).name == "cpu"


class BatchNormTraining(torch.autograd.Function):
    """:func:`mfp.ops.batch_norm_training_` with its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps) -> Tensor:
        out, mean, inverse_std = ops.batch_norm_training_(x, weight, bias, running_mean, running_var, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        return *ops.batch_norm_gradients(gradient, *ctx.saved_tensors), None, None, None, None
