"""Batch norm whose statistics are those of the global batch, on a CPU as on a GPU.

mean = sum_r sum_i x_i / n, var = sum_r sum_i (x_i - mean)^2 / n over the ranks r of the process group; gradients flow
back through both sums, so that DDP gives the gradient of one process (Ioffe & Szegedy 2015, 1502.03167). On CUDA it is
torch's own synchronised batch norm, which refuses CPU tensors; there, two all-reduced sums a layer do the same.

Replaces modules of a network in place, keeping their parameters, buffers and names. Knows nothing of the network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`network` with every batch norm synchronised over the initialised process group."""
    if device.type == "cuda":
        return convert_sync_batchnorm(network)
    if isinstance(network, _BatchNorm):
        return SummedBatchNorm(network)
    for name, child in network.named_children():
        setattr(network, name, synchronise(child, device))
    return network


class SummedBatchNorm(_BatchNorm):
    """A batch norm that sums its statistics over the process group while it trains.

    Args:
        like: the batch norm it replaces, whose tensors it takes over; timm's have an activation in them.
    """

    def __init__(self, like: _BatchNorm) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self.weight, self.bias = like.weight, like.bias
        self.running_mean, self.running_var = like.running_mean, like.running_var
        self.num_batches_tracked = like.num_batches_tracked
        self.drop: Any = getattr(like, "drop", None)
        self.act: Any = getattr(like, "act", None)
        self.train(like.training)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) -> the same shape."""
        output = self._normalise(input) if self.training else super().forward(input)
        return output if self.act is None else self.act(self.drop(output))

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        local = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        total = all_reduce(local, op=dist.ReduceOp.SUM)
        n = total[-1].detach()
        mean = total[:-1] / n
        centred = x - mean.view(shape)
        # From centred values: E[x^2] - E[x]^2 loses the variance of features far from 0 in float32.
        var = all_reduce(centred.square().sum(dims), op=dist.ReduceOp.SUM) / n
        if self.track_running_stats:
            self._track(mean.detach(), var.detach() * (n / (n - 1).clamp(min=1)))
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y

    def _track(self, mean: torch.Tensor, unbiased: torch.Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(unbiased, share)
