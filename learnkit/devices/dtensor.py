"""Tensors of which each rank has a part, PyTorch's DTensors: made whole, put into parts again. Where there are none,
nothing happens.

All ranks must call these in the same order, as parts travel; `is_shard`, `own_part` and `outline` send nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from learnkit.devices.nested import map_tensors
from learnkit.devices.ranks import Ranks


def is_shard(value: Any) -> bool:
    """Whether it is a tensor of which this rank has a part."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there can be none; importing it takes a while
    return module is not None and isinstance(value, module.DTensor)


def own_part(tensor: Any) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if is_shard(tensor) else tensor


def own_parts(tensors: list[Any]) -> list[Tensor]:
    """What this rank has of each; the same list where they are no shards."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not any([isinstance(t, module.DTensor) for t in tensors]):  # noqa: C419
        return tensors  # a generator is a call a tensor
    return [own_part(t) for t in tensors]


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def whole_on_main(tree: Any, rank: int) -> Any:
    """A nested structure with every shard as a whole in rank 0's memory, on the CPU; on other ranks as shape and dtype
    alone.

    One after the other: no rank but 0 holds more than one of them.
    """
    return map_tensors(lambda tensor: gathered(tensor, rank) if is_shard(tensor) else tensor, tree)


def gathered(tensor: Any, rank: int) -> Tensor:
    full = whole(tensor.detach())
    if rank:
        return torch.empty_like(full, device="meta")
    cut = full.untyped_storage().nbytes() > full.nbytes  # padding would be written to files too
    return full.to("cpu", copy=cut)


def like(own: Any, value: Any) -> Any:
    """`value` in the parts that `own` is in. Rank 0's counts; of the others' only the shape and dtype."""
    if not is_shard(own) or not isinstance(value, Tensor) or is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    device = own.device_mesh.device_type
    given = torch.empty_like(value, device=device) if value.is_meta else value.detach().to(device)
    return distribute_tensor(given, own.device_mesh, own.placements).to(own.device)


def parted(own: Any, value: Any) -> Any:
    """A nested structure with its tensors in the parts that those of `own`, one like it, are in."""
    if isinstance(value, dict) and isinstance(own, dict):
        return {key: parted(own.get(key), v) for key, v in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(own, (list, tuple)) and len(own) == len(value):
        return type(value)(parted(o, v) for o, v in zip(own, value, strict=True))
    return like(own, value)


def outline(tree: Any, kept: Collection[str] = ()) -> Any:
    """A nested structure in which tensors are shape and dtype alone, but for those of no dimension and those of these
    names.
    """

    def without(tensor: Tensor) -> Tensor:
        return tensor.to("meta") if tensor.ndim else tensor

    return (
        {key: value if key in kept else outline(value) for key, value in tree.items()}
        if isinstance(tree, dict)
        else map_tensors(without, tree)
    )


def read_on_main(ranks: Ranks, read: Callable[[], Any], sent: Callable[[Any], Any]) -> Any:
    """What `read` returns, on rank 0, and of it on the others what `sent` leaves; all raise if it fails."""
    kept: list[Any] = []

    def told() -> Any:
        kept.append(read())
        return sent(kept[0])

    result = ranks.from_main(told)
    return kept[0] if kept else result
