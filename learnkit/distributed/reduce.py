# pyright: reportPrivateImportUsage=false, reportArgumentType=false
"""What ranks send to each other: sums, rows, plain objects and flags.

Sums and counts are sent, never means; lengths are sent before rows. Nothing here unpickles what another process has
sent: objects are sent as JSON, together with the raw bytes of their tensors.

All ranks must send from the same kind of device, because a collective on the CPU never meets one on a device. The rule:
tensors are sent from the CPU, unless a rank has one on its device; then all ranks send from their devices, also those
that have nothing to send, or have it on the CPU. If the group has a backend for only one of the two, that one is used.
Flags, counts and texts are sent from the CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from learnkit.devices.accelerator import widest_float
from learnkit.devices.staging import is_dense, packed
from learnkit.distributed.process import is_alive, machine_id
from learnkit.distributed.world import COMMAND, backends, get_rank, get_store, get_world_size, has_group, own_device

HEADER = 1024  # bytes that are always sent first: most descriptions fit, and then need no second collective
BUCKET = 64 * 2**20  # bytes of tensors that are sent as one: no second copy of a model is made to send it
_n_turns = 0  # calls of rank0_first, the same on every rank
_n_collectives = 0  # of this module, on this rank: at one place of a program the same on every rank
_turns: dict[str, tuple[int, int]] = {}  # of on_main, by name: (collectives before it, calls since the last of them)
_machines: dict[tuple[int, int], tuple[int, int]] = {}  # (rank, world size) -> (rank, pid) of this machine's first


# --- flags and sums ----------------------------------------------------------


def agree(flag: int) -> int:
    """Return the largest `flag` of all ranks (for bools: whether any is true), the same on every rank.

    One number in one collective, on the CPU if the group has a CPU backend, so it waits for no device. Signal handlers
    run while it waits.
    """
    return type(flag)(agree_all([int(flag)])[0])


def agree_all(numbers: Sequence[int]) -> list[int]:
    """The largest of all ranks for each number, in one collective; all ranks give equally many."""
    if not needs_group():
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.int64, device=host())
    finish_collective(dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True), values.device)
    return values.tolist()


def barrier() -> None:
    """Wait until every rank is here. Ctrl-C and other signals are still handled."""
    agree(0)


def all_sum(tensors: Any) -> Any:
    """Return the sums over all ranks of a tensor, a number, or a nested list, tuple or dict of them.

    One collective for all sums; before it one number on the CPU, if the group has backends for the CPU and for a
    device, because a rank may have on the CPU what others have on their device. Sums are computed in float64 (float32
    on a device without it), or exactly in int64 if all are whole numbers or bools.

    Args:
        tensors: not changed.

    Returns:
        The same structure, with the shapes, devices and dtypes that were given (int64 for bools, float32 for half
        precision).
    """
    leaves = list(leaves_of(tensors))
    if not leaves:
        return rebuilt(tensors, iter(()))
    whole = not any(is_float(leaf) for leaf in leaves)
    given = [as_real(torch.as_tensor(leaf).detach()) for leaf in leaves]
    device = agreed_device(given) if needs_group() else None
    parts = [
        t.reshape(-1).to(device or t.device, torch.int64 if whole else widest_float(device or t.device)) for t in given
    ]
    if device is not None:
        packed = torch.cat(parts)
        finish_collective(dist.all_reduce(packed, async_op=True), device)
        parts = list(packed.split([t.numel() for t in given]))
    summed = (as_given(total, t, leaf) for total, t, leaf in zip(parts, given, leaves, strict=True))
    return rebuilt(tensors, summed)


def is_float(leaf: Any) -> bool:
    return leaf.is_floating_point() or leaf.is_complex() if isinstance(leaf, Tensor) else isinstance(leaf, float)


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_given(total: Tensor, given: Tensor, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return type(leaf)(total.item()) if not isinstance(leaf, bool) else int(total)
    wider = {torch.bool: torch.int64, torch.float16: torch.float32, torch.bfloat16: torch.float32}
    if leaf.is_complex():
        return torch.view_as_complex(total.reshape(given.shape).to(given.device, given.dtype, copy=True))
    return total.reshape(given.shape).to(given.device, wider.get(given.dtype, given.dtype), copy=True)


# --- rows and objects --------------------------------------------------------


def gather_for_metrics(tensors: Any) -> Any:
    """Return the rows of all ranks, in rank order, of a tensor or a nested list, tuple or dict of them, on every rank.

    If each rank has its contiguous part of a global batch (see `shard_batch`), the result is the global batch in order.
    Two collectives, whatever the structure.

    Args:
        tensors: of shape `(rows, …)`; ranks may have different numbers of rows, or none. A rank without any batch gives
            None. Numbers and 0-d tensors become one row for each rank.

    Raises:
        ValueError: on all ranks, when shapes differ beyond the first dimension, or dtypes differ.
    """
    shares = [share for share in gather_objects(tensors) if share is not None]
    if not shares:
        return None
    columns = [list(leaves_of(share)) for share in shares]
    if len({len(column) for column in columns}) > 1:
        counts = [len(column) for column in columns]
        raise ValueError(f"gather_for_metrics got {counts} tensors from the ranks: expected equally many.")
    return rebuilt(shares[0], (joined([torch.as_tensor(row) for row in rows]) for rows in zip(*columns, strict=True)))


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate; a rank without rows need not know the others' shape or dtype."""
    rows = [t.reshape(1) if t.ndim == 0 else t for t in rows]
    filled = [t for t in rows if len(t)] or [rows[0]]
    device = next(
        (t.device for t in filled if t.device.type != "cpu"), filled[0].device
    )  # ranks may have them in either place
    filled = [t.to(device) for t in filled]
    if len({(t.dtype, t.shape[1:]) for t in filled}) > 1:
        seen = ", ".join(f"{str(t.dtype)[6:]} {tuple(t.shape)}" for t in filled)
        raise ValueError(f"gather_for_metrics cannot join {seen}: only the first dimension may differ between ranks.")
    return torch.cat(filled) if len(filled) > 1 else filled[0]


