"""From a model to its optimizer: layer groups, decoupled weight decay, fused kernels, hyper-parameters by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from learnkit.devices.dtensor import is_shard

OptFunc = Callable[..., Optimizer]
Splitter = Callable[[nn.Module], Sequence[Any]]


def layer_groups(model: nn.Module, splitter: Splitter | None = None) -> list[list[Parameter]]:
    """Return the model's parameters in layer groups, first layers first; one group without a `splitter`.

    A splitter takes the model and returns a sequence whose items are modules, or iterables of parameters or modules. It
    must return every parameter exactly once.
    """
    if splitter is None:
        return [list(model.parameters())]
    groups = [parameters_of(part) for part in splitter(model)]
    found = [id(p) for group in groups for p in group]
    names = {id(p): name for name, p in model.named_parameters()}
    if len(set(found)) < len(found):
        twice = sorted({names.get(i, "?") for i in found if found.count(i) > 1})
        raise ValueError(
            f"splitter puts parameters into more than one layer group: {', '.join(twice)}. "
            "Each parameter belongs to exactly one group."
        )
    if set(found) != set(names):
        lost = [name for i, name in names.items() if i not in found] or ["(a parameter that is not the model's)"]
        raise ValueError(
            f"splitter does not return exactly the model's parameters: check {', '.join(lost[:5])}. "
            "Every parameter of the model belongs to exactly one group."
        )
    return groups


def parameters_of(part: Any) -> list[Parameter]:
    if isinstance(part, Parameter):
        return [part]
    if isinstance(part, nn.Module):
        return list(part.parameters())
    if isinstance(part, str) or not isinstance(part, Iterable):
        raise TypeError(f"splitter returned {part!r}, expected modules, parameters, or lists of them.")
    return [p for item in part for p in parameters_of(item)]


def norm_and_bias_ids(model: nn.Module) -> set[int]:
    """Return the ids of all parameters of normalization layers, and of all biases."""
    ids = {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            ids |= {id(p) for p in module.parameters(recurse=False)}
    return ids


def param_groups(model: nn.Module, groups: Sequence[Sequence[Parameter]], *, bn_wd: bool) -> list[dict[str, Any]]:
    """Return one optimizer group per layer group, or two if norms and biases have no weight decay (`bn_wd=False`)."""
    spared = set() if bn_wd else norm_and_bias_ids(model)
    parts = []
    for i, group in enumerate(groups):
        for decays in (True, False):
            params = [p for p in group if (id(p) not in spared) == decays]
            if params:
                parts.append({"params": params, "layer_group": i, "decays": decays})
    return parts


def make_optimizer(opt_func: OptFunc, groups: list[dict[str, Any]], lr: float) -> Optimizer:
    """Return `opt_func(groups, lr=lr)`, fused if possible, and with decoupled weight decay for every algorithm.

    Weight decay is decoupled as in AdamW (Loshchilov & Hutter, 2019): a step first multiplies the weights by `1 - lr *
    wd`. If the algorithm does not do that itself, a step pre-hook does.
    """
    if isinstance(opt_func, partial) and "weight_decay" in opt_func.keywords:
        raise ValueError(
            f"opt_func sets weight_decay={opt_func.keywords['weight_decay']}, which would be overwritten: "
            "pass it to the Learner or to fit as wd=…, where it is decoupled."
        )
    accepted = inspect.signature(opt_func).parameters
    extra: dict[str, Any] = {"decoupled_weight_decay": True} if "decoupled_weight_decay" in accepted else {}
    if can_fuse(opt_func, accepted, groups):
        extra["fused"] = True
    own = opt_func.keywords.get("lr") if isinstance(opt_func, partial) else None
    opt = opt_func(groups, lr=torch.full_like(own, lr) if isinstance(own, Tensor) else lr, **extra)
    if not isinstance(opt, Optimizer):
        raise TypeError(
            f"opt_func returned {type(opt).__name__}, expected a torch.optim.Optimizer: pass a class such as "
            "torch.optim.SGD, or functools.partial(torch.optim.SGD, momentum=0.9)."
        )
    if not is_decoupled(opt):
        for group in opt.param_groups:
            group.update({"wd": 0.0} | ({"weight_decay": 0.0} if "weight_decay" in group else {}))
        opt.register_step_pre_hook(decay_weights)
    return opt


# A setting of an optimizer's groups, and the name of the state that torch keeps per parameter while the setting is on.
KEPT_FOR = {"momentum": "momentum_buffer", "centered": "grad_avg", "amsgrad": "max_exp_avg_sq"}


def complete_state(opt: Optimizer) -> None:
    """Make each step first add the state that a changed setting needs to the optimizer, initialized with zeros.

    torch (2.15) creates a parameter's state at its first step, for the settings of that step. If a schedule later
    switches on momentum, `centered` or `amsgrad`, the step fails with a KeyError. Fused SGD needs momentum buffers for
    all parameters or for none.
    """
    if not type(opt).__module__.startswith("torch.optim."):
        return  # other packages may use these names for other things
    if not any(setting in group for group in opt.param_groups for setting in KEPT_FOR):
        return
    hooks, on_load = opt._optimizer_step_pre_hooks, opt._optimizer_load_state_dict_post_hooks
    if complete_state not in on_load.values():
        opt.register_load_state_dict_post_hook(complete_state)
    for key in [key for key, hook in hooks.items() if isinstance(hook, CompleteState)]:
        del hooks[key]
    is_complete = isinstance(opt, SGD) and all(opt.state.get(p) for group in opt.param_groups for p in group["params"])
    if not is_complete:
        opt.register_step_pre_hook(CompleteState())


class CompleteState:
    """The step pre-hook of `complete_state`: it checks a group when its settings have changed, not at every step."""

    def __init__(self) -> None:
        self.complete: dict[int, list[str]] = {}  # by a group's id: the names that all its parameters have

    def __call__(self, opt: Optimizer, args: Any, kwargs: Any) -> None:
        for group in opt.param_groups:
            names = []
            for setting, name in KEPT_FOR.items():  # a tensor is not read, and counts as switched on
                if setting in group and (isinstance(group[setting], Tensor) or group[setting]):
                    names.append(name)
            if names and self.complete.get(id(group)) != names and add_missing(opt, group, names):
                self.complete[id(group)] = names


def add_missing(opt: Optimizer, group: dict[str, Any], names: Sequence[str]) -> bool:
    """Add zeros under these names to the state of each parameter that has one; return whether no parameter remains."""
    params, is_sgd = group["params"], isinstance(opt, SGD)
    begun = is_sgd and group.get("fused") and any(opt.state.get(p) for p in params)
    for p in params:
        if not (opt.state.get(p) or (begun and p.grad is not None)):
            continue  # torch creates the complete state
        kept = opt.state[p]
        for name in names:
            if name not in kept:
                kept[name] = torch.zeros_like(next((v for v in kept.values() if is_like(v, p)), p))
    return not is_sgd or all(opt.state.get(p) for p in params)


def is_like(value: Any, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape and value.ndim > 0


def can_fuse(opt_func: OptFunc, accepted: Any, groups: Iterable[dict[str, Any]]) -> bool:
    """Return whether torch has one fused kernel for all these parameters.

    False if the user chose another implementation.
    """
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    chosen = opt_func.keywords if isinstance(opt_func, partial) else {}
    if "fused" not in accepted or any(chosen.get(k) is not None for k in ("fused", "foreach", "differentiable")):
        return False
    devices, params = _get_fused_kernels_supported_devices(), [p for group in groups for p in group["params"]]
    if any(map(is_shard, params)) and not can_fuse_shards(opt_func):
        return False
    return all(p.is_floating_point() and p.device.type in devices for p in params)


def can_fuse_shards(opt_func: Any) -> bool:
    """Return whether torch's fused kernel accepts sharded tensors: only Adam's does (2.15)."""
    algorithm = opt_func.func if isinstance(opt_func, partial) else opt_func
    algorithm = algorithm if isinstance(algorithm, type) else type(algorithm)
    return issubclass(algorithm, (torch.optim.Adam, torch.optim.AdamW))


def is_decoupled(opt: Optimizer) -> bool:
    """Return whether the optimizer itself applies decoupled decay.

    A schedule-free optimizer must do that, because it knows which weights to decay.
    """
    return bool(opt.defaults.get("decoupled_weight_decay", False)) or has_modes(opt)


def has_modes(opt: Optimizer) -> bool:
    """Return whether it has training and evaluation modes, as schedule-free optimizers have (Defazio et al., 2024)."""
    return all(callable(getattr(opt, name, None)) for name in ("train", "eval"))


def set_mode(opt: Any, *, training: bool) -> None:
    opt.train() if training else opt.eval()


def decay_weights(opt: Optimizer, args: Any, kwargs: Any) -> None:
    """Multiply the weights that the step will update by `1 - lr * wd`; tensor values are not read."""
    for group in opt.param_groups:
        wd = group.get("wd", 0.0)
        if not isinstance(wd, Tensor) and not wd:
            continue
        params = [p for p in group["params"] if p.grad is not None]
        if params:
            with torch.no_grad():
                torch._foreach_mul_(params, 1 - group["lr"] * wd)  # type: ignore[reportPrivateImportUsage]


def set_weight_decay(opt: Optimizer, wd: float) -> None:
    """Set the weight decay `wd` in every group that decays, under the key that its algorithm reads."""
    rates = [wd if group.get("decays", True) else 0.0 for group in opt.param_groups]
    names = ["weight_decay" if "layer_group" not in group or is_decoupled(opt) else "wd" for group in opt.param_groups]
    set_each(opt, names, rates)


def set_rates(opt: Optimizer, rates: Sequence[float], name: str = "lr") -> None:
    """Set a hyper-parameter of every group from one value per layer group.

    The groups of an optimizer that the user built are its layer groups.
    """
    values = [rates[group.get("layer_group", i)] * scale_of(group, name) for i, group in enumerate(opt.param_groups)]
    set_each(opt, [name] * len(values), values)


def set_each(opt: Optimizer, names: Sequence[str], values: Sequence[float]) -> None:
    """Set a hyper-parameter in each group, under its name in that group."""
    if len(set(values)) > 1:
        for name in set(names):
            separate(opt, name)
    for group, name, value in zip(opt.param_groups, names, values, strict=True):
        set_hyper(group, name, value)


def separate(opt: Optimizer, name: str) -> None:
    """Prepare groups for different values of a hyper-parameter: groups that share one tensor get their own copies.

    torch's optimizers share an `lr` that is a tensor (2.15). The first group keeps it.
    """
    seen: set[int] = set()

    def own(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(own(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        value = value.clone() if id(value) in seen else value
        seen.add(id(value))
        return value

    for group in opt.param_groups:
        for key in ("momentum", "betas") if name == "mom" else (name,):
            if key in group:
                group[key] = own(group[key])


def scale_of(group: dict[str, Any], name: str) -> float:
    """Return a group's own factor of the rate: timm's `lr_scale`, as set by its layer decay."""
    return group.get("lr_scale", 1.0) if name == "lr" else 1.0


def own_rate(group: dict[str, Any]) -> float:
    """Return the initial rate of a built optimizer's group, before its lr_scale.

    The scale is applied when rates are set.
    """
    rate = as_number(group["lr"])
    return as_number(group.setdefault("initial_lr", rate)) if "lr_scale" in group else rate


def as_number(value: Any) -> Any:
    """Return a hyper-parameter's value as a number, or a tuple of numbers.

    Reading a tensor on a device waits for it.
    """
    if isinstance(value, tuple):
        return tuple(map(as_number, value))
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def spread(rate: float | slice, n_groups: int) -> list[float]:
    """Return one rate per layer group.

    `slice(lo, hi)`: geometrically spaced from lo (first layers) to hi (last layers); `slice(hi)`: hi / 10 for all but
    the last group; a number: the same for all.
    """
    if not isinstance(rate, slice):
        return [check_rate("lr", rate)] * n_groups
    hi = check_rate("the slice's end", rate.stop)
    if rate.start is None:
        return [hi / 10] * (n_groups - 1) + [hi]
    lo = check_rate("the slice's start", rate.start)
    if lo <= 0 or hi <= 0:
        raise ValueError(f"lr={rate}: expected both ends above 0, because rates are spaced geometrically.")
    return [hi if i == n_groups - 1 else lo * (hi / lo) ** (i / (n_groups - 1)) for i in range(n_groups)]


def check_rate(name: str, value: Any) -> float:
    """Return `value` as a float if it can be a rate: a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is {type(value).__name__}, expected a number.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value!r} cannot be used: expected a finite number, 0 or more.")
    return float(value)


