"""The forms of a batch: `(x, y)`, `(x1, x2, …, y)`, or a mapping whose target is under `labels` or `target`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from learnkit.devices.nested import tensors_in

TARGET_KEYS = ("labels", "target")
Inputs = tuple[Any, ...] | dict[str, Any]


def split_batch(batch: Any) -> tuple[Inputs, Any]:
    """Return (inputs, target): the inputs as a tuple (by position) or a dict (by keyword), the target or None.

    A tensor or a one-tuple is an input without a target.
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
    """Return the key of a mapping's target."""
    return next((key for key in TARGET_KEYS if key in batch), None) if isinstance(batch, Mapping) else None


def count_samples(inputs: Any, target: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its target, else of its first tensor, else 1."""
    first = target if isinstance(target, Tensor) else next(iter(tensors_in(target) or tensors_in(inputs)), None)
    return first.shape[0] if first is not None and first.ndim else 1


def prediction(output: Any) -> Any:
    """Return what metrics and `get_preds` use of a model's output: its `.logits` if it is an object that has them."""
    return output if isinstance(output, (Tensor, tuple, list)) else getattr(output, "logits", output)


def as_batch(x: Any, *, single: bool) -> Any:
    """Return the argument of predict as a batch without a target; a single sample becomes a batch of one."""

    def lift(value: Any) -> Any:
        return value.unsqueeze(0) if single and isinstance(value, Tensor) else value

    if isinstance(x, Mapping):
        return {k: lift(v) for k, v in x.items()}
    return tuple(lift(v) for v in (x if isinstance(x, (tuple, list)) else (x,)))


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function can be called with an argument of this name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
