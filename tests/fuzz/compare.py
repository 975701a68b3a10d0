"""What differs between two outcomes, by path: nothing, to the last bit, or nothing beyond the order of sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

METRIC = (
    1e-9  # relative, of metrics: functions such as accuracy give a batch's mean in float32 (docs/reliability.md, 11)
)
HOW = ("fused", "foreach")  # an optimizer's settings that are of the machine and the spread, not of the algorithm
CLOSE = 1e-9  # relative, of float64: the same numbers added up in another order, over some 20 steps (seen: 1e-13)
TINY = 1e-12  # absolute: what is 0 but for rounding


def differences(a: Any, b: Any, *, close: bool = False, at: str = "") -> list[str]:
    """One line for each place in which they differ."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return of_tensors(a, b, close=close, at=at)
    if isinstance(a, np.ndarray):
        a, b = a.tolist(), b.tolist()
    if isinstance(a, dict) and isinstance(b, dict):
        lines = [f"{at}.{key}: only one has it" for key in a.keys() ^ b.keys() if not (close and key in HOW)]
        return lines + [
            line
            for key in a
            if key in b and not (close and key in HOW)
            for line in differences(a[key], b[key], close=close, at=f"{at}.{key}")
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{at}: {len(a)} and {len(b)} items"]
        lines = [
            line
            for k, (x, y) in enumerate(zip(a, b, strict=True))
            for line in differences(x, y, close=close, at=f"{at}[{k}]")
        ]
        return lines if len(lines) < 4 else [*lines[:2], f"{at}: {len(lines)} places of {len(a)}"]
    if isinstance(a, float) and isinstance(b, float):
        same = (
            a == b
            or (math.isnan(a) and math.isnan(b))
            or (close and abs(a - b) <= (METRIC if is_metric(at) else CLOSE) * max(abs(a), abs(b)) + TINY)
        )
        return [] if same else [f"{at}: {a!r} and {b!r}"]
    return [] if a == b else [f"{at}: {str(a)[:100]} and {str(b)[:100]}"]


def is_metric(at: str) -> bool:
    """Whether a place is a metric's value, not a loss."""
    if at.startswith("history.values"):
        return not at.endswith(("[0]", "[1]"))
    return at.startswith(("validated.", "measured.")) and not at.endswith("_loss")


def of_tensors(a: Tensor, b: Tensor, *, close: bool, at: str) -> list[str]:
    if a.shape != b.shape or a.dtype != b.dtype:
        return [f"{at}: {tuple(a.shape)} of {a.dtype} and {tuple(b.shape)} of {b.dtype}"]
    if torch.equal(a, b):
        return []
    if not a.is_floating_point():
        return [f"{at}: other numbers"]
    a, b = a.double(), b.double()
    scale = torch.maximum(a.abs(), b.abs()).max() if a.numel() else torch.zeros(())
    if torch.equal(a.isnan(), b.isnan()) and bool(
        ((a - b).abs().nan_to_num() <= (CLOSE * scale + TINY if close else 0)).all()
    ):
        return []
    return [f"{at}: {float((a - b).abs().nan_to_num(1e9).max()):.3g} apart, of {float(scale):.3g}"]