def gather_objects(obj: Any) -> list[Any]:
    """Return every rank's object, in rank order, on every rank.

    (`torch.distributed.all_gather_object` takes any object, by pickle.)

    Args:
        obj: None, a bool, number, string or tensor, or a nested list, tuple or dict of them. Tensors on a device arrive
            on the receiver's device.

    Raises:
        TypeError: on all ranks, when a rank gives another type.
    """
    if not needs_group():
        return [obj]
    description, tensors = described(obj)
    descriptions = [json.loads(text) for text in gather_texts(description)]
    raise_for(descriptions)
    device = device_for(descriptions, tensors)
    payloads = gather_bytes(as_payload(tensors, device), [d["bytes"] for d in descriptions])
    return [unpacked(d, p) for d, p in zip(descriptions, payloads, strict=True)]


def gather_on_main(obj: Any) -> list[Any]:
    """Return every rank's object on rank 0, as `gather_objects` does, and [] on the others. All ranks must call it.

    Tensors arrive on the CPU, if the group has a backend for it.
    """
    if not needs_group():
        return [obj]
    description, tensors = described(obj)
    text, error = byte_tensor(description.encode()), json.loads(description).get("error", "")
    payload = as_payload(tensors, text.device)
    told = [n.tolist() for n in all_gather(torch.tensor([len(text), len(payload), bool(error)], device=text.device))]
    failed = [rank for rank, (_, _, fails) in enumerate(told) if fails]
    if failed:
        raise TypeError(error or f"rank {failed[0]} has something that cannot be sent; its own error says what.")
    longest = max(n + m for n, m, _ in told)
    own = torch.cat([text, payload, text.new_zeros(longest - len(text) - len(payload))])
    shares = [torch.empty_like(own) for _ in told] if get_rank() == 0 else []
    finish_collective(dist.gather(own, shares or None, dst=0, async_op=True), own.device)
    sizes = [n for n, _, _ in told][: len(shares)]
    return [
        unpacked(json.loads(bytes(share[:n].tolist())), share[n:], land=own.device)
        for share, n in zip(shares, sizes, strict=True)
    ]


