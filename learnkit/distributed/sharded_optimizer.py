"""Optimizers of a model that is sharded over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learnkit.devices.dtensor import like
from learnkit.optim.combined import Together
from learnkit.optim.groups import can_fuse_shards

OF_WHOLE = tuple(getattr(torch.optim, name) for name in ("Adafactor", "LBFGS", "Muon") if hasattr(torch.optim, name))


def check_optimizer(opt: Optimizer) -> None:
    """Raises ValueError for an optimizer that cannot step on shards."""
    for own in opt.optimizers if isinstance(opt, Together) else (opt,):
        if any(group.get("fused") for group in own.param_groups) and not can_fuse_shards(own):
            raise ValueError(
                f"{type(own).__name__}(fused=True) cannot be combined with to_fsdp: PyTorch has no fused kernel of it "
                f"for sharded weights. Build it with fused=False."
            )
        if isinstance(own, OF_WHOLE):
            raise ValueError(
                f"{type(own).__name__} cannot be combined with to_fsdp: it computes with whole matrices, of which each "
                f"rank has some rows. Use to_distributed(), or an elementwise optimizer such as AdamW."
            )


def point_to(opt: Optimizer, names: dict[int, str], parameters: dict[str, Any]) -> None:
    """Give an optimizer that the user built the sharded parameters instead of the whole ones, and shard its state."""
    for own in opt.optimizers if isinstance(opt, Together) else (opt,):
        for group in own.param_groups:
            group["params"] = [parameters[names[id(p)]] for p in group["params"]]
        for p in list(own.state):
            sharded, values = parameters[names[id(p)]], own.state.pop(p)
            own.state[sharded] = {
                name: like(sharded, value) if isinstance(value, Tensor) and value.ndim else value
                for name, value in values.items()
            }
