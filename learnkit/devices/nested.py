"""Nested structures of tuples, lists and mappings: list, replace, copy, move and describe their tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from learnkit.devices.accelerator import can_pin


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a nested structure of tuples, lists and dicts with `function` applied to each tensor.

    Other objects are unchanged.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(function, v) for k, v in value.items()} if type(value) is dict else value
    if isinstance(value, tuple) and getattr(value, "_fields", None):
        return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, v) for v in value)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor of a nested structure of tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (tuple, list)) else []


def copied(value: Any) -> Any:
    """Return a nested structure of tuples, lists and mappings with a detached copy of every tensor.

    If a model's output is kept for longer than a batch, it must be such a copy: a captured CUDA graph writes its next
    output into the same memory.
    """
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        for key in value:
            made[key] = copied(value[key])
        return made
    if isinstance(value, (tuple, list)):
        parts = [copied(v) for v in value]
        return type(value)(*parts) if getattr(value, "_fields", None) else type(value)(parts)
    return value.detach().clone() if isinstance(value, Tensor) else value


def as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def to_device(value: Any, device: torch.device) -> Any:
    """Return `value` with every tensor on `device`.

    The host does not wait for a copy from pinned memory to a device. It waits for a copy to the CPU, or to a device
    that would read pageable memory later (MPS).
    """
    non_blocking = can_pin(device)
    return moved(
        value,
        device,
        lambda part: part.to(device, non_blocking=non_blocking) if isinstance(part, Tensor) else part.to(device),
    )


def moved(value: Any, device: torch.device, move: Callable[[Any], Any]) -> Any:
    """Return `value` with `move` applied to each part that is not on `device`.

    Parts are tensors, and objects with a method `to`, e.g. a PackedSequence.
    """
    if isinstance(value, Tensor):
        return value if value.device == device else move(value)
    if isinstance(value, Mapping):
        return {k: moved(v, device, move) for k, v in value.items()}
    if callable(getattr(value, "to", None)):
        return move(value)
    if isinstance(value, tuple) and getattr(value, "_fields", None):
        return type(value)(*(moved(v, device, move) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(moved(v, device, move) for v in value)
    return value


def describe(value: Any) -> str:
    """Describe a batch, prediction or target for an error message: `(float32 (8, 3, 32, 32), int64 (8,))`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return (
            f"{'(' if isinstance(value, tuple) else '['}{', '.join(describe(v) for v in value)}"
            f"{')' if isinstance(value, tuple) else ']'}"
        )
    return type(value).__name__


def in_bytes(n: float) -> str:
    """Return a number of bytes as text, with decimal prefixes: `1.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
