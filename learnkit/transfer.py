"""Between the host and a device, without either waiting for the other."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from learnkit.accelerator import can_pin
from learnkit.batch import tensors_in, to_device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on its way to `device`: what is enqueued there from now on finds it, and the host does not wait.

    It is copied through pinned memory, which torch keeps for later copies. Where there is none (MPS), the copy blocks: MPS would read the
    host's memory later, when it may be freed (pytorch#189690). A tensor that is not on the CPU, or is to stay there, is only moved.
    """
    if tensor.device.type != "cpu" or not can_pin(device): return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def mover(device: torch.device) -> Callable[[Any], Any]:
    """A function that brings batches to the device.

    To a CUDA device they come on a stream of their own: as the host is ahead of the device, the copy of the next batch, from pinned
    memory, runs beside the work on this one.
    """
    if device.type != "cuda": return lambda batch: to_device(batch, device)
    copies = torch.cuda.Stream(device)

    def move(batch: Any) -> Any:
        with torch.cuda.stream(copies): moved = to_device(batch, device)
        work = torch.cuda.current_stream(device)
        work.wait_stream(copies)
        for tensor in tensors_in(moved): tensor.record_stream(work)     # its memory is not free before this stream is done with it
        return moved
    return move


class Moved:
    """A loader whose batches come on a device (see `mover`); everything else is the loader's own."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None: self.loader, self.device = loader, device

    def __getattr__(self, name: str) -> Any:
        if name == "loader": raise AttributeError(name)         # while it is being copied
        return getattr(self.loader, name)

    def __len__(self) -> int: return len(self.loader)           # type: ignore[arg-type]
    def __iter__(self) -> Iterator[Any]: return map(mover(self.device), self.loader)


class Reading:
    """Numbers on their way from a device to the host: look whether they have arrived before you read them."""

    def __init__(self, values: Tensor) -> None:
        self.event = None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(values.device))
        else: self.values = values.detach().cpu()       # a device without pinned memory waits here

    @property
    def has_arrived(self) -> bool: return self.event is None or self.event.query()

    def tolist(self) -> list[float]: return self.values.tolist()
