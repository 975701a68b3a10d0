"""A trained model as one file for inference: it loads without the training data, the training code, or anything being
unpickled.

    model.pt2           torch.export's own format: plain torch runs it, without learnkit and without the model's class
    model.onnx          for ONNX Runtime and others; needs the extra `onnx`
    model.safetensors   the weights alone, where a model cannot be traced: its class has to be there when it is loaded

Each says in JSON what it is (see `about`), ends in a seal of its bytes, is loaded and compared with the model before it
gets its name, and appears at once or not at all.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learnkit.checkpoint.files import Damaged, as_path, explained_os_error, size_of, sync_folder, write_bytes
from learnkit.checkpoint.snapshot import copied_to_host
from learnkit.data.batch import Inputs, split_batch
from learnkit.data.fork_rng import unmoved
from learnkit.data.loaders import first_batch
from learnkit.devices.dtensor import is_shard
from learnkit.devices.nested import describe, tensors_in
from learnkit.devices.wrappers import plain_state
from learnkit.export.format import ABOUT, EXPORT_FORMAT, Predicts
from learnkit.hooks import add_note

if TYPE_CHECKING:
    from learnkit.learner import Learner


def export_model(learn: Learner, path: str | Path, stats: Any = None) -> Path:
    """What `learn.export` does: see there."""
    path = as_path(path)
    if path.suffix not in WRITERS:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'}, expected {', '.join(WRITERS)}: the ending says which format "
            f"it is."
        )
    if learn.is_running:
        raise RuntimeError("export was called while this Learner runs: let the fit under way end first.")
    if any(map(is_shard, learn.model.parameters())):
        raise RuntimeError(
            "export needs the whole model, of which each rank has a part: learn.save(name) on all ranks, then in one "
            "process Learner(data, model).load(name).export(path)."
        )
    with unmoved(learn.device):
        learn.ranks.on_main(lambda: write_export(learn, path, stats), f"export {path}")
    return path


def write_export(learn: Learner, path: Path, stats: Any) -> None:
    with learn.saved_weights():
        model = on_cpu(learn.model).eval()
    names, example = example_of(split_batch(first_batch(learn.data.train_dl))[0])
    said = about(learn, names, example, stats if stats is not None else vars(learn.data).get("stats"))
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            data = WRITERS[path.suffix](Predicts(model, names).eval(), example, said)
            write_bytes(part, data)
            compare(part, model, names, example)
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explained_os_error(error, path, size_of(model.state_dict())) from error
        raise


def on_cpu(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU, made without a second one on its device."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    held = copied_to_host({key: t for key, t in tensors.items() if not t.is_cpu})
    memo: dict[int, Any] = {
        key: nn.Parameter(copied, tensors[key].requires_grad) if isinstance(tensors[key], nn.Parameter) else copied
        for key, copied in held.items()
    }
    return copy.deepcopy(model, memo).cpu()


def example_of(inputs: Inputs) -> tuple[list[str], tuple[Tensor, ...]]:
    """(names, two samples of each input): a batch of one would be taken for a fixed size."""
    names = list(inputs) if isinstance(inputs, dict) else []
    values = tuple(inputs.values()) if isinstance(inputs, dict) else inputs
    if not all(isinstance(value, Tensor) and value.ndim for value in values):
        raise TypeError(
            f"the model's inputs are {describe(values)}; a file for inference needs one tensor each, with the batch "
            f"first."
        )
    return names, tuple(torch.cat([value, value])[:2].detach().cpu() for value in values)


def about(learn: Learner, names: list[str], example: tuple[Tensor, ...], stats: Any) -> dict[str, Any]:
    """What a file says of itself, in plain JSON."""
    from learnkit import __version__

    inputs = [
        {"name": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape[1:])}
        for name, x in zip(names or [f"x{i}" for i in range(len(example))], example, strict=True)
    ]
    return {
        "format": EXPORT_FORMAT,
        "learnkit": __version__,
        "torch": str(torch.__version__),
        "model": type(learn.model).__name__,
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "inputs": inputs,
        "classes": learn.data.classes,
        "stats": as_stats(stats),
        "values": {name: value if value == value else None for name, value in learn.values.items()},
    }


def as_stats(stats: Any) -> list[list[float]] | None:
    """(means, standard deviations), one a channel, of inputs in [0, 1]."""
    if stats is None:
        return None
    mean, std = (torch.as_tensor(part, dtype=torch.float64).flatten().tolist() for part in stats)
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ValueError(f"stats={stats!r}: expected (means, standard deviations), one a channel, the latter above 0.")
    return [mean, std]


def compare(path: Path, model: nn.Module, names: list[str], example: tuple[Tensor, ...]) -> None:
    """Load what was written, and see that it says what the model says."""
    from learnkit.export.predictor import load_learner

    expected = tensors_in(Predicts(model, names)(*example))
    try:
        predictor = load_learner(path, model=copy.deepcopy(model) if path.suffix == ".safetensors" else None)
    except Damaged as damage:
        raise ValueError(
            f"the traced model has what a file that is safe to load may not have, so nothing was written. Export to "
            f".onnx or .safetensors instead. ({damage})"
        ) from None
    found = tensors_in(predictor.run(example))
    for a, b in zip(found, expected, strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
            raise RuntimeError(
                f"the exported model gives other numbers than the model (up to {float((a - b).abs().max()):.2g} "
                f"apart), so nothing was written. Does it draw random numbers, or decide by values, in evaluation mode?"
            )


# --- formats -----------------------------------------------------------------
def as_pt2(model: nn.Module, example: tuple[Tensor, ...], said: dict[str, Any]) -> bytes:
    from learnkit.export import pt2

    try:
        program = torch.export.export(
            model, example, dynamic_shapes=(tuple({0: torch.export.Dim.AUTO} for _ in example),)
        )
    except Exception as error:
        add_note(
            error,
            "learnkit: torch.export cannot trace this model. Change what it complains of, or export to a file ending "
            "in .safetensors, which needs the model's class when it is loaded.",
        )
        raise
    return pt2.archive_bytes(program, {ABOUT: json.dumps(said)})


def as_onnx(model: nn.Module, example: tuple[Tensor, ...], said: dict[str, Any]) -> bytes:
    from learnkit.export import onnx as onnx_file

    return onnx_file.onnx_bytes(model, example, said)


def as_safetensors(model: nn.Module, example: tuple[Tensor, ...], said: dict[str, Any]) -> bytes:
    from learnkit.export import safetensors as tensor_file

    assert isinstance(model, Predicts)
    return tensor_file.safetensors_bytes(
        {name: t for name, t in plain_state(model.model).items() if isinstance(t, Tensor)}, said
    )


WRITERS: dict[str, Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], bytes]] = {
    ".pt2": as_pt2,
    ".onnx": as_onnx,
    ".safetensors": as_safetensors,
}
