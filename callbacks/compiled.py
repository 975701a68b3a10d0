"""Keeps a compiled model from being compiled more than once for training and once for evaluation."""

from __future__ import annotations

import torch

from learnkit.hooks import Callback, Run
from learnkit.learner import Learner


class Compiled(Callback):
    """Run batches of another size than the fit's first ones, such as a short last one, without the compiler.

    Compiling for their size would take longer than running them. `learn.compile()` adds this callback.
    """

    order = 900  # the innermost: only the model and the loss are further in
    unique = True

    def __init__(self) -> None:
        self.sizes: dict[bool, int] = {}  # batch size that the model is compiled for, by learn.training

    def before_fit(self, learn: Learner) -> None:
        self.sizes = {}

    def around_forward(self, learn: Learner, run: Run) -> None:
        inputs = learn.inputs.values() if isinstance(learn.inputs, dict) else learn.inputs
        size = next((len(x) for x in inputs if isinstance(x, torch.Tensor) and x.ndim), None)
        if size is None or size == self.sizes.setdefault(learn.training, size):
            return run()
        with torch.compiler.set_stance("force_eager"):
            run()
