"""Numbers that are recorded on the device and read later."""

from __future__ import annotations

import torch

from learnkit.devices.transfer import sent

FOLD_EVERY = 256  # losses kept as separate tensors; 64 to 4096 cost the same (2026-11-21)


class Trace:
    """A growing list of numbers on the device: 0-d tensors are appended without a read, and read later as floats.

    Append copies only: a captured CUDA graph overwrites its last output with the next one.
    """

    def __init__(self) -> None:
        self.read_before = torch.zeros(0)  # float (n,) on the CPU: the first numbers, each of which is read only once
        self.folded: list[torch.Tensor] = []
        self.recent: list[torch.Tensor] = []

    def append(self, value: torch.Tensor) -> None:
        self.recent.append(value)
        if len(self.recent) >= FOLD_EVERY:
            self.fold()

    def fold(self) -> None:
        row = torch.stack(self.recent)
        self.folded.append(
            row.to(torch.promote_types(row.dtype, torch.float32))
        )  # a float64 model's losses stay float64
        self.recent = []

    def since(self, start: int) -> torch.Tensor:
        """Return the numbers from index `start` on: float (n,), on the device if not all of them were read before."""
        if self.recent:
            self.fold()
        n_read = len(self.read_before)
        if not self.folded:
            return self.read_before[start:]
        if len(self.folded) > 1:
            self.folded = [torch.cat([part.to(self.folded[-1].device) for part in self.folded])]
        [newer] = self.folded
        return (
            newer[start - n_read :]
            if start >= n_read
            else torch.cat([sent(self.read_before[start:], newer.device), newer])
        )

    def read(self) -> torch.Tensor:
        """Return all numbers: float (n,), on the CPU; waits for the device if there are new ones."""
        if self.folded or self.recent:
            self.read_before, self.folded = torch.cat([self.read_before, self.since(len(self.read_before)).cpu()]), []
        return self.read_before

    def replace(self, start: int, values: torch.Tensor) -> None:
        """Replace the numbers from `start` on by `values`, which are on the CPU."""
        self.read_before = torch.cat([before := self.read()[:start], values.to(before)])

    def __len__(self) -> int:
        return len(self.read_before) + sum(len(part) for part in self.folded) + len(self.recent)
