"""A table of a model's layers, recorded while one batch passes through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from learnkit.data.batch import split_batch
from learnkit.data.fork_rng import unmoved
from learnkit.data.loaders import first_batch
from learnkit.devices.nested import in_bytes, tensors_in, to_device

if TYPE_CHECKING:
    from learnkit.learner import Learner


class Row(NamedTuple):
    layer: str
    shape: str  # of its output
    n_parameters: int
    n_bytes: int  # of its output
    trained: bool


def summarize(learn: Learner) -> str:
    """Return one line per layer, in the order of the forward pass, and the totals.

    The model's state and modes do not change.
    """
    inputs, _ = split_batch(to_device(first_batch(learn.data.train_dl), learn.device))
    rows: list[Row] = []

    def see(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors, params = tensors_in(output), list(module.parameters())
            shapes = " ".join(str(tuple(t.shape)) for t in tensors) or type(output).__name__
            rows.append(
                Row(
                    f"{name} ({type(module).__name__})",
                    shapes,
                    sum(p.numel() for p in params),
                    sum(t.numel() * t.element_size() for t in tensors),
                    any(p.requires_grad for p in params),
                )
            )

        return module.register_forward_hook(hook)

    leaves = [(name or type(m).__name__, m) for name, m in learn.model.named_modules() if not any(m.children())]
    modes = [(m, m.training) for m in learn.model.modules()]
    handles = [see(name, module) for name, module in leaves]
    learn.model.eval()
    try:
        with torch.no_grad(), unmoved(learn.device):
            learn.model(*inputs) if isinstance(inputs, tuple) else learn.model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return table(type(learn.model).__name__, [tuple(t.shape) for t in tensors_in(inputs)], rows, learn.model)


def table(title: str, shapes: list[tuple[int, ...]], rows: list[Row], model: nn.Module) -> str:
    lines = [("layer", "output shape", "parameters", "output", "trained")]
    for row in rows:
        trained = "" if not row.n_parameters else "yes" if row.trained else "no"
        lines.append((row.layer, row.shape, f"{row.n_parameters:,}", in_bytes(row.n_bytes), trained))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return "\n".join(
        [
            f"{title}, input {' '.join(map(str, shapes))}",
            *(
                f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
                for a, b, c, d, e in lines
            ),
            f"{total:,} parameters, {trained:,} trained; {in_bytes(size)} with buffers, outputs "
            f"{in_bytes(sum(row.n_bytes for row in rows))}",
        ]
    )