def broadcast_from_main(obj: Any = None) -> Any:
    """Return rank 0's object on every rank; the other ranks' objects are ignored. It takes the types that
    `gather_objects` takes.
    """
    if not needs_group():
        return obj
    description, tensors = described(obj if get_rank() == 0 else None)
    received = json.loads(broadcast_text(description))
    raise_for([received])
    device = device_for([received], tensors)
    content = (
        as_payload(tensors, device)
        if get_rank() == 0
        else torch.empty(received["bytes"], dtype=torch.uint8, device=device)
    )
    if received["bytes"]:
        finish_collective(dist.broadcast(content, 0, async_op=True), device)
    return obj if get_rank() == 0 else unpacked(received, content)


def broadcast_into(tensors: Sequence[Tensor]) -> None:
    """Copy rank 0's values into these tensors on every rank, in buckets of up to `BUCKET` bytes.

    Two numbers are sent before, which show whether all ranks have the same shapes, dtypes and devices; if only devices
    differ, each tensor is sent by the rule above. Raises ValueError on all ranks if shapes or dtypes differ.
    """
    if not needs_group() or not tensors:
        return
    on_device = devices_of_all(tensors)
    with torch.no_grad():
        for bucket, device in in_buckets(tensors, on_device):
            broadcast_bucket(bucket, device)


def devices_of_all(tensors: Sequence[Tensor]) -> list[bool]:
    """For each tensor, whether it is on a device on any rank, and so is sent between devices."""
    always = "cpu" not in backends()
    own = [[str(t.dtype).removeprefix("torch."), list(t.shape), always or on_device(t)] for t in tensors]
    found = hashed(own)
    largest, negative = agree_all([found, -found])
    if largest == -negative:
        return [places for *_, places in own]
    of_all = gather_objects(own)
    for rank, rows in enumerate(of_all):
        for k, (first, row) in enumerate(zip_longest(of_all[0], rows)):
            if first is None or row is None or first[:2] != row[:2]:
                raise ValueError(
                    f"the ranks have different tensors to share: number {k} is {in_words(first)} on rank 0 and "
                    f"{in_words(row)} on rank {rank}. Build the same model on every rank."
                )
    return [any(rows[k][2] for rows in of_all) for k in range(len(own))]


def in_words(row: Sequence[Any] | None) -> str:
    return "not there" if row is None else f"{row[0]} {tuple(row[1])}"


def in_buckets(tensors: Sequence[Tensor], on_device: Sequence[bool]) -> Iterator[tuple[list[Tensor], torch.device]]:
    """The tensors in order, in lists that are sent as one, and the device from which each list is sent."""
    for places in (True, False):
        bucket: list[Tensor] = []
        chosen = [t for t, on in zip(tensors, on_device, strict=True) if on is places and t.numel()]
        device = device_if(places, chosen)
        for t in chosen:
            if bucket and sum(b.nbytes for b in bucket) + t.nbytes > BUCKET:
                yield bucket, device
                bucket = []
            bucket.append(t)
        if bucket:
            yield bucket, device


def broadcast_bucket(tensors: list[Tensor], device: torch.device) -> None:
    if len(tensors) == 1 and tensors[0].device == device and is_dense(tensors[0]):  # it may be large: in place
        finish_collective(dist.broadcast(packed(tensors[0]), 0, async_op=True), device)
        return
    payload = as_payload(tensors, device)
    finish_collective(dist.broadcast(payload, 0, async_op=True), device)
    if get_rank() == 0:
        return
    parts = payload.split([t.nbytes for t in tensors])
    for own, part in zip(tensors, parts, strict=True):
        own.copy_(tensor_of_bytes(part, own.dtype, own.shape))


def hashed(value: Any) -> int:
    """A number of 63 bits, the same for equal values of plain types."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big") >> 1


def raise_for(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Raise the errors of ranks that cannot describe their objects, on all ranks: else the others would wait for
    ever.
    """
    errors = [f"rank {rank}: {d['error']}" for rank, d in enumerate(descriptions) if "error" in d]
    if errors:
        raise TypeError("; ".join(errors))


