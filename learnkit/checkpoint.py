"""Files of model and optimizer state: written at once or not at all, read without executing anything."""
from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("module.", "_orig_mod.")     # what DDP and torch.compile put before the names of a model's parameters


def plain_key(key: str) -> str:
    """A state's key as the bare model has it."""
    for wrapper in WRAPPERS:
        while key.startswith(wrapper) or (f".{wrapper}" in key and wrapper == "_orig_mod."):
            key = key.replace(wrapper, "", 1)
    return key


def plain_state(model: nn.Module) -> dict[str, Any]:
    """The model's state under the names that the bare model has."""
    return {plain_key(key): value for key, value in model.state_dict().items()}


def write(path: Path, state: dict[str, Any]) -> Path:
    """Write `state` with torch.save beside `path`, flush it to the disk, and put it in place by one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; there is nothing to do where folders cannot be opened (Windows)."""
    if os.name != "posix": return
    descriptor = os.open(folder, os.O_RDONLY)
    try: os.fsync(descriptor)
    finally: os.close(descriptor)


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """A state written by `write` or by plain torch.save, its tensors on `device`; only plain types are accepted."""
    if not path.exists():
        there = sorted(p.stem for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no {path}. Saved in that folder: {', '.join(there) or 'nothing'}.")
    try: state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read safely as a state of plain tensors: it is damaged, or holds other objects. "
                         "Nothing was loaded.") from error
    if not isinstance(state, dict): raise ValueError(f"{path} holds {type(state).__name__}, expected a dict of tensors.")
    return state


def load_model(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load a model's state, or raise with every difference listed and nothing changed. `strict=False` loads what fits."""
    names = {plain_key(key): key for key in model.state_dict()}
    own, given = plain_state(model), {plain_key(key): value for key, value in state.items()}
    differing = {key: f"{key}: the file has {shape_of(given[key])}, the model {shape_of(own[key])}"
                 for key in own.keys() & given.keys() if shape_of(given[key]) != shape_of(own[key])}
    if strict:
        lines = [*(f"{key}: only the model has it" for key in own if key not in given),
                 *(f"{key}: only the file has it" for key in given if key not in own), *sorted(differing.values())]
        if lines:
            raise ValueError(f"the file is of another model; {len(lines)} differences, nothing was loaded:\n  " + "\n  ".join(lines)
                             + "\nBuild the same model, or take what fits with strict=False.")
    fitting = {names[key]: value for key, value in given.items() if key in own and key not in differing}
    if not fitting: raise ValueError("nothing in the file fits the model: no name and shape agree.")
    model.load_state_dict(fitting, strict=False)


def shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
