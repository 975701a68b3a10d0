"""Sharpness-aware minimization."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import get_total_norm

from learnkit.callbacks.auto_microbatch import AutoMicrobatch
from learnkit.callbacks.clip_gradients import ClipGradients
from learnkit.callbacks.mixed_precision import MixedPrecision
from learnkit.callbacks.reduce_afterwards import ReduceAfterwards
from learnkit.devices.dtensor import whole
from learnkit.devices.nested import map_tensors
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner


class SAM(Callback):
    """Step with the gradient at the weights moved uphill by a distance `rho` (Foret et al., 2021): two passes per step.

    On several ranks uphill is the direction of the gradient of all ranks. The recorded loss and batch norm's statistics
    are those at the weights themselves.

    Args:
        rho: the distance, above 0.

    Raises:
        ValueError: when `rho` is not above 0, or, at the start of the fit, together with Accumulate or AutoMicrobatch,
            which split the batch of a step, with delay_allreduce, or with float16.

    Example:
        >>> learn.fit(5, callbacks=[SAM(rho=0.05)])  # doctest: +SKIP
    """

    order = ClipGradients.order - 5
    unique = True

    def __init__(self, rho: float = 0.05) -> None:
        if not rho > 0:
            raise ValueError(f"rho={rho}: expected a distance above 0, such as 0.05.")
        self.rho = rho

    def before_fit(self, learn: Learner) -> None:
        for callback in learn.running:
            if isinstance(callback, (AutoMicrobatch, ReduceAfterwards)) or callback.batches_per_step > 1:
                raise ValueError(
                    f"SAM cannot be combined with {type(callback).__name__}: its second pass needs the whole batch of "
                    f"a step at once, and the gradients of all ranks. Use one of them."
                )
            if isinstance(callback, MixedPrecision) and callback.dtype == torch.float16:
                raise ValueError(
                    "SAM cannot be combined with float16: it moves along gradients that sometimes overflow. Use "
                    "to_bf16() or to_fp32()."
                )

    def around_step(self, learn: Learner, run: Run) -> None:
        moved = [p for p in learn.model.parameters() if p.grad is not None]
        # Copies: a captured CUDA graph overwrites the first pass's output with the second one's.
        pred, loss = learn.pred, learn.loss.clone()
        pred = pred.clone() if isinstance(pred, torch.Tensor) else map_tensors(torch.clone, pred)
        weights, buffers = [p.detach().clone() for p in moved], [(b, b.clone()) for b in learn.model.buffers()]
        try:
            self.climb(moved)
            learn.zero_grad()
            learn.stages.forward()
            learn.stages.backward()
        finally:
            with torch.no_grad():
                for p, value in (*zip(moved, weights, strict=True), *buffers):
                    p.copy_(value)
            learn.pred, learn.loss = pred, loss
        run()

    @torch.no_grad()
    def climb(self, parameters: list[Any]) -> None:
        gradients = [p.grad for p in parameters]
        if not gradients:
            return
        scale = self.rho / (whole(get_total_norm(gradients)) + 1e-12)
        torch._foreach_add_(parameters, torch._foreach_mul(gradients, scale))  # type: ignore[reportPrivateImportUsage]