# --- descriptions: a structure as JSON, its tensors as bytes -----------------


def described(obj: Any) -> tuple[str, list[Tensor]]:
    """A structure as JSON, and its tensors in the order in which it names them."""
    tensors: list[Tensor] = []
    try:
        description: dict[str, Any] = {"is": encoded(obj, tensors), "bytes": sum(t.nbytes for t in tensors)}
    except TypeError as error:
        description, tensors = {"error": str(error), "bytes": 0}, []
    description["on_device"] = any(map(on_device, tensors))
    return json.dumps(description), tensors


def encoded(obj: Any, tensors: list[Tensor]) -> Any:
    """A value that JSON takes; tensors are appended to `tensors`. Containers become [kind, ...], so that tuples and
    whole-number keys are kept.
    """
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    if isinstance(obj, Tensor) and obj.is_meta:
        return ["meta", str(obj.dtype).removeprefix("torch."), list(obj.shape)]
    if isinstance(obj, Tensor) and obj.layout == torch.strided:
        tensors.append(obj)
        kind = "tensor" if obj.device.type == "cpu" else "device"
        return [kind, str(obj.dtype).removeprefix("torch."), list(obj.shape)]
    if isinstance(obj, Mapping):
        return ["dict", [[encoded(key, tensors), encoded(value, tensors)] for key, value in obj.items()]]
    if isinstance(obj, list):
        return ["list", [encoded(v, tensors) for v in obj]]
    if isinstance(obj, tuple):
        return ["tuple", [encoded(v, tensors) for v in obj]]
    raise TypeError(
        f"cannot send a {type(obj).__name__} between ranks: expected None, a bool, number, string or dense "
        "tensor, or a list, tuple or dict of them."
    )


