"""An average of a model's weights and buffers in separate storage, and swapping the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from learnkit.devices.dtensor import is_shard, like, own_parts
from learnkit.devices.ranks import Ranks
from learnkit.devices.wrappers import is_wrapper, plain_keys


class Average:
    """Average the model's state, starting with a copy; `update` moves it towards the model's current state.

    Half-precision weights are averaged in float32; integer buffers are copied from the model.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        own = model.state_dict(keep_vars=True)
        names = {
            id(own[key]): name for name, key in plain_keys(own, wrapped=is_wrapper(model)).items()
        }  # shared tensors once
        tensors = [t for t in own.values() if isinstance(t, Tensor)]
        self.tensors: dict[str, Tensor] = {names[id(t)]: t for t in tensors}  # the model's own
        self.values = {name: t.detach().to(kept_as(t), copy=True) for name, t in self.tensors.items()}
        floats = [name for name, t in self.tensors.items() if t.is_floating_point()]
        # This rank's shards: a sharded model also has unsharded buffers, and torch cannot mix both in one operation.
        self.own = own_parts([self.values[name] for name in floats]), own_parts([self.tensors[name] for name in floats])

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Compute average += weight × (model − average)."""
        averages, now = self.own
        if any(a.dtype != t.dtype for a, t in zip(averages, now, strict=True)):
            now = [t.to(a.dtype) for a, t in zip(averages, now, strict=True)]
        torch._foreach_lerp_(averages, now, weight)  # type: ignore[reportPrivateImportUsage]
        for name, value in self.values.items():
            if not value.is_floating_point():
                value.copy_(self.tensors[name])

    @torch.no_grad()
    def unite(self, ranks: Ranks) -> None:
        """Make the average equal on all ranks, as the model is when training ends.

        Buffers are those of rank 0; weights that differ between the ranks are averaged.
        """
        weights = [value for name, value in self.values.items() if isinstance(self.tensors[name], nn.Parameter)]
        ranks.share([value for name, value in self.values.items() if not isinstance(self.tensors[name], nn.Parameter)])
        if not ranks.apart:
            return
        for value, mean in zip(weights, ranks.mean(weights), strict=True):
            value.copy_(mean)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """In the block, the model has the averaged weights; afterwards its own are restored, even after an exception.

        Storage is swapped and nothing is copied, so that a checkpoint that is being written still reads the same
        numbers. For a sharded model, whose storage cannot be swapped, the numbers are copied.
        """
        own = {name: t.detach().clone() if is_shard(t) else t.data for name, t in self.tensors.items()}
        try:
            for name, t in self.tensors.items():
                assign(t, self.values[name].to(t.dtype))
            yield
        finally:
            for name, t in self.tensors.items():
                assign(t, own[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the average into the model's own weights."""
        for name, t in self.tensors.items():
            t.copy_(self.values[name])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.values)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        differing = sorted(state.keys() ^ self.values.keys())
        if differing:
            raise ValueError(
                f"the saved average is of another model: {', '.join(differing[:5])} exist in only one of them. "
                "Resume with the same model."
            )
        for name, value in self.values.items():
            value.copy_(like(value, state[name]))


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    if is_shard(tensor):
        tensor.copy_(value)
    else:
        tensor.data = value


def kept_as(t: Tensor) -> torch.dtype:
    return torch.float32 if t.dtype in (torch.float16, torch.bfloat16) else t.dtype
