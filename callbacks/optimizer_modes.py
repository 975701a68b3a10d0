"""Switches optimizers that have a training mode and an evaluation mode."""

from __future__ import annotations

import torch

from learnkit.callbacks.distributed import Distributed
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.optim.groups import set_mode


class OptimizerModes(Callback):
    """Call `learn.opt.train()` and `.eval()`: for schedule-free optimizers, whose weights differ between the two modes.

    Every fit adds it automatically if the optimizer has both methods. The optimizer is in training mode during a
    training pass, except in evaluations within it, and otherwise in evaluation mode. So the averaged weights are the
    ones that are evaluated, saved, compared and exported. An evaluation within a training pass leaves no trace; it
    costs a copy of the weights.

    Example:
        >>> import schedulefree  # doctest: +SKIP
        >>> Learner(data, model, opt_func=schedulefree.AdamWScheduleFree).fit(5, 1e-2)  # doctest: +SKIP
    """

    order = Distributed.order + 10

    def __init__(self) -> None:
        self.training = False

    def around_train(self, learn: Learner, run: Run) -> None:
        set_mode(learn.opt, training=True)
        self.training = True
        try:
            run()
        finally:
            self.training = False
            set_mode(learn.opt, training=False)

    def around_validate(self, learn: Learner, run: Run) -> None:
        if not self.training:
            return run()
        parameters = [p for group in learn.opt.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in parameters]
        set_mode(learn.opt, training=False)
        try:
            run()
        finally:
            set_mode(learn.opt, training=True)
            with torch.no_grad():
                for p, value in zip(parameters, kept, strict=True):
                    p.copy_(value)  # there and back again rounds: 1e-18 in float64
