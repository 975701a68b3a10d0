"""Sharded tensors, PyTorch's DTensors: gathered and sharded again. Without them, nothing happens.

All ranks must call these functions in the same order, because shards are communicated; `is_shard`, `own_part` and
`outline` communicate nothing.
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
    """Return whether a value is a sharded tensor."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensors exist; importing is slow
    return module is not None and isinstance(value, module.DTensor)


def own_part(tensor: Any) -> Tensor:
    """Return this rank's shard of a tensor; a tensor that is not sharded is returned unchanged."""
    return tensor.to_local() if is_shard(tensor) else tensor


def own_parts(tensors: list[Any]) -> list[Tensor]:
    """Return this rank's shard of each tensor; the same list if they are not sharded."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not any([isinstance(t, module.DTensor) for t in tensors]):  # noqa: C419
        return tensors  # a generator would cost one call per tensor
    return [own_part(t) for t in tensors]


def whole(tensor: Any) -> Tensor:
    """Return the full tensor, on every rank."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def whole_on_main(tree: Any, rank: int) -> Any:
    """Return a nested structure with every sharded tensor gathered: as a full CPU tensor on rank 0.

    Other ranks get its shape and dtype. Tensors are gathered one after the other: no rank but 0 holds more than one
    full tensor.
    """
    return map_tensors(lambda tensor: gathered(tensor, rank) if is_shard(tensor) else tensor, tree)


def gathered(tensor: Any, rank: int) -> Tensor:
    full = whole(tensor.detach())
    if rank:
        return torch.empty_like(full, device="meta")
    cut = full.untyped_storage().nbytes() > full.nbytes  # otherwise padding would be written to files too
    return full.to("cpu", copy=cut)


def like(own: Any, value: Any) -> Any:
    """Return `value`, sharded like `own`. The value of rank 0 is used; other ranks need only its shape and dtype."""
    if not is_shard(own) or not isinstance(value, Tensor) or is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    device = own.device_mesh.device_type
    given = torch.empty_like(value, device=device) if value.is_meta else value.detach().to(device)
    return distribute_tensor(given, own.device_mesh, own.placements).to(own.device)


def parted(own: Any, value: Any) -> Any:
    """Return a nested structure with its tensors sharded like those of `own`, which has the same structure."""
    if isinstance(value, dict) and isinstance(own, dict):
        return {key: parted(own.get(key), v) for key, v in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(own, (list, tuple)) and len(own) == len(value):
        return type(value)(parted(o, v) for o, v in zip(own, value, strict=True))
    return like(own, value)


def outline(tree: Any, kept: Collection[str] = ()) -> Any:
    """Return a nested structure with tensors as shape and dtype only.

    0-d tensors and those with names in `kept` stay.
    """

    def without(tensor: Tensor) -> Tensor:
        return tensor.to("meta") if tensor.ndim else tensor

    return (
        {key: value if key in kept else outline(value) for key, value in tree.items()}
        if isinstance(tree, dict)
        else map_tensors(without, tree)
    )


def read_on_main(ranks: Ranks, read: Callable[[], Any], sent: Callable[[Any], Any]) -> Any:
    """Return what `read` returns on rank 0, and what `sent` makes of it on the others; all ranks raise if it fails."""
    kept: list[Any] = []

    def told() -> Any:
        kept.append(read())
        return sent(kept[0])

    result = ranks.from_main(told)
    return kept[0] if kept else result
