"""Pretrained networks from torchvision with a new last layer."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from learnkit.checkpoint.files import Damaged, as_path, read_state
from learnkit.data.loaders import DataBunch
from learnkit.hooks import Callback
from learnkit.learner import Learner, Rate
from learnkit.vision.data import ImageDataBunch
from learnkit.vision.stats import imagenet_stats


def vision_learner(
    data: DataBunch,
    arch: Callable[..., nn.Module] | str,
    *,
    pretrained: bool | str | Path = True,
    n_out: int | None = None,
    loss_func: Callable[..., Tensor] | None = None,
    opt_func: Any = AdamW,
    lr: Rate = 3e-3,
    wd: float = 1e-2,
    bn_wd: bool = True,
    metrics: Any = (),
    callbacks: Callback | Iterable[Callback] = (),
    path: str | Path = ".",
    model_dir: str = "models",
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> Learner:
    """Return a Learner with a network from torchvision, whose last layer is replaced by one for these classes.

    There are three layer groups: the first and the second half of the body, and the head. A pretrained body is frozen:
    continue with `fine_tune`. Pretrained networks expect data normalized with imagenet_stats, so data that is not
    normalized yet is normalized with them. Other arguments are those of Learner.

    Args:
        data: the data
        arch: torchvision.models.resnet18, or "resnet18"; or a function of your own that returns a network
        pretrained: True: torchvision's weights, downloaded at first use; a path: a file of weights; False: random
            weights
        n_out: number of outputs; None: the number of classes in `data`

    Raises:
        ValueError: when the architecture is unknown, or the number of outputs is not
        OSError: when the weights cannot be downloaded
    """
    if n_out is None and data.classes is None:
        raise ValueError("the data has no class names: pass vision_learner(…, n_out=…).")
    model = build(arch, pretrained)
    head = replace_head(model, len(data.classes or ()) if n_out is None else n_out)
    if pretrained is not False and isinstance(data, ImageDataBunch) and data.stats is None:
        data.normalize(imagenet_stats)
    learn = Learner(
        data,
        model,
        loss_func=loss_func,
        opt_func=opt_func,
        lr=lr,
        wd=wd,
        bn_wd=bn_wd,
        metrics=metrics,
        callbacks=callbacks,
        splitter=lambda model: halves_and_head(model, head),
        path=path,
        model_dir=model_dir,
        seed=seed,
        device=device,
    )
    return learn if pretrained is False else learn.freeze()


def build(arch: Callable[..., nn.Module] | str, pretrained: bool | str | Path) -> nn.Module:
    from torchvision import models

    if isinstance(arch, str):
        known = models.list_models(module=models)
        if arch not in known:
            import difflib

            near = difflib.get_close_matches(arch, known, n=3)
            raise ValueError(
                f"torchvision has no model {arch!r}{', but ' + ', '.join(near) if near else ''}: see its list_models()."
            )
        arch = models.get_model_builder(arch)
    from_torchvision = getattr(arch, "__module__", "").startswith("torchvision.models")
    if pretrained is True:
        if not from_torchvision:
            raise ValueError(
                f"pretrained=True is for torchvision's models, got {arch}: pass pretrained=<file of weights>, or False."
            )
        return download_weights(arch)
    model = arch(weights=None) if from_torchvision else arch()
    if pretrained is not False:
        load_weights(model, as_path(pretrained))
    return model


def download_weights(arch: Callable[..., nn.Module]) -> nn.Module:
    try:
        return arch(weights="DEFAULT")
    except (urllib.error.URLError, OSError) as error:
        raise OSError(
            f"the weights of {arch.__name__} could not be downloaded: {error}. Without a network, pass their file, "
            "vision_learner(…, pretrained='/path/to/weights.pth'), or pretrained=False."
        ) from None


def load_weights(model: nn.Module, path: Path) -> None:
    state = read_state(path)
    if not isinstance(state, dict):
        raise Damaged(f"{path} contains a {type(state).__name__}, expected the state dict of a model.")
    state = state.get("model", state)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from None


def replace_head(model: nn.Module, n_out: int) -> nn.Module:
    """Replace the last layer by a new one, and return it."""
    layers = [
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear) or is_classifier(layer)
    ]
    kind = type(model).__name__
    if not layers:
        raise ValueError(f"{kind} has no last linear layer to replace: pass Learner a model with your own head.")
    if kind in ("GoogLeNet", "Inception3") and getattr(model, "aux_logits", False):
        raise ValueError(
            f"{kind} has more than one output while training: pass a function that builds it with aux_logits=False."
        )
    name, old = layers[-1]
    if isinstance(old, nn.Conv2d):
        new: nn.Module = nn.Conv2d(old.in_channels, n_out, 1)
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, n_out)
    parent, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(parent), own_name, new)
    return new


def is_classifier(layer: nn.Module) -> bool:
    """Return whether a layer is a 1×1 convolution to ImageNet's classes: SqueezeNet ends with one."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.out_channels == 1000


def halves_and_head(model: nn.Module, head: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of [first half of the body, second half, head].

    The parts of the body are the model's children; a model with few children is split into their children.
    """
    of_head = {id(p) for p in head.parameters()}
    parts = [
        part
        for child in model.children()
        for part in (child.children() if len(list(model.children())) < 5 else (child,))
    ]
    stray = list(model.parameters(recurse=False))
    lists = [stray, *([p for p in part.parameters() if id(p) not in of_head] for part in parts)]
    held = {id(p) for params in lists for p in params}
    lists.append([p for p in model.parameters() if id(p) not in held and id(p) not in of_head])
    lists = [params for params in lists if params]
    half = len(lists) // 2
    return [[p for params in part for p in params] for part in (lists[:half], lists[half:])] + [list(head.parameters())]
