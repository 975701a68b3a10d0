"""Files of model and optimizer state: written completely or not at all, read without executing anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learnkit.checkpoint.files import (
    check_seal,
    clean,
    explained_os_error,
    partial,
    read_state,
    size_of,
    sync_folder,
    writing,
)
from learnkit.devices.dtensor import is_shard, like, outline, read_on_main
from learnkit.devices.wrappers import WRAPPED, is_wrapper, plain_keys, plain_state

if TYPE_CHECKING:
    from learnkit.learner import Learner


def write_weights(path: Path, state: dict[str, Any]) -> Path:
    """Write `state` with torch.save next to `path`, sealed with its hash; when it is durable, rename it to `path`.

    Tensors of a device are copied to the host first, so that a file has the same bytes for any device.
    """
    part = partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean(path.parent, path.name)
        with writing({part: state}, seal=True):
            pass
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explained_os_error(error, path, size_of(state)) from error
        raise
    return path


def read_weights(path: Path, device: torch.device) -> dict[str, Any]:
    """Return a state written by `write_weights` or by plain torch.save, on `device`; only plain types are accepted."""
    if not path.exists():
        there = sorted(p.stem for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} does not exist. Saved in that folder: {', '.join(there) or 'nothing'}.")
    check_seal(path)
    state = read_state(path, device)
    if not isinstance(state, dict):
        raise ValueError(f"{path} contains {type(state).__name__}, expected a dict of tensors.")
    return state


def read_for(learn: Learner, path: Path) -> dict[str, Any]:
    """Like `read_weights`, into CPU memory: on a device, the state would take twice the memory until it is loaded.

    If the model is sharded, rank 0 reads the file, and holds it until it is sharded.
    """
    cpu = torch.device("cpu")
    if not any(map(is_shard, learn.model.parameters())):
        return read_weights(path, cpu)
    return read_on_main(learn.ranks, lambda: read_weights(path, cpu), lambda state: outline_of(learn.model, state))


def snapshot_from_main(learn: Learner, read: Callable[[], list[Any] | None]) -> list[Any] | None:
    """Return [name, parts, …] of a snapshot that rank 0 reads, on all ranks; sharded tensors as in `read_for`."""
    if not any(map(is_shard, learn.model.parameters())):
        return learn.ranks.from_main(read)
    return read_on_main(
        learn.ranks, read, lambda found: found and [found[0], outline_of(learn.model, found[1]), *found[2:]]
    )


def outline_of(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file's state with parameters and optimizer state as shapes and dtypes, for a sharded model."""
    buffers = {name for name, _ in model.named_buffers()}
    buffers |= {f"{WRAPPED}{name}" for name in buffers}
    if "model" not in state:
        return outline(dict(state), buffers)
    return {
        **state,
        "model": outline(dict(state["model"]), buffers),
        **{k: outline(state[k]) for k in ("opt", "optimizer") if k in state},
    }


def load_model(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load a model's state, or raise an error that lists every difference, with nothing changed.

    `strict=False` loads what fits. Tensors are copied to a device one by one from ordinary memory; the host waits for
    each.
    """
    if strict:
        check_model(model, state)
    names, own, given = named(model, state)
    fitting = {
        names[key]: like(own[key], value)
        for key, value in given.items()
        if key in own and shape_of(value) == shape_of(own[key])
    }
    if not fitting:
        raise ValueError("nothing in the file fits the model: no tensor has the same name and shape.")
    model.load_state_dict(fitting, strict=False)


def check_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise a ValueError that lists every difference between a model and a state."""
    _, own, given = named(model, state)
    lines = [
        *(f"{key}: only the model has it" for key in own if key not in given),
        *(f"{key}: only the file has it" for key in given if key not in own),
        *sorted(
            f"{key}: the file has {shape_of(given[key])}, the model {shape_of(own[key])}"
            for key in own.keys() & given.keys()
            if shape_of(given[key]) != shape_of(own[key])
        ),
    ]
    if lines:
        raise ValueError(
            f"the file is of another model; {len(lines)} differences, nothing was loaded:\n  "
            + "\n  ".join(lines)
            + "\nBuild the same model, or load what fits with strict=False."
        )


def named(model: nn.Module, state: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """Return ({plain name: the model's key}, the model's values, the state's values), by plain names."""
    own = plain_state(model)
    of_ddp = all(key.startswith(WRAPPED) for key in state) and not all(key.startswith(WRAPPED) for key in own)
    given = {name: state[key] for name, key in plain_keys(state, wrapped=of_ddp).items()}
    return plain_keys(model.state_dict(), wrapped=is_wrapper(model)), own, given


def has_same_dtypes(model: nn.Module, state: Mapping[str, Any]) -> bool:
    """Return whether the model's tensors have the dtypes of a state of the same shapes."""
    _, own, given = named(model, state)
    return all(
        value.dtype == given[name].dtype for name, value in own.items() if isinstance(value, Tensor) and name in given
    )


def shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