def as_payload(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The tensors' bytes as one uint8 tensor (bytes,) on `device`; what is on another device is copied at once."""
    rows: list[Tensor] = []
    for source, group in groupby(tensors, lambda t: t.device):
        parts = [packed(t) for t in group]
        rows.append((torch.cat(parts) if len(parts) > 1 else parts[0]).to(device if source != device else source))
    if len(rows) == 1 and rows[0].data_ptr() != tensors[0].data_ptr():
        return rows[0]
    return torch.cat(
        [torch.empty(0, dtype=torch.uint8, device=device), *rows]
    )  # a copy: what was given may change meanwhile


def unpacked(description: Mapping[str, Any], payload: Tensor, land: torch.device | None = None) -> Any:
    """The structure that `described` has described, from its bytes. `land`: the device of all tensors; None: each is on
    the kind of device that it was sent from.
    """
    offset = 0

    def build(node: Any) -> Any:
        nonlocal offset
        if not isinstance(node, list):
            return node
        kind, *content = node
        if kind == "dict":
            return {build(k): build(v) for k, v in content[0]}
        if kind in ("list", "tuple"):
            return {"list": list, "tuple": tuple}[kind](build(v) for v in content[0])
        dtype, shape = getattr(torch, content[0]), torch.Size(content[1])
        if kind == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        n_bytes = shape.numel() * dtype.itemsize
        offset += n_bytes
        tensor = tensor_of_bytes(payload[offset - n_bytes : offset], dtype, shape)
        return tensor.to(
            land
            or (torch.device("cpu") if kind == "tensor" else payload.device if on_device(payload) else own_device())
        )

    return build(description["is"])


def tensor_of_bytes(part: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return (
        part.clone().view(dtype).reshape(shape)
    )  # clone: a view as another dtype must start at a multiple of its size


# --- the collectives beneath -------------------------------------------------


def gather_texts(text: str) -> list[str]:
    """Every rank's text. One collective for up to HEADER - 8 bytes, two for longer texts."""
    data = text.encode()
    heads = [bytes(head.tolist()) for head in all_gather(as_header(data))]
    lengths = [int.from_bytes(head[:8], "big") for head in heads]
    if max(lengths) <= HEADER - 8:
        return [head[8 : 8 + n].decode() for head, n in zip(heads, lengths, strict=True)]
    return [bytes(whole.tolist()).decode() for whole in gather_bytes(byte_tensor(data), lengths)]


def broadcast_text(text: str) -> str:
    data = text.encode()
    head = as_header(data)
    finish_collective(dist.broadcast(head, 0, async_op=True), head.device)
    n = int.from_bytes(bytes(head[:8].tolist()), "big")
    if n <= HEADER - 8:
        return bytes(head[8 : 8 + n].tolist()).decode()
    whole = byte_tensor(data if get_rank() == 0 else bytes(n))
    finish_collective(dist.broadcast(whole, 0, async_op=True), whole.device)
    return bytes(whole.tolist()).decode()


def gather_bytes(own: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Every rank's bytes; all ranks know their `lengths`. All-gathers of unequal lengths would return uninitialised
    memory.
    """
    longest = max(lengths)
    if not longest:
        return [own.new_empty(0) for _ in lengths]
    shares = all_gather(torch.cat([own, own.new_zeros(longest - len(own))]))
    return [share[:n] for share, n in zip(shares, lengths, strict=True)]


def all_gather(own: Tensor) -> list[Tensor]:
    shares = [torch.empty_like(own) for _ in range(get_world_size())]
    finish_collective(dist.all_gather(shares, own, async_op=True), own.device)
    return shares


def as_header(data: bytes) -> Tensor:
    return byte_tensor((len(data).to_bytes(8, "big") + data)[:HEADER].ljust(HEADER, b"\0"))


def byte_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(host())


def needs_group() -> bool:
    """Whether there are other ranks. Raises RuntimeError if the launcher has started several that have no group yet."""
    if has_group():
        return get_world_size() > 1
    if get_world_size() > 1:
        raise RuntimeError(
            f"this is rank {get_rank()} of {get_world_size()}, but there is no process group yet: call "
            f"learnkit.distributed.init_process_group(), or unset what `{COMMAND}` sets."
        )
    return False


def host() -> torch.device:
    """The device from which flags, counts and texts are sent: the CPU, to wait for no device, unless the group has a
    backend only for the device.
    """
    return torch.device("cpu") if "cpu" in backends() else own_device()


def agreed_device(tensors: Sequence[Tensor]) -> torch.device:
    """The device from which these tensors are sent, by the rule above. One number on the CPU, if the group has both."""
    able = backends()
    if len(able) == 1:
        return device_if("cpu" not in able, tensors)
    return device_if(bool(agree(any(map(on_device, tensors)))), tensors)


def device_for(descriptions: Sequence[Mapping[str, Any]], tensors: Sequence[Tensor]) -> torch.device:
    """As `agreed_device`, if the ranks know already what is sent."""
    return device_if(any(d["on_device"] for d in descriptions) or "cpu" not in backends(), tensors)


def device_if(on: bool, tensors: Sequence[Tensor]) -> torch.device:
    """The CPU, or if `on` the device of this rank's tensors, else this rank's own."""
    return next((t.device for t in tensors if on_device(t)), own_device()) if on else torch.device("cpu")


def on_device(tensor: Tensor) -> bool:
    """Whether a tensor is on a device for which the group has a backend."""
    return tensor.device.type != "cpu" and tensor.device.type in backends()


def wait_for_key(store: dist.Store, key: str) -> None:
    """Wait until a rank has set the key; signal handlers run while it waits."""
    pause = 1e-4
    while not store.check([key]):
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def finish_collective(work: Any, device: torch.device) -> None:
    """Wait for a collective; on the CPU by polling, because signal handlers do not run in a blocking wait."""
    global _n_collectives
    n_looks, _n_collectives = 0, _n_collectives + 1
    while device.type == "cpu" and not work.is_completed():
        time.sleep(5e-5 if n_looks < 40 else 1e-3)
        n_looks += 1
    work.wait()


# --- nested structures -------------------------------------------------------


def leaves_of(tree: Any) -> Iterator[Any]:
    """The tensors and numbers of a nested structure, in order; None has none."""
    if tree is None:
        return
    if isinstance(tree, (Tensor, int, float)):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves_of(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves_of(value)
    else:
        raise TypeError(f"got a {type(tree).__name__}, expected a tensor, number, or list, tuple or dict of them.")


def rebuilt(tree: Any, leaves: Iterator[Any]) -> Any:
    """`tree` with `leaves` in the place of its own."""
    if tree is None:
        return None
    if isinstance(tree, (Tensor, int, float)):
        return next(leaves)
    if isinstance(tree, Mapping):
        return {key: rebuilt(value, leaves) for key, value in tree.items()}
    values = [rebuilt(value, leaves) for value in tree]
    if isinstance(tree, list):
        return values
    make: Callable[..., Any] = getattr(type(tree), "_make", tuple)  # named tuples
    return make(values)


# --- one after the other -----------------------------------------------------


@contextmanager
def rank0_first() -> Iterator[None]:
    """Run the block on one rank of each machine first (rank 0 on its machine), then on the others: downloads, caches.

    It also works before the process group exists. All ranks must enter the block, equally often. There is no collective
    in which ranks could wait for a rank that has failed.

    Raises:
        RuntimeError: on the other ranks of the machine, when the first one fails.
    """
    global _n_turns
    _n_turns += 1
    store = get_store()
    if store is None:
        yield
        return
    leader, pid = first_on_this_machine(store)
    key = f"rank0_first/{_n_turns}/{leader}"
    if get_rank() == leader:
        with outcome_under(key, store):
            yield
    else:
        wait_for_turn(store, key, leader, pid)
        yield


def on_main(action: Callable[[], object], name: str) -> None:
    """Do `action` on rank 0 only; the other ranks wait for it.

    It needs no collective: if only rank 0 calls it (`if is_main(): …`), no rank hangs. Calls are counted from the last
    collective of this module, which all ranks have called: what rank 0 did alone before a `barrier()`, an epoch or a
    sum is not mistaken for what all do after it.

    Args:
        action: called without arguments.
        name: what is done, in words, the same on all ranks.

    Raises:
        RuntimeError: on the other ranks, when `action` fails on rank 0.
    """
    store = get_store()
    if store is None:
        action()
        return
    since, n_before = _turns.get(name, (_n_collectives, 0))
    _turns[name] = _n_collectives, n_before + 1 if since == _n_collectives else 1
    key = "/".join(map(str, ("on_main", name, *_turns[name])))
    if get_rank() == 0:
        with outcome_under(key, store):
            action()
    else:
        while not store.check([key]):
            time.sleep(0.01)
        if outcome := store.get(key).decode():
            raise RuntimeError(f"rank 0 failed to do this: {name}: {outcome}")


@contextmanager
def outcome_under(key: str, store: dist.Store) -> Iterator[None]:
    """Write under `key` how the block has ended: "", or its error, which is raised."""
    outcome = ""
    try:
        yield
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
        raise
    finally:
        store.set(key, outcome)


def wait_for_turn(store: dist.Store, key: str, leader: int, pid: int) -> None:
    while not store.check([key]):
        if not is_alive(pid) and not store.check([key]):
            raise RuntimeError(f"rank {leader}, which goes first on this machine, is gone: its process {pid} ended.")
        time.sleep(0.02)
    outcome = store.get(key).decode()
    if outcome:
        raise RuntimeError(f"rank {leader} goes first on this machine, and failed in rank0_first: {outcome}")


def first_on_this_machine(store: dist.Store) -> tuple[int, int]:
    """(rank, pid) of the lowest rank of this machine, from what all ranks write: LOCAL_RANK may be missing, or be that
    of a container.
    """
    place = (get_rank(), get_world_size())
    if place not in _machines:
        own = machine_id()
        store.set(f"machine/{place[0]}", f"{os.getpid()} {own}")
        answers = store.multi_get([f"machine/{rank}" for rank in range(place[1])])
        said = [answer.decode().split(" ", 1) for answer in answers]
        _machines[place] = next((rank, int(pid)) for rank, (pid, machine) in enumerate(said) if machine == own)
    return _machines[place]
