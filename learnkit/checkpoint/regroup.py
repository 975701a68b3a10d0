"""The state of one rank, made from the states of all ranks, when a fit is resumed on another number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mean_state(states: list[Any]) -> Any:
    """Return, for equal structures, the mean of each floating-point tensor; everything else comes from the first."""
    first = states[0]
    if isinstance(first, dict):
        return {name: mean_state([state[name] for state in states]) for name in first}
    if isinstance(first, (list, tuple)):
        return type(first)(mean_state(list(values)) for values in zip(*states, strict=True))
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return first
    return torch.stack([state.double() for state in states]).mean(0).to(first.dtype)
