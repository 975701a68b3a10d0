"""An average of a model's weights and buffers, in storage of its own, and the exchange of the two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from learnkit.devices.dtensor import is_shard, like, own_parts
from learnkit.devices.ranks import Ranks
from learnkit.devices.wrappers import is_wrapper, plain_keys


class Average:
    """Starts as a copy of the model's state; `update` moves it towards what the model is now.

    Half-precision weights are averaged in float32; integer buffers follow the model's.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        own = model.state_dict(keep_vars=True)
        names = {
            id(own[key]): name for name, key in plain_keys(own, wrapped=is_wrapper(model)).items()
        }  # shared ones once
        tensors = [t for t in own.values() if isinstance(t, Tensor)]
        self.tensors: dict[str, Tensor] = {names[id(t)]: t for t in tensors}  # the model's own
        self.values = {name: t.detach().to(kept_as(t), copy=True) for name, t in self.tensors.items()}
        floats = [name for name, t in self.tensors.items() if t.is_floating_point()]
        # This rank's parts: a model that is spread over ranks has whole buffers, too, and torch adds no mixture.
        self.own = own_parts([self.values[name] for name in floats]), own_parts([self.tensors[name] for name in floats])

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """average += weight × (model − average)."""
        averages, now = self.own
        if any(a.dtype != t.dtype for a, t in zip(averages, now, strict=True)):
            now = [t.to(a.dtype) for a, t in zip(averages, now, strict=True)]
        torch._foreach_lerp_(averages, now, weight)  # type: ignore[reportPrivateImportUsage]
        for name, value in self.values.items():
            if not value.is_floating_point():
                value.copy_(self.tensors[name])

    @torch.no_grad()
    def unite(self, ranks: Ranks) -> None:
        """Make it one on all ranks, as the model is when training ends: rank 0's buffers, the means of weights that are
        apart.
        """
        weights = [value for name, value in self.values.items() if isinstance(self.tensors[name], nn.Parameter)]
        ranks.share([value for name, value in self.values.items() if not isinstance(self.tensors[name], nn.Parameter)])
        if not ranks.apart:
            return
        for value, mean in zip(weights, ranks.mean(weights), strict=True):
            value.copy_(mean)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the model is the average; its own weights are back afterwards, whatever is raised.

        Storage changes places, nothing is copied: a checkpoint that is being written reads the same numbers on. Of a
        model that is spread over ranks, whose storage is not ours to change, the numbers do.
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
        """Make the model's own weights equal to the average."""
        for name, t in self.tensors.items():
            t.copy_(self.values[name])

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.values)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        differing = sorted(state.keys() ^ self.values.keys())
        if differing:
            raise ValueError(f"the average is one of another model: {', '.join(differing[:5])} in one of them only.")
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
