"""Batch normalization over the batch of all ranks, on any backend."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from learnkit.devices.accelerator import widest_float
from learnkit.distributed.reduce import needs_group

M = TypeVar("M", bound=nn.Module)


def sync_batchnorm(model: M) -> M:
    """Make every batch normalization of the model use the global batch during training.

    It becomes torch's SyncBatchNorm on devices that have its kernels (CUDA, XPU), else `GlobalBatchNorm`; the weights
    stay the same objects.

    Args:
        model: changed in place, unless it is itself a batch normalization.

    Returns:
        The model. `restore_batchnorm` undoes the change.
    """
    return replaced(model, synchronized)


def restore_batchnorm(model: M) -> M:
    """Undo `sync_batchnorm`: put the original modules back, with the current weights and statistics.

    Args:
        model: changed in place, unless it is itself a batch normalization.

    Returns:
        The model.
    """
    return replaced(model, restored)


class GlobalBatchNorm(_BatchNorm):
    """Batch normalization over the global batch, on any backend, with any number of samples on each rank.

    It needs one collective in the forward and one in the backward pass. The result equals BatchNorm on the joined
    batch; the gradients of the inputs are those of the sum of the ranks' losses, as with torch's SyncBatchNorm. Inputs
    have the shape `(batch, channels, …)`.

    Example:
        >>> GlobalBatchNorm(3)(torch.randn(4, 3, 2, 2)).shape
        torch.Size([4, 3, 2, 2])
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (batch, channels, …), got a tensor of shape {tuple(input.shape)}.")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        from_batch = self.training or self.running_mean is None
        if not from_batch or not needs_group():
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        n, mean, var = global_moments(x)
        if self.training and self.track_running_stats:
            self.update(n, mean, var)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        output = (x - mean.to(x.dtype).view(shape)) * torch.rsqrt(var + self.eps).to(x.dtype).view(shape)
        if self.weight is not None:
            output = output * self.weight.view(shape)
        if self.bias is not None:
            output = output + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def update(self, n: Tensor, mean: Tensor, var: Tensor) -> None:
        """Update the running statistics with the unbiased variance, as BatchNorm does."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = var * (n / (n - 1).clamp(min=1))
        for running, now in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.mul_(1 - momentum).add_(now.to(running.dtype) * momentum)


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, mean, variance) for each channel over all ranks, float64 (float32 on a device without it), in one collective.

    Each rank sums around its own mean and shifts the sums in float64: plain float32 sums of squares would cancel.
    """
    dims, n_channels, n_own = [d for d in range(x.dim()) if d != 1], x.shape[1], x.numel() // x.shape[1]
    wide = widest_float(x.device)
    own_mean = x.detach().sum(dims) / max(n_own, 1)  # any constant would do
    centred, shift = x - own_mean.view(1, -1, *(1,) * (x.dim() - 2)), own_mean.to(wide)
    rest = centred.sum(dims).to(wide)
    squares = centred.square().sum(dims).to(wide) + 2 * shift * rest + n_own * shift.square()
    own = torch.cat([rest + n_own * shift, squares, shift.new_full((1,), n_own)])  # filled there: no copy, no wait
    total, squares, n = SumOverRanks.apply(own).split([n_channels, n_channels, 1])
    mean = total / n
    return n, mean, (squares / n - mean.square()).clamp(min=0)


class SumOverRanks(torch.autograd.Function):
    """A differentiable all-reduce: gradients are summed over the ranks too, because each rank's loss depends on all
    inputs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def replaced(module: Any, replace: Any) -> Any:
    for name, child in module.named_children():
        twin = replaced(child, replace)
        if twin is not child:
            setattr(module, name, twin)
    return replace(module)


def synchronized(module: nn.Module) -> nn.Module:
    done = (GlobalBatchNorm, nn.SyncBatchNorm)
    if not isinstance(module, _BatchNorm) or isinstance(module, done):
        return module
    kind: Any = nn.SyncBatchNorm if has_kernels(module) else GlobalBatchNorm
    twin = kind.__new__(
        kind
    )  # shares all that the module has: parameters, buffers, hooks and settings are the same objects
    twin.__dict__.update(module.__dict__)
    twin.__dict__["replaces"] = module  # not as an attribute, which would register it as a child
    if kind is nn.SyncBatchNorm:
        twin.__dict__["process_group"] = None  # the default one
    return twin


def has_kernels(module: nn.Module) -> bool:
    """Whether torch's SyncBatchNorm has kernels for the device that this module is on."""
    kinds = {t.device.type for t in (*module.parameters(), *module.buffers())}
    if len(kinds) != 1:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::batch_norm_stats", torch._C._dispatch_key_for_device(*kinds)
    )


def restored(module: nn.Module) -> nn.Module:
    original = module.__dict__.get("replaces")
    if not isinstance(original, nn.Module):
        return module
    original.__dict__.update({k: v for k, v in module.__dict__.items() if k not in ("replaces", "process_group")})
    return original
