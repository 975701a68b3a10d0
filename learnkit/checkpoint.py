"""Files of model and optimizer state: written at once or not at all, read without executing anything."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnkit.files import check_seal, clean, explained, partial, read_state, size_of, sync_folder, writing
from learnkit.shards import is_shard, like, outline, read_on_main

if TYPE_CHECKING:
    from learnkit.learner import Learner

COMPILED, WRAPPED = "_orig_mod.", "module."     # what torch.compile and DDP put before the names of a model's parameters
HOW = ("fused", "foreach", "capturable", "differentiable")      # an optimizer's settings that are of the machine, not of the algorithm


def plain_keys(keys: Iterable[str], *, wrapped: bool) -> dict[str, str]:
    """{plain name: key}; `wrapped`: the keys are of a DDP module. A layer that is itself called `module` keeps its name."""
    return {key.replace(COMPILED, "").removeprefix(WRAPPED if wrapped else ""): key for key in keys}


def is_wrapper(model: nn.Module) -> bool:
    """Whether a module is only there to hold another one as `module`."""
    return isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))


def plain_state(model: nn.Module) -> dict[str, Any]:
    """The model's state under the names that the bare model has."""
    state = model.state_dict()
    wrapped = is_wrapper(model)
    return {name: state[key] for name, key in plain_keys(state, wrapped=wrapped).items()}


