"""The forms that a batch may have: `(x, y)`, `(x1, x2, …, y)`, or a mapping with its target under `labels` or
`target`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from learnkit.devices.nested import tensors_in

TARGET_KEYS = ("labels", "target")
Inputs = tuple[Any, ...] | dict[str, Any]


def split_batch(batch: Any) -> tuple[Inputs, Any]:
    """The model's inputs, as a tuple (by position) or a dict (by keyword), and the target, None where there is none.

    A bare tensor and a one-tuple are inputs without a target.
    """
    if isinstance(batch, (tuple, list)):
        n = len(batch)
        if n == 2:
            return (batch[0],), batch[1]
        return (tuple(batch[:-1]), batch[-1]) if n > 1 else (tuple(batch), None)
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        return dict(batch), None
    return (batch,), None


def target_key(batch: Any) -> str | None:
    """The key under which a mapping holds its target."""
    return next((key for key in TARGET_KEYS if key in batch), None) if isinstance(batch, Mapping) else None


def count_samples(inputs: Any, target: Any) -> int:
    """The number of samples in a batch: the first dimension of its target, else of its first tensor, else 1."""
    first = target if isinstance(target, Tensor) else next(iter(tensors_in(target) or tensors_in(inputs)), None)
    return first.shape[0] if first is not None and first.ndim else 1


def prediction(output: Any) -> Any:
    """What metrics and `get_preds` see of a model's output: its `.logits` where it is an object that has them."""
    return output if isinstance(output, (Tensor, tuple, list)) else getattr(output, "logits", output)


def as_batch(x: Any, *, single: bool) -> Any:
    """What predict was given, as a batch without a target; one sample becomes a batch of one."""

    def lift(value: Any) -> Any:
        return value.unsqueeze(0) if single and isinstance(value, Tensor) else value

    if isinstance(x, Mapping):
        return {k: lift(v) for k, v in x.items()}
    return tuple(lift(v) for v in (x if isinstance(x, (tuple, list)) else (x,)))


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be called with an argument of this name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
