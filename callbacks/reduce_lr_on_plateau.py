"""Lower the learning rate when a value no longer improves."""

from __future__ import annotations

import math
from typing import Any

from learnkit.callbacks.param_scheduler import ParamScheduler
from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.logs.monitor import Monitor
from learnkit.logs.say import say
from learnkit.optim.groups import as_number, set_each


class ReduceLROnPlateau(Callback):
    """Multiply every rate by `factor` when `monitor` has not improved for `patience` epochs in a row.

    This is for fits at a constant rate. It cannot be combined with a schedule of the rate, which would replace the rate
    at the next step.

    Args:
        monitor: as in EarlyStopping.
        mode: as in EarlyStopping.
        factor: a number between 0 and 1.
        patience: number of epochs without improvement after which the rate is lowered, 1 or more, as Keras counts:
            torch's patience plus one.
        min_delta: as in EarlyStopping.
        cooldown: number of epochs after a reduction that do not count, as in torch.
        min_lr: no rate becomes lower than this.

    Raises:
        ValueError: when an argument is out of range, or, at the start of the fit, when there is a schedule of the rate
            or the fit does not measure `monitor`.

    Example:
        >>> learn.fit(30, 1e-2, callbacks=[ReduceLROnPlateau(patience=2)])  # doctest: +SKIP
    """

    in_trials = False

    def __init__(
        self,
        monitor: str = "valid_loss",
        mode: str | None = None,
        *,
        factor: float = 0.1,
        patience: int = 3,
        min_delta: float = 0.0,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor}: expected a number between 0 and 1.")
        if patience < 1:
            raise ValueError(f"patience={patience}: expected 1 or more epochs.")
        if cooldown < 0:
            raise ValueError(f"cooldown={cooldown}: expected 0 or more epochs.")
        if not (math.isfinite(min_lr) and min_lr >= 0):
            raise ValueError(f"min_lr={min_lr}: expected a finite number, 0 or more.")
        self.monitor, self.factor, self.patience = Monitor(monitor, mode, min_delta), factor, patience
        self.cooldown, self.min_lr = cooldown, min_lr
        self.n_worse = self.n_cooling = 0

    def before_fit(self, learn: Learner) -> None:
        if any("lr" in cb.schedules for cb in learn.running if isinstance(cb, ParamScheduler)):
            raise ValueError(
                "ReduceLROnPlateau has no effect together with a schedule of the rate, which sets the rate at every "
                "step. Train with learn.fit(epochs, lr) instead of fit_one_cycle or another schedule, or remove the "
                "ReduceLROnPlateau."
            )
        self.monitor.start(learn)
        self.n_worse = self.n_cooling = 0

    def after_epoch(self, learn: Learner) -> None:
        if not self.monitor.is_measured(learn):
            return
        self.n_worse = 0 if self.monitor.improved(learn) else self.n_worse + 1
        if self.n_cooling:
            self.n_cooling, self.n_worse = self.n_cooling - 1, 0
        if self.n_worse >= self.patience:
            self.reduce(learn)

    def reduce(self, learn: Learner) -> None:
        self.n_worse, self.n_cooling = 0, self.cooldown
        before = [
            as_number(group["lr"]) for group in learn.opt.param_groups
        ]  # reads from the device if a rate is a tensor on it
        rates = [max(lr * self.factor, min(lr, self.min_lr)) for lr in before]
        set_each(learn.opt, ["lr"] * len(rates), rates)
        if before[-1] != rates[-1]:
            say(
                learn,
                f"ReduceLROnPlateau: {self.monitor}, has stalled: the rate falls from {before[-1]:.3g} to "
                f"{rates[-1]:.3g}",
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.monitor.best, "n_worse": self.n_worse, "n_cooling": self.n_cooling}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.monitor.best, self.n_worse, self.n_cooling = state["best"], state["n_worse"], state["n_cooling"]
