"""A table of a model's layers, seen by sending one batch through them."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from learnkit.batch import split_batch, tensors_in, to_device
from learnkit.data import first_batch

if TYPE_CHECKING:
    from learnkit.learner import Learner


def summarize(learn: Learner) -> str:
    """One line a layer in the order of the forward pass, and the totals. The model's state and modes stay as they are."""
    inputs, _ = split_batch(to_device(first_batch(learn.data.train_dl), learn.device))
    rows: list[tuple[str, str, int, bool]] = []

    def see(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            shapes = " ".join(str(tuple(t.shape)) for t in tensors_in(output)) or type(output).__name__
            params = list(module.parameters())
            trained = any(p.requires_grad for p in params)
            rows.append((f"{name} ({type(module).__name__})", shapes, sum(p.numel() for p in params), trained))
        return module.register_forward_hook(hook)

    leaves = [(name or type(m).__name__, m) for name, m in learn.model.named_modules() if not any(m.children())]
    modes = [(m, m.training) for m in learn.model.modules()]
    handles = [see(name, module) for name, module in leaves]
    learn.model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            learn.model(*inputs) if isinstance(inputs, tuple) else learn.model(**inputs)
    finally:
        for handle in handles: handle.remove()
        for module, mode in modes: module.training = mode
    return table(type(learn.model).__name__, [tuple(t.shape) for t in tensors_in(inputs)], rows, learn.model)


def table(title: str, shapes: list[tuple[int, ...]], rows: list[tuple[str, str, int, bool]], model: nn.Module) -> str:
    widths = [max([len(str(row[i])) for row in rows] + [len(head)]) for i, head in enumerate(("layer", "output shape"))]
    lines = [f"{title}, input {' '.join(map(str, shapes))}",
             f"{'layer':{widths[0]}}  {'output shape':{widths[1]}}  {'parameters':>12}  trained"]
    for name, shape, n, trained in rows:
        lines.append(f"{name:{widths[0]}}  {shape:{widths[1]}}  {n:>12,}  {'' if not n else 'yes' if trained else 'no'}".rstrip())
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return "\n".join([*lines, f"{total:,} parameters, {trained:,} trained, {size / 1e6:.1f} MB with buffers"])
