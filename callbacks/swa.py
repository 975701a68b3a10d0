"""Stochastic weight averaging."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from learnkit.callbacks.ema import EMA
from learnkit.data.batch import split_batch
from learnkit.data.order import set_seed_and_epoch
from learnkit.devices.nested import to_device
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.optim.average import Average


class SWA(Callback):
    """Average the weights with which the last epochs of a fit end, each alike (Izmailov et al., 2018).

    start       the part of the fit after which averaging begins: 0.75 is its last quarter
    update_bn   measure batch norm's statistics for the average, in a pass over the training data (each rank over its
                own, rank 0's count) before each validation; without, they are averaged like the weights
    saves       let learn.save, SaveBest and export write the average instead of the weights, from its first epoch to
                the next fit

    Once there is an average, the model has it for validation and predictions, and within `with swa.swapped(learn):`;
    its own weights come back afterwards. `swa.apply(learn)` puts it there for good. Train at a rate that stays high:
    fit, fit_flat_cos.

    >>> learn.fit(20, 0.01, callbacks=[SWA(start=0.75)])  # doctest: +SKIP
    """

    order = EMA.order
    unique = True

    def __init__(self, start: float = 0.75, *, update_bn: bool = False, saves: bool = False) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start={start}: expected a part of the fit, from 0 to below 1.")
        self.start, self.update_bn, self.saves = start, update_bn, saves
        self.average: Average | None = None  # None: the fit has not come that far
        self.n_averaged = 0  # epochs
        self.is_measured = False  # whether batch norm's statistics are those of the average as it is
        self.model: nn.Module | None = None  # of the fit under way or last

    def before_fit(self, learn: Learner) -> None:
        self.average, self.n_averaged, self.model = None, 0, learn.model
        if self.saves:
            learn.saved_weights = partial(self.swapped, learn)

    def after_train(self, learn: Learner) -> None:
        if learn.epoch + 1 <= self.start * learn.n_epochs:
            return
        if self.average is None:
            self.average = Average(learn.model)
        self.n_averaged, self.is_measured = self.n_averaged + 1, False
        self.average.update(1 / self.n_averaged)

    def around_validate(self, learn: Learner, run: Run) -> None:
        with self.swapped(learn):
            if self.average is not None and self.update_bn and not self.is_measured:
                self.measure(learn)
            run()

    def measure(self, learn: Learner) -> None:
        """Batch norm's mean and variance over the training data, each batch alike."""
        layers = [
            module for module in learn.model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        momenta = [layer.momentum for layer in layers]
        set_seed_and_epoch(learn.data.train_dl, learn.order_seed, learn.epoch)
        hooks = [layer.register_forward_pre_hook(Cumulative()) for layer in layers]
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.train()
            with uncompiled(learn.model):  # else each batch, with a momentum of its own, would be compiled again
                for batch in learn.data.train_dl if layers else ():
                    learn.inputs, learn.target = split_batch(to_device(batch, learn.device))
                    learn.stages.forward()
        finally:
            for hook in hooks:
                hook.remove()
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.eval().momentum = momentum
        learn.ranks.share([buffer for layer in layers for buffer in layer.buffers()])
        self.is_measured = True

    def swapped(self, learn: Learner) -> AbstractContextManager[None]:
        """Within the block the model has the average's weights; as long as there is none, its own."""
        return nullcontext() if self.average is None else self.average.swapped()

    def apply(self, learn: Learner) -> None:
        """Make the average the model's weights."""
        if self.average is None:
            raise RuntimeError("there is no average yet: fit with this SWA first, beyond its start.")
        self.average.apply()

    def state_dict(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {"n_averaged": self.n_averaged, "is_measured": self.is_measured, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_averaged, self.is_measured = state["n_averaged"], state["is_measured"]
        if state["average"] is not None and self.model is not None:
            self.average = Average(self.model)
            self.average.load_state_dict(state["average"])


class Cumulative:
    """Give a batch norm, before each call of it, the momentum that makes its running statistics the mean over all
    calls. PyTorch's momentum=None does so too, and reads the number of calls from the device each time (2.15).
    """

    def __init__(self) -> None:
        self.n_calls = 0

    def __call__(self, layer: _BatchNorm, _inputs: object) -> None:
        self.n_calls += 1
        layer.momentum = 1 / self.n_calls


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Within the block a model that was compiled runs as it was written."""
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