def write(path: Path, state: dict[str, Any]) -> Path:
    """Write `state` with torch.save next to `path`, sealed with its hash, and put it in place by one rename when it is on the disk. What
    is on a device is copied to the host first: a file has the same bytes wherever its tensors were."""
    part = partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path.parent, path.name)
        with writing({part: state}, seal=True): pass
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError): part.unlink(missing_ok=True)
        if isinstance(error, OSError): raise explained(error, path, size_of(state)) from error
        raise
    return path


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """A state written by `write` or by plain torch.save, its tensors on `device`; only plain types are accepted."""
    if not path.exists():
        there = sorted(p.stem for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no {path}. Saved in that folder: {', '.join(there) or 'nothing'}.")
    check_seal(path)
    state = read_state(path, device)
    if not isinstance(state, dict): raise ValueError(f"{path} holds {type(state).__name__}, expected a dict of tensors.")
    return state


def read_for(learn: Learner, path: Path) -> dict[str, Any]:
    """As `read`, into the CPU's memory: on a device the state would lie twice until it is loaded. Of a model that is sharded over ranks,
    rank 0 reads the file, and keeps it until it is put into parts."""
    cpu = torch.device("cpu")
    if not any(map(is_shard, learn.model.parameters())): return read(path, cpu)
    return read_on_main(learn.ranks, lambda: read(path, cpu), lambda state: outline_of(learn.model, state))


def from_main(learn: Learner, read: Callable[[], list[Any] | None]) -> list[Any] | None:
    """[name, parts, …] of a snapshot as rank 0 reads it, on all ranks; what is spread over them as by `read_for`."""
    if not any(map(is_shard, learn.model.parameters())): return learn.ranks.from_main(read)
    return read_on_main(learn.ranks, read, lambda found: found and [found[0], outline_of(learn.model, found[1]), *found[2:]])


def outline_of(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A file's state with shapes and dtypes alone where the model is spread over ranks: parameters, and the optimizer's state."""
    buffers = {name for name, _ in model.named_buffers()}
    buffers |= {f"{WRAPPED}{name}" for name in buffers}
    if "model" not in state: return outline(dict(state), buffers)
    return {**state, "model": outline(dict(state["model"]), buffers), **{k: outline(state[k]) for k in ("opt", "optimizer") if k in state}}


def load_model(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load a model's state, or raise with every difference listed and nothing changed. `strict=False` loads what fits.

    To a device the tensors are copied one by one from ordinary memory; the host waits for each.
    """
    if strict: check_model(model, state)
    names, own, given = named(model, state)
    fitting = {names[key]: like(own[key], value) for key, value in given.items() if key in own and shape_of(value) == shape_of(own[key])}
    if not fitting: raise ValueError("nothing in the file fits the model: no name and shape agree.")
    model.load_state_dict(fitting, strict=False)


def check_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise ValueError that lists every difference between a model and a state."""
    _, own, given = named(model, state)
    lines = [*(f"{key}: only the model has it" for key in own if key not in given),
             *(f"{key}: only the file has it" for key in given if key not in own),
             *sorted(f"{key}: the file has {shape_of(given[key])}, the model {shape_of(own[key])}"
                     for key in own.keys() & given.keys() if shape_of(given[key]) != shape_of(own[key]))]
    if lines:
        raise ValueError(f"the file is of another model; {len(lines)} differences, nothing was loaded:\n  " + "\n  ".join(lines)
                         + "\nBuild the same model, or take what fits with strict=False.")


def named(model: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """({plain name: the model's key}, the model's values, the state's), by plain names."""
    own = plain_state(model)
    of_ddp = all(key.startswith(WRAPPED) for key in state) and not all(key.startswith(WRAPPED) for key in own)
    given = {name: state[key] for name, key in plain_keys(state, wrapped=of_ddp).items()}
    return plain_keys(model.state_dict(), wrapped=is_wrapper(model)), own, given


def optimizer_fits(opt: Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether a state is of the same algorithm and of parameters of the same shapes."""
    groups = state.get("param_groups", [])
    own = [p for group in opt.param_groups for p in group["params"]]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in opt.param_groups]: return False
    if any(set(a) != set(b) for a, b in zip(groups, opt.param_groups, strict=True)): return False
    shapes = {number: p.shape for number, p in zip((n for g in groups for n in g["params"]), own, strict=True)}
    flat = torch.Size([sum(shape.numel() for shape in shapes.values())])        # LBFGS keeps vectors of all parameters
    return all(value.shape == flat or is_of(shapes[number], value.shape) for number, values in state.get("state", {}).items()
               for value in values.values() if isinstance(value, Tensor))


def is_of(shape: torch.Size, kept: torch.Size) -> bool:
    """Whether what is kept is of a parameter of this shape: of each element, of each row or column (Adafactor's), or of it as a whole."""
    return not kept or (len(kept) == len(shape) and all(k in (1, n) for k, n in zip(kept, shape, strict=True)))


def load_optimizer(opt: Optimizer, state: Mapping[str, Any], *, same_dtypes: bool = True) -> None:
    """As `opt.load_state_dict`, but the groups stay the same objects, which schedules may hold, and step as they did; and the state keeps
    the dtypes that it was saved with, which torch changes to the parameters' (2.15: NAdam's float32 `mu_product` in a float64 model).

    same_dtypes     whether the parameters have the dtypes that they were saved with; where not, what is kept for each element takes theirs
    """
    groups = list(opt.param_groups)
    own = {number: p for given, group in zip(state["param_groups"], groups, strict=True)
           for number, p in zip(given["params"], group["params"], strict=True)}
    values = {number: {name: fitted(own[number], value, same_dtypes) if isinstance(value, Tensor) and value.ndim else value
                       for name, value in kept.items()} for number, kept in state["state"].items()}
    given = [{**given, **{name: group[name] for name in HOW if name in group}}
             for given, group in zip(state["param_groups"], groups, strict=True)]
    opt.load_state_dict({**state, "state": values, "param_groups": given})
    for number, kept in values.items():
        loaded = opt.state.get(own[number], {})
        for name, value in kept.items():
            if isinstance(value, Tensor) and isinstance(cast := loaded.get(name), Tensor) and cast.dtype != value.dtype:
                loaded[name] = value.to(cast.device, copy=True)
    for group, loaded in zip(groups, opt.param_groups, strict=True):
        group.update({name: put_back(group.get(name), value) for name, value in loaded.items() if name != "params"})
        group["params"] = loaded["params"]
    opt.param_groups[:] = groups


def has_same_dtypes(model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether the model's tensors have the dtypes of a state of the same shapes."""
    _, own, given = named(model, state)
    return all(value.dtype == given[name].dtype for name, value in own.items() if isinstance(value, Tensor) and name in given)


def fitted(own: Tensor, value: Tensor, same_dtypes: bool) -> Tensor:
    """What is kept for a parameter, in the parts that it is in; in its dtype where that is another one now."""
    casts = not same_dtypes and own.is_floating_point() and value.is_floating_point()
    return like(own, value.to(own.dtype) if casts else value)


def put_back(own: Any, loaded: Any) -> Any:
    """A hyper-parameter's value from a file, as what it is here: a tensor stays the same object, and a number does not become one."""
    if isinstance(own, tuple) and isinstance(loaded, (tuple, list)) and len(own) == len(loaded):
        return tuple(map(put_back, own, loaded))
    if isinstance(own, Tensor): return own.fill_(loaded)  # type: ignore[arg-type]
    return loaded.item() if isinstance(loaded, Tensor) and isinstance(own, (int, float)) else loaded


def shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
