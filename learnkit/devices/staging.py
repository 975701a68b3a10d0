"""Copy tensors from a device to the host with few waits, through a limited amount of pinned memory."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from learnkit.devices.nested import tensors_in
from learnkit.devices.transfer import is_asynchronous

ROOM = 1 << 27  # bytes of a buffer: 128 MiB take 5 ms over PCIe 4 (25 GB/s), many times the cost of a wait

Pair = tuple[Tensor, Tensor]  # (source bytes on a device, destination bytes on the host): uint8 (n,)


def fetch_bytes(pairs: Iterable[Pair]) -> None:
    """Copy bytes from devices to the host, with few waits.

    They have the values that the next work on each device's current stream would see. Waits once for each ROOM bytes.
    At most two buffers are pinned; one is filled while the other is emptied. For a device without pinned memory or
    streams (MPS), each copy waits.
    """
    of_devices: dict[torch.device, list[Pair]] = {}
    for pair in pairs:
        of_devices.setdefault(pair[0].device, []).append(pair)
    for device, own in of_devices.items():
        if is_asynchronous(device):
            fetch_by_buffers(own, torch.accelerator.current_stream(device))
        else:
            for source, into in own:
                into.copy_(source)


def fetch_by_buffers(pairs: list[Pair], stream: torch.Stream) -> None:
    n_bytes = sum(len(source) for source, _ in pairs)
    free = [
        torch.empty(min(n_bytes, ROOM), dtype=torch.uint8, pin_memory=True) for _ in range(2 if n_bytes > ROOM else 1)
    ]
    filled: deque[tuple[Tensor, list[Pair], torch.Event]] = deque()

    def empty_first() -> None:
        buffer, parts, arrival = filled.popleft()
        arrival.synchronize()  # waits for the device
        for part, into in parts:
            into.copy_(part)
        free.append(buffer)

    for load in loads(pairs, ROOM):
        if not free:
            empty_first()
        buffer = free.pop()
        sizes = [len(source) for source, _ in load]
        parts = [(part, into) for part, (_, into) in zip(buffer[: sum(sizes)].split(sizes), load, strict=True)]
        for (part, _), (source, _) in zip(parts, load, strict=True):
            part.copy_(source, non_blocking=True)
        arrival = torch.Event(stream.device)
        arrival.record(stream)
        filled.append((buffer, parts, arrival))
    while filled:
        empty_first()


def loads(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    """Yield the same bytes, in lists of at most `size` bytes in total."""
    load: list[Pair] = []
    left = size
    for source, into in pairs:
        while len(source):
            n = min(left, len(source))
            load.append((source[:n], into[:n]))
            source, into, left = source[n:], into[n:], left - n
            if left == 0:
                yield load
                load, left = [], size
    if load:
        yield load


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor without gaps: uint8 (bytes,), not a copy."""
    first = tensor.storage_offset() * tensor.element_size()
    return bytes_in(tensor.untyped_storage())[first : first + tensor.numel() * tensor.element_size()]


def bytes_in(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def on_host(state: Any) -> Any:
    """Return `state` with the tensors of a device in host memory; tensors that shared memory there share it here too.

    When saved, this makes the same file as a state on the CPU. If nothing is on a device, the same object is returned.
    Tensors that are more than their elements are left to torch.save.
    """
    tensors = list(tensors_in(state))
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if is_simple(t)}
    if not storages:
        return state
    copies = {key: torch.UntypedStorage(storage.nbytes()) for key, storage in storages.items()}
    fetch_bytes((bytes_in(storage), bytes_in(copies[key])) for key, storage in storages.items())

    def hosted(t: Tensor) -> Tensor:
        if not is_simple(t):
            return t
        return torch.empty(0, dtype=t.dtype).set_(
            copies[t.untyped_storage()._cdata], t.storage_offset(), t.size(), t.stride()
        )

    return copy.deepcopy(state, {id(t): hosted(t) for t in tensors})  # keeps the types and attributes of the containers


def is_simple(tensor: Tensor) -> bool:
    """Return whether a tensor is a view of a device's memory, and nothing more."""
    return (
        type(tensor) is Tensor
        and tensor.device.type not in ("cpu", "meta")
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or vars(tensor))
    )


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor's elements are stored contiguously and unmodified."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def packed(tensor: Tensor) -> Tensor:
    """Return the bytes of a dense tensor in the order of its elements, uint8 (bytes,).

    They are its own memory if possible, else a copy.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(
        torch.uint8
    )  # torch allows any stride for a dimension of size one or zero
