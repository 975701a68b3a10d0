# pyright: reportPrivateImportUsage=false
"""A snapshot whose spread tensors each rank writes and reads by itself: PyTorch's distributed checkpoint, in
safetensors files.

These hold nothing but numbers and shapes; PyTorch's own format of the kind is read by unpickling. Whoever reads, on any
number of ranks, spread or not, takes from them the rows that are its own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learnkit.checkpoint.files import hash_file, size_of
from learnkit.checkpoint.snapshot import begin_snapshot, finish_snapshot
from learnkit.devices.dtensor import is_shard, own_part
from learnkit.devices.nested import map_tensors

if TYPE_CHECKING:
    from learnkit.learner import Learner


def check_safetensors() -> None:
    if find_spec("safetensors") is None:
        raise ImportError("Checkpoint(sharded=True) writes safetensors files: pip install safetensors.")


# --- writing -----------------------------------------------------------------
def is_spread(parts: Mapping[str, Any]) -> bool:
    return any(map(is_shard, parts["model"].values()))


def begin_sharded(
    learn: Learner, folder: Path, parts: Mapping[str, Any], about: Mapping[str, Any]
) -> Callable[[], Path]:
    """By all ranks: each writes its own of what is spread in `parts`, under the next name. What rank 0 then calls
    writes the rest, puts it all in place and returns its path, as `snapshots.write`; it raises where any rank has
    failed.
    """
    spread = in_own_memory({key: tensor.detach() for key, tensor in leaves_by_key(parts).items() if is_shard(tensor)})
    final, hidden = map(
        Path, learn.ranks.from_main(lambda: list(map(str, begin_snapshot(folder, about["step"], size_of(parts)))))
    )
    own, error = {}, None
    try:
        own = save(spread, hidden, learn.rank)
    except OSError as raised:
        error = str(raised)
    told = learn.ranks.gather_on_main([own, error])
    others = {name: kept for own, _ in told for name, kept in own.items()}
    failed = [error for _, error in told if error]
    rest = {part: sharded_outline(state) for part, state in parts.items()}
    return lambda: finish_snapshot(
        final, hidden, rest, about, others=others, error=OSError(failed[0]) if failed else None
    )


def in_own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, with a copy of each whose memory an earlier one has too, such as tied weights: safetensors
    refuses to write the same memory twice.
    """
    seen: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        part = own_part(tensor)
        found[key] = tensor.clone() if part.numel() and part.data_ptr() in seen else tensor
        seen.add(part.data_ptr())
    return found


def save(tensors: dict[str, Tensor], hidden: Path, rank: int) -> dict[str, Any]:
    """{name: {"sha256", "bytes"}} of the files that this rank has written, which are on the disk. Raises OSError."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(hidden), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.api.CheckpointException as error:
        raise OSError(reason_of(error)) from None
    told = {}
    for path in hidden.glob(f"shard-{rank + 1:05d}-*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        digest, n = hash_file(path)
        told[path.name] = {"sha256": digest, "bytes": n}
    return told


def reason_of(error: Any) -> str:
    """What ended PyTorch's engine, of the first rank that failed."""
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def leaves_by_key(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What is in the model's and the optimizer's nested dicts, by the keys that lead to it."""

    def leaves(tree: Any, key: str) -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {key: tree}
        return {name: leaf for own, value in tree.items() for name, leaf in leaves(value, f"{key}.{own}").items()}

    return {**leaves(parts["model"], "model"), **leaves(parts["optimizer"], "optimizer")}


def sharded_outline(tree: Any) -> Any:
    """The same with shape and dtype alone of what is spread."""
    return map_tensors(
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if is_shard(tensor) else tensor,
        tree,
    )


# --- reading -----------------------------------------------------------------
def is_apart(parts: Mapping[str, Any]) -> bool:
    """Whether a snapshot's tensors lie in files of their own."""
    return any(map(is_absent, parts["model"].values()))


def is_absent(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def filled_parts(learn: Learner, parts: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`parts` with the tensors that lie apart, of each the rows that this rank's own has. All ranks read; raises
    OSError.
    """
    own = learn.model.state_dict()
    parameters = [p for group in learn.opt.param_groups for p in group["params"]]
    numbers = [n for group in parts["optimizer"]["param_groups"] for n in group["params"]]
    model = {name: room(value, own.get(name)) for name, value in parts["model"].items()}
    of_number = dict(zip(numbers, parameters, strict=True))
    state = {
        n: {name: room(value, of_number.get(n)) for name, value in kept.items()}
        for n, kept in parts["optimizer"]["state"].items()
    }
    rooms = {**parts, "model": model, "optimizer": {**parts["optimizer"], "state": state}}
    absent = [key for key, value in leaves_by_key(parts).items() if is_absent(value)]
    of_rooms = leaves_by_key(rooms)
    load({key: of_rooms[key] for key in absent}, path, learn.world_size)
    return rooms


def room(value: Any, own: Any) -> Any:
    """Where an absent tensor is read to: in the parts that `own` is in."""
    if not is_absent(value):
        return value
    if is_shard(own) and own.shape == value.shape:
        return torch.empty_like(own.detach(), dtype=value.dtype)
    return torch.empty(value.shape, dtype=value.dtype)


def load(tensors: dict[str, Tensor], path: Path, world_size: int) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # alone, which is meant
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=world_size == 1)
        except dcp.api.CheckpointException as error:
            raise OSError(
                f"{path} could not be read: {reason_of(error)}. A checkpoint in parts is read by every rank: see that "
                f"the folder is there on all machines."
            ) from None