def momentum_name(opt: Optimizer) -> str | None:
    """Return the name of the momentum in the last group that has one.

    It is "momentum" (SGD), or "betas" (Adam: the first of them).
    """
    return next((name for group in reversed(opt.param_groups) for name in ("momentum", "betas") if name in group), None)


def set_hyper(group: dict[str, Any], name: str, value: float) -> None:
    """Set one hyper-parameter of an optimizer group; "mom" is its momentum, or the first of its betas.

    A tensor stays the same object and takes the value, because a captured CUDA graph or a compiled step reads its
    memory. This does not wait for the device.
    """
    if name == "mom":
        name = "momentum"
        if name not in group:
            first = group["betas"][0] if "betas" in group else None
            if isinstance(first, Tensor):
                first.fill_(value)
            elif first is not None:
                group["betas"] = (value, *group["betas"][1:])
            return
    held = group.get(name)
    if isinstance(held, Tensor):
        held.fill_(value)
    else:
        group[name] = value


def check_hyper(opt: Optimizer, name: str) -> None:
    """Raise ValueError if the optimizer does not have this hyper-parameter."""
    group = opt.param_groups[0]
    known = sorted(k for k in group if k not in ("params", "layer_group", "decays", "lr_scale"))
    if (momentum_name(opt) is None) if name == "mom" else (name not in group):
        raise ValueError(
            f"{type(opt).__name__} has no hyper-parameter {name!r} to schedule, expected one of {', '.join(known)}"
            f"{', mom' if momentum_name(opt) else ''}."
        )


def zero_grad_of(opt: Optimizer) -> Callable[[], None]:
    """Return `opt.zero_grad()` without its profiler scope, which costs more than the actual work on a small model."""
    if type(opt).zero_grad is not Optimizer.zero_grad:
        return opt.zero_grad
    params = [p for group in opt.param_groups for p in group["params"]]

    def zero_grad() -> None:
        for p in params:
            p.grad = None

    return zero_grad
