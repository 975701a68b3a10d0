"""What `learn.export` wrote, loaded again: a model that predicts, and what its file says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from learnkit.checkpoint.files import Damaged, as_path
from learnkit.checkpoint.weights import load_model
from learnkit.devices.nested import to_device

RunModel = Callable[[Sequence[Tensor]], Any]


@final
class Predictor:
    """A model for inference; what it is given may be anywhere, what it returns is on the CPU.

    info        what the file says: model, parameters, inputs (name, dtype, shape of one sample), classes, stats,
                values, versions
    classes     the names of the classes, or None

    >>> predictor = load_learner("model.pt2")  # doctest: +SKIP
    >>> predictor.predict(x)  # doctest: +SKIP
    """

    def __init__(self, run: RunModel, info: dict[str, Any]) -> None:
        self.run, self.info = run, info
        self.classes: list[str] | None = info.get("classes")

    def predict(self, x: Any) -> Any:
        """The prediction for one sample or a batch of them, as `learn.predict` has it: a tensor, or a tuple of several
        inputs, or a mapping by their names.
        """
        if isinstance(x, dict):
            x = tuple(x[entry["name"]] for entry in self.info["inputs"])
        inputs = x if isinstance(x, (tuple, list)) else (x,)
        ndims = [len(entry["shape"]) for entry in self.info["inputs"]]
        if [t.ndim for t in inputs] not in (ndims, [n + 1 for n in ndims]):
            raise ValueError(
                f"predict was given inputs of shapes {[tuple(t.shape) for t in inputs]}, expected samples of shapes "
                f"{[tuple(entry['shape']) for entry in self.info['inputs']]}, or batches of them."
            )
        single = [t.ndim for t in inputs] == ndims
        with torch.no_grad():
            found = self.run([t.unsqueeze(0) if single else t for t in inputs])
        return found[0] if single and isinstance(found, Tensor) else found

    def predict_image(self, path: str | Path) -> dict[str, float]:
        """{class: probability} of a picture in a file, the likeliest first; needs a model of one picture that gives a
        score a class.
        """
        from learnkit.export.picture import load_picture

        scores = self.predict(load_picture(as_path(path), self.info))
        if not isinstance(scores, Tensor) or scores.ndim != 1:
            raise ValueError("the model does not give one score a class, so there is no likeliest one.")
        shares, order = scores.float().softmax(0).sort(descending=True)
        names = self.classes or [str(i) for i in range(len(scores))]
        return {names[i]: share for i, share in zip(order.tolist(), shares.tolist(), strict=True)}


def load_learner(path: str | Path, *, model: nn.Module | None = None, device: torch.device | str = "cpu") -> Predictor:
    """A model that `learn.export` wrote to a .pt2, .onnx or .safetensors file, for inference; of the latter, `model` is
    an object of the same class, whose weights are replaced.

    `device`: where it computes, such as "cuda"; an .onnx file on the CPU only. What it is given goes there, what it
    predicts comes back. Nothing in the file is executed: one that holds more than `learn.export` writes, or was
    changed, is refused with Damaged.
    """
    path, place = as_path(path), torch.empty(0, device=device).device
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}.")
    if path.suffix not in READERS:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'}, expected {', '.join(READERS)}. What learn.save wrote goes to "
            "learn.load."
        )
    if (model is not None) != (path.suffix == ".safetensors"):
        raise TypeError(
            f"{path} "
            + (
                "has its model in it: leave model=… out."
                if model is not None
                else "has the weights alone: give load_learner(path, model=…) an object of the model's class."
            )
        )
    run, info = READERS[path.suffix](path, model, place)
    if not isinstance(info, dict) or info.get("format") != 1:
        raise Damaged(
            f"{path} has format {info.get('format') if isinstance(info, dict) else None}, this version of learnkit "
            f"reads 1."
        )
    return Predictor(there_and_back(run, place), info)


def there_and_back(run: RunModel, device: torch.device) -> RunModel:
    """`run` on a device, from wherever the inputs are, and to the CPU. Reading what it predicts waits for the
    device.
    """
    return lambda inputs: to_device(run(to_device(inputs, device)), torch.device("cpu"))


def from_pt2(path: Path, _: nn.Module | None, device: torch.device) -> tuple[RunModel, Any]:
    from learnkit.export import pt2
    from learnkit.export.format import ABOUT

    program, extra = pt2.read_archive(path, device)
    if ABOUT not in extra:
        raise Damaged(f"{path} has no {ABOUT}: it was written by something else than learn.export.")
    return lambda inputs: program(*inputs), json.loads(extra[ABOUT])


def from_onnx(path: Path, _: nn.Module | None, device: torch.device) -> tuple[RunModel, Any]:
    from learnkit.export import onnx as onnx_file

    if device.type != "cpu":
        raise ValueError(
            f"{path} cannot be loaded on {device}: ONNX Runtime computes on the CPU here. Leave device=… out, or "
            f"export to a file ending in .pt2."
        )
    session = onnx_file.session_of(path)
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> Any:
        found = session.run(None, {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)})
        outputs = tuple(torch.from_numpy(value) for value in found)
        return outputs[0] if len(outputs) == 1 else outputs

    return run, json.loads(session.get_modelmeta().custom_metadata_map.get("learnkit", "null"))


def from_safetensors(path: Path, model: nn.Module | None, device: torch.device) -> tuple[RunModel, Any]:
    from learnkit.export import safetensors as tensor_file
    from learnkit.export.format import Predicts

    assert model is not None
    state, info = tensor_file.read_safetensors(path)
    load_model(model, state, strict=True)
    names = [entry["name"] for entry in info["inputs"]]
    whole = Predicts(model.to(device).eval(), [] if names == [f"x{i}" for i in range(len(names))] else names)
    return lambda inputs: whole(*inputs), info


READERS: dict[str, Callable[[Path, nn.Module | None, torch.device], tuple[RunModel, Any]]] = {
    ".pt2": from_pt2,
    ".onnx": from_onnx,
    ".safetensors": from_safetensors,
}
