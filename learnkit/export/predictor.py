"""Load a file that `learn.export` wrote: a model that predicts, and the file's information about it."""

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
    """A model for inference. Inputs may be on any device; predictions are on the CPU.

    Attributes:
        info: information in the file: model, parameters, inputs (name, dtype, shape of one sample), classes, stats,
            values, versions
        classes: the names of the classes, or None

    Example:
        >>> predictor = load_learner("model.pt2")  # doctest: +SKIP
        >>> predictor.predict(x)  # doctest: +SKIP
    """

    def __init__(self, run: RunModel, info: dict[str, Any]) -> None:
        self.run, self.info = run, info
        self.classes: list[str] | None = info.get("classes")

    def predict(self, x: Any) -> Any:
        """Return the prediction for one sample or a batch of samples, as `learn.predict` does.

        Args:
            x: a tensor; for several inputs a tuple, or a mapping with their names

        Raises:
            ValueError: when the shapes do not fit the model
        """
        if isinstance(x, dict):
            x = tuple(x[entry["name"]] for entry in self.info["inputs"])
        inputs = x if isinstance(x, (tuple, list)) else (x,)
        ndims = [len(entry["shape"]) for entry in self.info["inputs"]]
        if [t.ndim for t in inputs] not in (ndims, [n + 1 for n in ndims]):
            raise ValueError(
                f"predict got inputs of shapes {[tuple(t.shape) for t in inputs]}, expected samples of shapes "
                f"{[tuple(entry['shape']) for entry in self.info['inputs']]}, or batches of them."
            )
        single = [t.ndim for t in inputs] == ndims
        with torch.no_grad():
            found = self.run([t.unsqueeze(0) if single else t for t in inputs])
        return found[0] if single and isinstance(found, Tensor) else found

    def predict_image(self, path: str | Path) -> dict[str, float]:
        """Return {class: probability} for a picture file, most probable class first.

        Args:
            path: the picture file

        Raises:
            ValueError: when the model does not take one picture, or does not return one score per class
        """
        from learnkit.export.picture import load_picture

        scores = self.predict(load_picture(as_path(path), self.info))
        if not isinstance(scores, Tensor) or scores.ndim != 1:
            raise ValueError("predict_image needs a model that returns one score per class; this model does not.")
        shares, order = scores.float().softmax(0).sort(descending=True)
        names = self.classes or [str(i) for i in range(len(scores))]
        return {names[i]: share for i, share in zip(order.tolist(), shares.tolist(), strict=True)}


def load_learner(path: str | Path, *, model: nn.Module | None = None, device: torch.device | str = "cpu") -> Predictor:
    """Load a model that `learn.export` wrote, for inference.

    Nothing in the file is executed. Inputs are moved to `device`, predictions are moved back to the CPU.

    Args:
        path: a .pt2, .onnx or .safetensors file
        model: for a .safetensors file only: an object of the model's class, whose weights are replaced
        device: where the model computes, such as "cuda"; an .onnx file runs on the CPU only

    Raises:
        FileNotFoundError: when there is no such file
        Damaged: when the file was changed, or contains more than `learn.export` writes
        ValueError: when the ending of the file is unknown, or the device is not available for it
        TypeError: when `model` is missing, or given for a file that contains its model
    """
    path, place = as_path(path), torch.empty(0, device=device).device
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.suffix not in READERS:
        raise ValueError(
            f"{path} ends in {path.suffix or 'nothing'}, expected {', '.join(READERS)}. To load a file of learn.save, "
            "use learn.load."
        )
    if (model is not None) != (path.suffix == ".safetensors"):
        raise TypeError(
            f"{path} "
            + (
                "contains its model: remove model=…."
                if model is not None
                else "contains only weights: pass load_learner(path, model=…) an object of the model's class."
            )
        )
    run, info = READERS[path.suffix](path, model, place)
    if not isinstance(info, dict) or info.get("format") != 1:
        raise Damaged(
            f"{path} has format {info.get('format') if isinstance(info, dict) else None}, expected 1, which this "
            f"version of learnkit reads."
        )
    return Predictor(there_and_back(run, place), info)


def there_and_back(run: RunModel, device: torch.device) -> RunModel:
    """Return `run` on a device, for inputs from any device, with results on the CPU.

    Reading the results waits for the device.
    """
    return lambda inputs: to_device(run(to_device(inputs, device)), torch.device("cpu"))


def from_pt2(path: Path, _: nn.Module | None, device: torch.device) -> tuple[RunModel, Any]:
    from learnkit.export import pt2
    from learnkit.export.format import ABOUT

    program, extra = pt2.read_archive(path, device)
    if ABOUT not in extra:
        raise Damaged(f"{path} has no {ABOUT}: it was not written by learn.export.")
    return lambda inputs: program(*inputs), json.loads(extra[ABOUT])


def from_onnx(path: Path, _: nn.Module | None, device: torch.device) -> tuple[RunModel, Any]:
    from learnkit.export import onnx as onnx_file

    if device.type != "cpu":
        raise ValueError(
            f"{path} cannot be loaded on {device}: ONNX Runtime computes on the CPU here. Remove device=…, or export "
            f"to a file ending in .pt2."
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
