# pyright: reportPrivateImportUsage=false
"""A snapshot whose sharded tensors each rank writes and reads itself, with PyTorch's distributed checkpoint.

It uses safetensors files, which contain only numbers and shapes; PyTorch's own format for this is read by unpickling. A
reader with any number of ranks, sharded or not, takes from the files the rows that it needs.
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
        raise ImportError(
            "Checkpoint(sharded=True) needs safetensors, which is not installed: pip install safetensors."
        )


# --- writing -----------------------------------------------------------------
def is_spread(parts: Mapping[str, Any]) -> bool:
    return any(map(is_shard, parts["model"].values()))


def begin_sharded(
    learn: Learner, folder: Path, parts: Mapping[str, Any], about: Mapping[str, Any]
) -> Callable[[], Path]:
    """Write this rank's shards in `parts`, under the next name; called by all ranks.

    Returns a function for rank 0, which writes the rest, puts the snapshot in place and returns its path, like
    `write_snapshot`. It raises if any rank has failed.
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
    """Write this rank's tensors durably; return {name: {"sha256", "bytes"}} of its files. Raises OSError."""
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
    """Return the error that ended PyTorch's engine, from the first rank that failed."""
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def leaves_by_key(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of the model's and the optimizer's nested dicts, by their path of keys."""

    def leaves(tree: Any, key: str) -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {key: tree}
        return {name: leaf for own, value in tree.items() for name, leaf in leaves(value, f"{key}.{own}").items()}

    return {**leaves(parts["model"], "model"), **leaves(parts["optimizer"], "optimizer")}


def sharded_outline(tree: Any) -> Any:
    """Return the same structure with sharded tensors as shape and dtype only."""
    return map_tensors(
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if is_shard(tensor) else tensor,
        tree,
    )


# --- reading -----------------------------------------------------------------
def is_apart(parts: Mapping[str, Any]) -> bool:
    """Return whether a snapshot's tensors are in separate shard files."""
    return any(map(is_absent, parts["model"].values()))


def is_absent(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def filled_parts(learn: Learner, parts: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return `parts` with the tensors of the shard files: the rows that this rank needs.

    All ranks must call this. Raises OSError.
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
    """Return the memory into which an absent tensor is read, sharded like `own`."""
    if not is_absent(value):
        return value
    if is_shard(own) and own.shape == value.shape:
        return torch.empty_like(own.detach(), dtype=value.dtype)
    return torch.empty(value.shape, dtype=value.dtype)


def load(tensors: dict[str, Tensor], path: Path, world_size: int) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # expected with a single process
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=world_size == 1)
        except dcp.api.CheckpointException as error:
            raise OSError(
                f"{path} could not be read: {reason_of(error)}. Every rank reads a sharded checkpoint: check that the "
                f"folder exists on all machines."
            ) from None
