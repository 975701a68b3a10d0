"""Between the host and a device, without either waiting for the other."""

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
    """A small host tensor on its way to `device`: what is enqueued there from now on finds it, and the host does not
    wait.

    It is copied through pinned memory, which torch keeps for later copies. Where there is none (MPS), the copy blocks:
    MPS would read the host's memory later, when it may be freed (pytorch#189690). A tensor that is not on the CPU, or
    is to stay there, is only moved.
    """
    if tensor.device.type != "cpu" or not can_pin(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def mover(device: torch.device) -> Callable[[Any], Any]:
    """A function that brings the batches of one pass to `device`, one after the other."""
    return Mover(device) if is_asynchronous(device) else lambda batch: to_device(batch, device)


def is_asynchronous(device: torch.device) -> bool:
    """Whether copies between the host and a device can run while both work: through pinned memory, and on a stream of
    their own.
    """
    return can_pin(device) and has_streams(device)


class Mover:
    """Copies the batches of one pass to a device, each while the device works on the batch before.

    The host enqueues the work on one batch, and then the copy of the next one, from pinned memory, on the process's
    copy stream. The copy does not wait for that work: its destination is memory that was taken before the work was
    enqueued. So two batches lie on the device at a time, however far the host is ahead. A batch of other shapes than
    the one before takes its memory late, and waits for that work. The first batch has no work to overlap with, and is
    copied on the stream of the work: a pass of one batch takes its memory once.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self.is_first = True
        self.rooms: list[Tensor] = []  # memory on the device for the next batch,
        self.work: torch.Stream | None = None  # which belongs to this stream,
        self.taken = torch.Event(self.device)  # since then: what used it before has been enqueued

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
        """Copies on the device, for what is enqueued on its current stream from now on."""
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
            work.wait_stream(copies)  # also where that was interrupted: `rooms` may be free then, and used again
        self.take_rooms(tensors, work)
        return rooms

    def take_rooms(self, tensors: list[Tensor], work: torch.Stream) -> None:
        self.rooms, self.work = [], work
        self.rooms = [torch.empty_like(tensor, device=self.device) for tensor in tensors]
        self.taken.record(work)


def is_plain_cpu_tensor(part: Any) -> bool:
    """Whether elements in the CPU's memory are all that it is: subclasses, sparse tensors and those with a graph move
    themselves.
    """
    return (
        type(part) is Tensor and part.device.type == "cpu" and part.layout is torch.strided and not part.requires_grad
    )


def form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()


def pinned(tensor: Tensor) -> Tensor:
    """The same in pinned memory, without gaps: a copy from other memory waits. torch keeps pinned memory that is free
    for the next one.
    """
    is_dense = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if is_dense and tensor.is_pinned() else torch.empty_like(tensor, pin_memory=True).copy_(tensor)


@cache
def copy_stream(device: torch.device) -> torch.Stream:
    """The stream on which this process copies from and to a device, while the device computes on others. A child that
    is forked makes its own: a process that has used the device, and so has a stream, cannot fork one that uses it.
    """
    return torch.Stream(device)


class Enqueued:
    """What is enqueued on a device's current stream by now, for a thread that copies its results on the copy stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.event = None if not is_asynchronous(device) else torch.accelerator.current_stream(device).record_event()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """In the block, the copy stream is the current one, and comes after it; the host waits for nothing."""
        if self.event is None:
            yield
            return
        copies = copy_stream(self.device)
        copies.wait_event(self.event)
        with copies:
            yield


class Moved:
    """A loader whose batches come on a device (see `mover`); everything else is the loader's own."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)  # while it is being copied
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return map(mover(self.device), self.loader)


class Reading:
    """Numbers on their way from a device to the host: look whether they have arrived before you read them, which waits
    for them.

    From a device without pinned memory or without events (MPS) they are read at once, which waits for the device.
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
    """Rows of equal shape as one tensor, float (n, …), on the CPU. Those on a device come by one read; the first may be
    on the CPU, as those of a fit that was resumed are.
    """
    here = [row for row in rows if row.is_cpu]
    there = [row for row in rows if not row.is_cpu]
    parts = [torch.stack(part).cpu() for part in (here, there) if part]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
