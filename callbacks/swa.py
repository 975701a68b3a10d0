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
    """Average the weights at the end of each of a fit's last epochs, with equal shares (Izmailov et al., 2018).

    Once there is an average, it replaces the model's weights during validation and predictions, and within
    `with swa.swapped(learn):`; afterwards the model has its own weights again. `swa.apply(learn)` makes the average the
    model's weights permanently. Train at a rate that stays high: fit, fit_flat_cos.

    Args:
        start: share of the fit after which averaging begins; 0.75 averages its last quarter.
        update_bn: before each validation, measure batch norm's statistics for the average in a pass over the training
            data (each rank over its own data; rank 0's statistics are used). False: average the statistics as the
            weights.
        saves: let learn.save, SaveBest and export write the average instead of the weights, from the first averaged
            epoch to the next fit.

    Raises:
        ValueError: when `start` is not from 0 to below 1.

    Example:
        >>> learn.fit(20, 0.01, callbacks=[SWA(start=0.75)])  # doctest: +SKIP
    """

    order = EMA.order
    unique = True

    def __init__(self, start: float = 0.75, *, update_bn: bool = False, saves: bool = False) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start={start}: expected a share of the fit, from 0 to below 1.")
        self.start, self.update_bn, self.saves = start, update_bn, saves
        self.average: Average | None = None  # None: averaging has not begun
        self.n_averaged = 0  # number of epochs
        self.is_measured = False  # whether batch norm's statistics were measured with the current average
        self.model: nn.Module | None = None  # of the current or last fit

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
        """Measure batch norm's mean and variance over the training data, each batch with the same weight."""
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
            with uncompiled(learn.model):  # else each batch is compiled again, as it has another momentum
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
        """Return a context manager within which the model has the average's weights; its own while there is none.

        Args:
            learn: the Learner of the fit.
        """
        return nullcontext() if self.average is None else self.average.swapped()

    def apply(self, learn: Learner) -> None:
        """Make the average the model's weights.

        Args:
            learn: the Learner of the fit.

        Raises:
            RuntimeError: when there is no average, because no fit with this SWA has passed its `start`.
        """
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
    """A hook that sets a batch norm's momentum before each call so that its running statistics are the mean over all
    calls. PyTorch's momentum=None does the same, but reads the number of calls from the device each time (2.15).
    """

    def __init__(self) -> None:
        self.n_calls = 0

    def __call__(self, layer: _BatchNorm, _inputs: object) -> None:
        self.n_calls += 1
        layer.momentum = 1 / self.n_calls


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context manager within which a compiled model runs without the compiler."""
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
