"""Gradient clipping once per step: by norm, by value, or by the norms of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from learnkit.callbacks.mixed_precision import MixedPrecision
from learnkit.devices.dtensor import is_shard, own_parts, whole
from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.logs.trace import Trace


class ClipGradients(Callback):
    """Clip the gradients of every optimizer step: after accumulation and reduction, unscaled.

    Give one of `max_norm`, `value` and `adaptive`; without any, max_norm=1.

    Args:
        max_norm: scale all gradients together down to this norm, where their norm is larger.
        value: clamp each number to the range from -value to value.
        adaptive: scale the gradient of each unit (a row of a matrix, a filter) down to this multiple of the norm of its
            weights (Brock et al., 2021: 0.01). It applies to the last layer and to one-dimensional parameters, too.
        norm_type: the p-norm for `max_norm`: 2, 1, inf, or another number above 0.

    Attributes:
        norms: with `max_norm`, each step's norm before clipping; only reading it reads from the device.

    Raises:
        ValueError: when more than one of them is given, or a value is not above 0.

    Example:
        >>> learn.fit(5, callbacks=[ClipGradients(max_norm=1.0)])  # doctest: +SKIP
    """

    order = MixedPrecision.order + 10
    unique = True

    def __init__(
        self,
        max_norm: float | None = None,
        *,
        value: float | None = None,
        adaptive: float | None = None,
        norm_type: float = 2.0,
    ) -> None:
        given = {"max_norm": max_norm, "value": value, "adaptive": adaptive}
        chosen = {name: limit for name, limit in given.items() if limit is not None}
        if len(chosen) > 1:
            raise ValueError(f"clipping by {' and '.join(chosen)} at once: choose one of {', '.join(given)}.")
        for name, limit in chosen.items():
            if not limit > 0:
                raise ValueError(f"{name}={limit}: expected a number above 0.")
        if not norm_type > 0:
            raise ValueError(f"norm_type={norm_type}: expected a number above 0, such as 2, 1 or float('inf').")
        self.max_norm, self.value, self.adaptive, self.norm_type = max_norm, value, adaptive, norm_type
        if not chosen:
            self.max_norm = 1.0
        self.trace = Trace()
        self.parameters: list[Any] = []
        self.are_alike = False  # whether all have one device and dtype, and none is sharded

    @property
    def norms(self) -> list[float]:
        """With `max_norm`, each step's norm before clipping; reads from the device."""
        return self.trace.read().tolist()

    def before_fit(self, learn: Learner) -> None:
        self.trace, self.parameters = Trace(), list(learn.model.parameters())
        kinds = {(type(p), p.device, p.dtype) for p in self.parameters}
        self.are_alike = len(kinds) == 1 and next(iter(kinds))[0] is torch.nn.Parameter

    def before_step(self, learn: Learner) -> None:
        if self.value is not None:
            clip_grad_value_(self.parameters, self.value)
        elif self.adaptive is not None:
            self.clip_units(self.adaptive)
        elif gradients := [p.grad for p in self.parameters if p.grad is not None]:
            self.trace.append(self.clip_alike(gradients) if self.are_alike else self.clip_any(gradients))

    def clip_alike(self, gradients: list[Tensor]) -> Tensor:
        """Clip as `clip_any` does, bit for bit, without sorting the gradients by device and dtype twice: all have the
        same.
        """
        assert self.max_norm is not None
        norms = torch._foreach_norm(gradients, self.norm_type)  # type: ignore[reportPrivateImportUsage]
        norm = torch.linalg.vector_norm(torch.stack(norms), self.norm_type)
        torch._foreach_mul_(gradients, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))  # type: ignore[reportPrivateImportUsage]
        return norm

    def clip_any(self, gradients: list[Tensor]) -> Tensor:
        assert self.max_norm is not None
        spread = self.norm_type == math.inf and any(map(is_shard, gradients))
        norm = largest_of_all(gradients) if spread else whole(get_total_norm(gradients, self.norm_type))
        clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        return norm

    @torch.no_grad()
    def clip_units(self, limit: float) -> None:
        for p in self.parameters:
            if p.grad is None:
                continue
            largest = unit_norms(p).clamp(min=1e-3) * limit
            p.grad.mul_((largest / unit_norms(p.grad).clamp(min=1e-6)).clamp(max=1.0))

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self.trace.read()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trace = Trace()
        self.trace.read_before = state["norms"].cpu()


def largest_of_all(gradients: list[Any]) -> Tensor:
    """Return the largest absolute value in sharded gradients. torch has no such norm for an empty shard."""
    from torch.distributed.tensor import DTensor, Partial

    parts = [part.abs().max() for part in own_parts(gradients) if part.numel()]
    own = torch.stack(parts).max() if parts else torch.zeros((), dtype=gradients[0].dtype, device=gradients[0].device)
    return DTensor.from_local(own, gradients[0].device_mesh, [Partial("max")]).full_tensor()


def unit_norms(tensor: Tensor) -> Tensor:
    """Return the norm of each slice along the first dimension, or of a whole vector, in a shape that broadcasts with
    the tensor.
    """
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
