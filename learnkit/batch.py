"""The forms that a batch may have: `(x, y)`, `(x1, x2, …, y)`, or a mapping with its target under `labels` or `target`."""
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from learnkit.accelerator import can_pin

TARGET_KEYS = ("labels", "target")
Inputs = tuple[Any, ...] | dict[str, Any]


def split_batch(batch: Any) -> tuple[Inputs, Any]:
    """The model's inputs, as a tuple (by position) or a dict (by keyword), and the target, None where there is none.

    A bare tensor and a one-tuple are inputs without a target.
    """
    if isinstance(batch, (tuple, list)):
        n = len(batch)
        if n == 2: return (batch[0],), batch[1]
        return (tuple(batch[:-1]), batch[-1]) if n > 1 else (tuple(batch), None)
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch: return {k: v for k, v in batch.items() if k != key}, batch[key]
        return dict(batch), None
    return (batch,), None


def target_key(batch: Any) -> str | None:
    """The key under which a mapping holds its target."""
    return next((key for key in TARGET_KEYS if key in batch), None) if isinstance(batch, Mapping) else None


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A nested structure of tuples, lists and dicts with `function` of every tensor in it; other objects as they are."""
    if isinstance(value, Tensor): return function(value)
    if isinstance(value, dict): return {k: map_tensors(function, v) for k, v in value.items()} if type(value) is dict else value
    if isinstance(value, tuple) and getattr(value, "_fields", None): return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, (tuple, list)): return type(value)(map_tensors(function, v) for v in value)
    return value


def copied(value: Any) -> Any:
    """A nested structure of tuples, lists and mappings with a copy of every tensor in it, without its graph.

    What is kept of a model's output for longer than a batch must be one: a captured CUDA graph writes its next output into the same memory.
    """
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key in value: made[key] = copied(value[key])
        return made
    if isinstance(value, (tuple, list)):
        parts = [copied(v) for v in value]
        return type(value)(*parts) if getattr(value, "_fields", None) else type(value)(parts)
    return value.detach().clone() if isinstance(value, Tensor) else value


def as_float32(tensor: Tensor) -> Tensor: return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it on `device`. The host does not wait for a copy from pinned memory to a device; it waits for a copy
    to the CPU, or to a device that would read pageable memory later (MPS)."""
    non_blocking = can_pin(device)
    return moved(value, device, lambda part: part.to(device, non_blocking=non_blocking) if isinstance(part, Tensor) else part.to(device))


def moved(value: Any, device: torch.device, move: Callable[[Any], Any]) -> Any:
    """`value` with `move` of each part that is not on `device`: tensors, and objects with a method `to`, e.g. a PackedSequence."""
    if isinstance(value, Tensor): return value if value.device == device else move(value)
    if isinstance(value, Mapping): return {k: moved(v, device, move) for k, v in value.items()}
    if callable(getattr(value, "to", None)): return move(value)
    if isinstance(value, tuple) and getattr(value, "_fields", None): return type(value)(*(moved(v, device, move) for v in value))
    if isinstance(value, (tuple, list)): return type(value)(moved(v, device, move) for v in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of a nested structure of tuples, lists and mappings, in order."""
    if isinstance(value, Tensor): return [value]
    if isinstance(value, Mapping): value = tuple(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (tuple, list)) else []


def count_samples(inputs: Any, target: Any) -> int:
    """The number of samples in a batch: the first dimension of its target, else of its first tensor, else 1."""
    first = target if isinstance(target, Tensor) else next(iter(tensors_in(target) or tensors_in(inputs)), None)
    return first.shape[0] if first is not None and first.ndim else 1


def prediction(output: Any) -> Any:
    """What metrics and `get_preds` see of a model's output: its `.logits` where it is an object that has them."""
    return output if isinstance(output, (Tensor, tuple, list)) else getattr(output, "logits", output)


def describe(value: Any) -> str:
    """A batch, prediction or target in words for an error message: `(float32 (8, 3, 32, 32), int64 (8,))`."""
    if isinstance(value, Tensor): return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping): return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"{'(' if isinstance(value, tuple) else '['}{', '.join(describe(v) for v in value)}" \
               f"{')' if isinstance(value, tuple) else ']'}"
    return type(value).__name__


def as_batch(x: Any, *, single: bool) -> Any:
    """What predict was given, as a batch without a target; one sample becomes a batch of one."""
    def lift(value: Any) -> Any: return value.unsqueeze(0) if single and isinstance(value, Tensor) else value
    if isinstance(x, Mapping): return {k: lift(v) for k, v in x.items()}
    return tuple(lift(v) for v in (x if isinstance(x, (tuple, list)) else (x,)))


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be called with an argument of this name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
