"""What a compiled model needs so that it is compiled once for training and once for evaluation."""

from __future__ import annotations

import torch

from learnkit.hooks import Callback, Run
from learnkit.learner import Learner


class Compiled(Callback):
    """Let batches of another size than a fit's first ones, such as a last short one, go through the model as it was
    written.

    Compiling for their size would take longer than they do. What `learn.compile()` adds.
    """

    order = 900  # the innermost: nothing but the model and the loss
    unique = True

    def __init__(self) -> None:
        self.sizes: dict[bool, int] = {}  # of the batches that it is compiled for: in training, and else

    def before_fit(self, learn: Learner) -> None:
        self.sizes = {}

    def around_forward(self, learn: Learner, run: Run) -> None:
        inputs = learn.inputs.values() if isinstance(learn.inputs, dict) else learn.inputs
        size = next((len(x) for x in inputs if isinstance(x, torch.Tensor) and x.ndim), None)
        if size is None or size == self.sizes.setdefault(learn.training, size):
            return run()
        with torch.compiler.set_stance("force_eager"):
            run()
