"""Copies between the host and a device in which neither waits for the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from learnkit.devices.accelerator import can_pin, has_streams
from learnkit.devices.nested import moved, to_device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to `device`: work that is enqueued afterwards can use it, and the host does not wait.

    It is copied through pinned memory, which torch keeps for later copies. Without pinned memory (MPS) the copy blocks:
    MPS would read the host's memory later, when it may have been freed (pytorch#189690). A tensor that is not on the
    CPU, or that stays there, is just moved.
    """
    if tensor.device.type != "cpu" or not can_pin(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def mover(device: torch.device) -> Callable[[Any], Any]:
    """Return a function that moves the batches of one pass to `device`, one after the other."""
    return Mover(device) if is_asynchronous(device) else lambda batch: to_device(batch, device)


def is_asynchronous(device: torch.device) -> bool:
    """Return whether copies between host and device can run while both work.

    This needs pinned memory and a separate stream.
    """
    return can_pin(device) and has_streams(device)


class Mover:
    """Copy the batches of one pass to a device, each while the device works on the batch before.

    The host enqueues the work on one batch, and then the copy of the next one, from pinned memory, on the process's
    copy stream. The copy does not wait for that work: its destination is memory that was allocated before the work was
    enqueued. So there are two batches on the device at a time, however far the host is ahead. If the shapes of a batch
    differ from those of the batch before, its memory is allocated late, and its copy waits for that work. The first
    batch has no work to overlap with, and is copied on the stream of the work: a pass of one batch allocates memory
    only once.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self.is_first = True
        self.rooms: list[Tensor] = []  # memory on the device for the next batch,
        self.work: torch.Stream | None = None  # allocated on this stream,
        self.taken = torch.Event(self.device)  # at this point: earlier uses of the memory were enqueued before

    def __call__(self, batch: Any) -> Any:
        if self.is_first:
            self.is_first = False
            return to_device(batch, self.device)
        away: list[Any] = []
        moved(batch, self.device, away.append)
        if not away or not all(map(is_plain_cpu_tensor, away)):
            return to_device(batch, self.device)
        arrived = iter(self.brought(list(map(pinned, away))))
        return moved(batch, self.device, lambda _: next(arrived))

    def brought(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return copies on the device, for work that is enqueued on its current stream afterwards."""
        work, copies = torch.accelerator.current_stream(self.device), copy_stream(self.device)
        if work != self.work or list(map(form, self.rooms)) != list(map(form, tensors)):
            self.take_rooms(tensors, work)
        rooms = self.rooms
        copies.wait_event(self.taken)
        try:
            with copies:
                for room, tensor in zip(rooms, tensors, strict=True):
                    room.copy_(tensor, non_blocking=True)
        finally:
            work.wait_stream(copies)  # also after an interruption: `rooms` may then be freed, and used again
        self.take_rooms(tensors, work)
        return rooms

    def take_rooms(self, tensors: list[Tensor], work: torch.Stream) -> None:
        self.rooms, self.work = [], work
        self.rooms = [torch.empty_like(tensor, device=self.device) for tensor in tensors]
        self.taken.record(work)


def is_plain_cpu_tensor(part: Any) -> bool:
    """Return whether a part is a plain tensor in CPU memory.

    Subclasses, sparse tensors and tensors with a graph are moved by their own methods.
    """
    return (
        type(part) is Tensor and part.device.type == "cpu" and part.layout is torch.strided and not part.requires_grad
    )


def form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()


def pinned(tensor: Tensor) -> Tensor:
    """Return the tensor in pinned memory without gaps, since a copy from other memory waits.

    torch keeps freed pinned memory for later tensors.
    """
    is_dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if is_dense and tensor.is_pinned() else torch.empty_like(tensor, pin_memory=True).copy_(tensor)


@cache
def copy_stream(device: torch.device) -> torch.Stream:
    """Return the stream on which this process copies from and to a device while the device computes on others.

    A forked child creates its own: a process that has used the device, and so has a stream, cannot fork a child that
    uses it.
    """
    return torch.Stream(device)


class Enqueued:
    """The work enqueued on a device's current stream so far, for a thread that copies results on the copy stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.event = None if not is_asynchronous(device) else torch.accelerator.current_stream(device).record_event()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """In the block, the copy stream is the current stream and runs after that work; the host does not wait."""
        if self.event is None:
            yield
            return
        copies = copy_stream(self.device)
        copies.wait_event(self.event)
        with copies:
            yield


class Moved:
    """A loader whose batches are moved to a device (see `mover`); everything else is the wrapped loader's."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)  # while this object is being copied
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return map(mover(self.device), self.loader)


class Reading:
    """Numbers that are being copied from a device to the host.

    `has_arrived` says whether they are there; reading them earlier waits. For a device without pinned memory or events
    (MPS) they are read immediately, which waits for the device.
    """

    def __init__(self, values: Tensor) -> None:
        self.event: torch.Event | None = None
        if values.is_cpu or not is_asynchronous(values.device):
            self.values = values.detach().cpu()
        else:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(
                values.detach(), non_blocking=True
            )
            self.event = torch.Event(values.device)
            self.event.record(torch.accelerator.current_stream(values.device))

    @property
    def has_arrived(self) -> bool:
        return self.event is None or self.event.query()

    def tolist(self) -> list[float]:
        if self.event is not None and not self.event.query():
            self.event.synchronize()
        return self.values.tolist()


def stacked_on_host(rows: list[Tensor]) -> Tensor:
    """Return rows of equal shape as one tensor, float (n, …), on the CPU.

    Rows on a device are fetched with a single read. The first rows may be on the CPU, as in a fit that was resumed.
    """
    here = [row for row in rows if row.is_cpu]
    there = [row for row in rows if not row.is_cpu]
    parts = [torch.stack(part).cpu() for part in (here, there) if part]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
