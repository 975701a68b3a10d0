"""Ratios measured in one run: two or more ways to do the same work, interleaved, compared pair by pair."""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], Any]
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def interleave(
    ways: Mapping[str, Work], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Return the seconds of each round of each way. The order rotates each round; the first round is dropped."""
    names, seconds = list(ways), {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            ways[name]()
            if i:
                seconds[name].append(clock() - start)
    return seconds


def device_named(name: str) -> torch.device:
    """Return the device "cpu", "cuda" or another accelerator of torch; "twin" loads the stand-in accelerator of the
    tests.
    """
    if name == "twin":
        stand_in().load()
    device = torch.device(name)
    if device.type != "cpu" and torch.accelerator.current_accelerator(check_available=True) != torch.device(
        device.type
    ):
        raise SystemExit(
            f"--device {name}: this machine has no such accelerator. On the CPU, --device twin is a stand-in for one."
        )
    return (
        device
        if device.index is not None or name == "cpu"
        else torch.device(device.type, torch.accelerator.current_device_index())
    )


def stand_in() -> Any:
    """Return the module tests/accelerator/twin.py."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module("tests.accelerator.twin")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=device_named, default=CPU, help="cpu, cuda, or twin, the stand-in accelerator of the tests"
    )


def finish(device: torch.device) -> None:
    """Wait until the device has finished its work; for the CPU do nothing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a `time.perf_counter` that waits for the device first: the host waits at both ends of a measurement, and
    not within it.
    """

    def clock() -> float:
        finish(device)
        return time.perf_counter()

    return clock


def ratios(seconds: Mapping[str, list[float]], name: str, base: str) -> list[float]:
    """Return name / base, round by round."""
    return [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]


def spread(values: list[float], digits: int = 3) -> str:
    """Return median and middle half as text: "1.043 (1.021–1.066)"."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def python_calls(work: Work) -> int:
    """Return how many Python functions `work` calls, including resumed generators, but not C functions."""
    n = 0

    def see(frame: Any, event: str, arg: Any) -> None:
        nonlocal n
        n += event == "call"

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return n


class Traffic(TorchDispatchMode):
    """A context manager that counts what this process sends to other ranks and reads from the device.

    `counts` has collectives by name ("allreduce_", "broadcast_"), also those that DistributedDataParallel starts in
    C++, and "read", each read of a number from a tensor. What happens within one of the functions `displays` is counted
    separately, as "bar: read" and so on.
    """

    def __init__(self, *displays: Callable[..., Any]) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.displays = [function.__code__ for function in displays]
        self.methods = ReadingMethods(partial(self.count, "read"))

    def __enter__(self) -> Traffic:
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            self.count(name)
        elif name == "_local_scalar_dense":
            self.count("read")  # item, float, int, bool, an index, a format
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code not in self.displays:
            frame = frame.f_back
        self.counts[name if frame is None else f"bar: {name}"] += 1


class ReadingMethods(TorchFunctionMode):
    """Call `tell` for each read that the dispatcher does not see."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.tell()
        return func(*args, **(kwargs or {}))


def machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration):
        pass
    return (
        f"{name}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}"
    )
