"""A model inside wrappers: the names of its parameters without torch.compile and DDP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

COMPILED, WRAPPED = "_orig_mod.", "module."  # the prefixes that torch.compile and DDP add to parameter names


def plain_keys(keys: Iterable[str], *, wrapped: bool) -> dict[str, str]:
    """Return {plain name: key}; `wrapped`: the keys are those of a DDP module.

    A layer that is itself called `module` keeps its name.
    """
    return {key.replace(COMPILED, "").removeprefix(WRAPPED if wrapped else ""): key for key in keys}


def is_wrapper(model: nn.Module) -> bool:
    """Return whether a module only wraps another one as `module`."""
    return isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))


def plain_state(model: nn.Module) -> dict[str, Any]:
    """Return the model's state with the parameter names of the bare model."""
    state = model.state_dict()
    wrapped = is_wrapper(model)
    return {name: state[key] for name, key in plain_keys(state, wrapped=wrapped).items()}
