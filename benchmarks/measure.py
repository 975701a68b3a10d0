"""Ratios measured in one run: two or more ways of doing the same work, interleaved, compared pair by pair."""
from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Work = Callable[[], Any]


def interleave(ways: Mapping[str, Work], rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, list[float]]:
    """Seconds of each round of each way. The order turns from round to round; a first round is thrown away."""
    names, seconds = list(ways), {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in names[i % len(names):] + names[:i % len(names)]:
            start = clock()
            ways[name]()
            if i: seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], name: str, base: str) -> list[float]:
    """name / base, round by round."""
    return [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]


def spread(values: list[float]) -> str:
    """"1.043 (1.021–1.066)": median, and the middle half."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.3f} ({low:.3f}–{high:.3f})"


def python_calls(work: Work) -> int:
    """How many Python functions `work` calls (generators resumed included), C functions not counted."""
    n = 0

    def see(frame: Any, event: str, arg: Any) -> None:
        nonlocal n
        n += event == "call"
    sys.setprofile(see)
    try: work()
    finally: sys.setprofile(None)
    return n


def machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file: name = next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration): pass
    return (f"{name}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, torch {torch.__version__}, "
            f"{time.strftime('%Y-%m-%d')}")
