"""Measures the speed of a fit: samples per second, times of batches, the share of the device's peak, and its memory."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

from learnkit.callbacks.recorder import Recorder
from learnkit.data.batch import count_samples
from learnkit.devices.accelerator import wait_for_device
from learnkit.devices.nested import in_bytes
from learnkit.hooks import Callback
from learnkit.learner import Learner


class Timer(Callback):
    """Measure each epoch's training pass: `timer.rows`, or `print(timer)` for a table.

    Loggers also log its samples_per_second. It waits for the device at the start and at the end of the pass, but not
    between. Samples are those of all ranks.

    Args:
        flops_per_sample: floating-point operations of a training step for one sample, forward and backward. Together
            with `peak_flops` it gives the model FLOPs utilization (MFU).
        peak_flops: the highest number of floating-point operations of one device per second.

    Raises:
        ValueError: when only one of them is given.

    Example:
        >>> learn.fit(2, callbacks=[timer := Timer()])  # doctest: +SKIP
        >>> print(timer)  # doctest: +SKIP
    """

    order = Recorder.order + 10  # its values must exist before the loggers read them
    in_trials = False

    def __init__(self, *, flops_per_sample: float | None = None, peak_flops: float | None = None) -> None:
        if (flops_per_sample is None) != (peak_flops is None):
            raise ValueError("the MFU needs both flops_per_sample=… and peak_flops=…; only one was given.")
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self.rows: list[dict[str, float]] = []  # one per epoch
        self.n_samples = 0  # of this rank, in the current pass
        self.times: list[float] = []  # times at which its batches ended

    def before_fit(self, learn: Learner) -> None:
        self.rows = []

    def before_train(self, learn: Learner) -> None:
        self.n_samples = 0
        reset_memory(learn.device)
        wait_for_device(learn.device)
        self.times = [time.perf_counter()]

    def after_batch(self, learn: Learner) -> None:
        if not learn.training:
            return
        self.n_samples += count_samples(learn.inputs, learn.target)
        self.times.append(time.perf_counter())

    def after_train(self, learn: Learner) -> None:
        wait_for_device(learn.device)
        seconds = time.perf_counter() - self.times[0]
        n_samples = float(learn.ranks.all_sum(torch.tensor(float(self.n_samples), dtype=torch.float64)))
        batches = sorted(1000 * (b - a) for a, b in pairwise(self.times)) or [0.0]
        row = {
            "seconds": seconds,
            "samples_per_second": n_samples / seconds,
            "batch_ms": batches[len(batches) // 2],
            "slow_batch_ms": batches[int(0.95 * len(batches))],
        }
        if self.flops_per_sample is not None and self.peak_flops is not None:
            row["mfu"] = row["samples_per_second"] * self.flops_per_sample / (self.peak_flops * learn.world_size)
        if learn.device.type != "cpu":
            row["peak_memory"] = float(torch.accelerator.max_memory_allocated(learn.device))
        self.rows.append(row)

    def after_epoch(self, learn: Learner) -> None:
        if self.rows:
            learn.values["samples_per_second"] = self.rows[-1]["samples_per_second"]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state["rows"]]

    def __str__(self) -> str:
        lines = ["epoch   seconds   samples/s  batch ms: median     95 %     MFU  peak memory"]
        for epoch, row in enumerate(self.rows):
            mfu = f"{100 * row['mfu']:.1f} %" if "mfu" in row else "-"
            memory = in_bytes(row["peak_memory"]) if "peak_memory" in row else "-"
            lines.append(
                f"{epoch:5}  {row['seconds']:8.2f}  {row['samples_per_second']:10,.1f}  {row['batch_ms']:16.2f} "
                f"{row['slow_batch_ms']:8.2f}  {mfu:>6}  {memory:>11}"
            )
        return "\n".join(lines)


def reset_memory(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
