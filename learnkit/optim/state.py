"""Saved optimizer state: whether it fits, and loading it into an existing optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learnkit.devices.dtensor import like

HOW = (
    "fused",
    "foreach",
    "capturable",
    "differentiable",
)  # settings of an optimizer that belong to the machine, not to the algorithm


def optimizer_fits(opt: Optimizer, state: Mapping[str, Any]) -> bool:
    """Return whether a state belongs to the same algorithm and to parameters of the same shapes."""
    groups = state.get("param_groups", [])
    own = [p for group in opt.param_groups for p in group["params"]]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in opt.param_groups]:
        return False
    if any(set(a) != set(b) for a, b in zip(groups, opt.param_groups, strict=True)):
        return False
    shapes = {number: p.shape for number, p in zip((n for g in groups for n in g["params"]), own, strict=True)}
    flat = torch.Size([sum(shape.numel() for shape in shapes.values())])  # LBFGS keeps vectors of all parameters
    return all(
        value.shape == flat or is_of(shapes[number], value.shape)
        for number, values in state.get("state", {}).items()
        for value in values.values()
        if isinstance(value, Tensor)
    )


def is_of(shape: torch.Size, kept: torch.Size) -> bool:
    """Return whether a state tensor belongs to a parameter of this shape.

    It has one value per element, per row or column (Adafactor's), or one for the whole parameter.
    """
    return not kept or (len(kept) == len(shape) and all(k in (1, n) for k, n in zip(kept, shape, strict=True)))


def load_optimizer(opt: Optimizer, state: Mapping[str, Any], *, same_dtypes: bool = True) -> None:
    """Like `opt.load_state_dict`, but with two differences.

    The groups stay the same objects, which schedules may hold, and keep their implementation settings. The state keeps
    its saved dtypes, which torch would change to the parameters' (2.15: NAdam's float32 `mu_product` in a float64
    model).

    Args:
        opt: the optimizer
        state: its saved state
        same_dtypes: whether the parameters have the dtypes that they were saved with; if not, per-element state takes
            theirs
    """
    groups = list(opt.param_groups)
    own = {
        number: p
        for given, group in zip(state["param_groups"], groups, strict=True)
        for number, p in zip(given["params"], group["params"], strict=True)
    }
    values = {
        number: {
            name: fitted_to_parameter(own[number], value, same_dtypes)
            if isinstance(value, Tensor) and value.ndim
            else value
            for name, value in kept.items()
        }
        for number, kept in state["state"].items()
    }
    given = [
        {**given, **{name: group[name] for name in HOW if name in group}}
        for given, group in zip(state["param_groups"], groups, strict=True)
    ]
    opt.load_state_dict({**state, "state": values, "param_groups": given})
    for number, kept in values.items():
        loaded = opt.state.get(own[number], {})
        for name, value in kept.items():
            if isinstance(value, Tensor) and isinstance(cast := loaded.get(name), Tensor) and cast.dtype != value.dtype:
                loaded[name] = value.to(cast.device, copy=True)
    for group, loaded in zip(groups, opt.param_groups, strict=True):
        group.update(
            {name: restored_value(group.get(name), value) for name, value in loaded.items() if name != "params"}
        )
        group["params"] = loaded["params"]
    opt.param_groups[:] = groups


def fitted_to_parameter(own: Tensor, value: Tensor, same_dtypes: bool) -> Tensor:
    """Return a parameter's state, sharded like the parameter, and in its dtype if that has changed."""
    casts = not same_dtypes and own.is_floating_point() and value.is_floating_point()
    return like(own, value.to(own.dtype) if casts else value)


def restored_value(own: Any, loaded: Any) -> Any:
    """Return a hyper-parameter's saved value in its current form.

    A tensor stays the same object, and a number does not become a tensor.
    """
    if isinstance(own, tuple) and isinstance(loaded, (tuple, list)) and len(own) == len(loaded):
        return tuple(map(restored_value, own, loaded))
    if isinstance(own, Tensor):
        return own.fill_(loaded)  # type: ignore[arg-type]
    return loaded.item() if isinstance(loaded, Tensor) and isinstance(own, (int, float)) else loaded
