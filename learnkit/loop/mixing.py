"""What callbacks that mix the samples of a batch need from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from learnkit.devices.nested import describe

if TYPE_CHECKING:
    from learnkit.learner import Learner


def first_input(learn: Learner, name: str) -> Tensor:
    """Return the batch's first input, which must be a float tensor, with a target for each sample."""
    x: Any = learn.inputs[0] if isinstance(learn.inputs, tuple) else None
    if not isinstance(x, Tensor) or not x.is_floating_point() or not isinstance(learn.target, Tensor):
        raise TypeError(
            f"{name} expects batches (x, y) of tensors with floating-point x; this batch is "
            f"{describe((learn.inputs, learn.target))}."
        )
    return x
