"""A model inside wrappers: the names that its parameters have without torch.compile and DDP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

COMPILED, WRAPPED = "_orig_mod.", "module."  # what torch.compile and DDP put before the names of a model's parameters


def plain_keys(keys: Iterable[str], *, wrapped: bool) -> dict[str, str]:
    """{plain name: key}; `wrapped`: the keys are of a DDP module. A layer that is itself called `module` keeps its
    name.
    """
    return {key.replace(COMPILED, "").removeprefix(WRAPPED if wrapped else ""): key for key in keys}


def is_wrapper(model: nn.Module) -> bool:
    """Whether a module is only there to hold another one as `module`."""
    return isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))


def plain_state(model: nn.Module) -> dict[str, Any]:
    """The model's state under the names that the bare model has."""
    state = model.state_dict()
    wrapped = is_wrapper(model)
    return {name: state[key] for name, key in plain_keys(state, wrapped=wrapped).items()}
