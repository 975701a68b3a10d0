"""Stop a fit when a value no longer improves."""

from __future__ import annotations

from typing import Any

from learnkit.hooks import Callback, StopFit
from learnkit.learner import Learner
from learnkit.logs.monitor import Monitor
from learnkit.logs.say import say


class EarlyStopping(Callback):
    """Stop the fit when `monitor` has not improved by more than `min_delta` for `patience` epochs in a row.

    An epoch that StopEpoch ended before it was measured does not count.

    Args:
        monitor: a name in learn.values: train_loss, valid_loss or a metric, also written as val_loss or valid_accuracy.
        mode: "min" or "max": the direction of improvement. None: "min" for losses and errors, "max" for the rest; the
            message at the stop names it.
        patience: number of epochs without improvement after which the fit stops, 1 or more.
        min_delta: smallest change that counts as an improvement, 0 or more.

    Raises:
        ValueError: when `patience`, `mode` or `min_delta` is out of range, or, at the start of the fit, when the fit
            does not measure `monitor`.

    Example:
        >>> stop = EarlyStopping(monitor="accuracy", patience=2)
    """

    in_trials = False

    def __init__(
        self, monitor: str = "valid_loss", mode: str | None = None, patience: int = 3, min_delta: float = 0.0
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience}: expected 1 or more epochs.")
        self.monitor, self.patience = Monitor(monitor, mode, min_delta), patience
        self.n_worse = 0

    def before_fit(self, learn: Learner) -> None:
        self.monitor.start(learn)
        self.n_worse = 0

    def after_epoch(self, learn: Learner) -> None:
        if not self.monitor.is_measured(learn):
            return
        self.n_worse = 0 if self.monitor.improved(learn) else self.n_worse + 1
        if self.n_worse < self.patience:
            return
        best = (
            "was never a number"
            if self.monitor.best is None
            else f"has not improved on {self.monitor.best:.6g} for {self.n_worse} epochs"
        )
        say(learn, f"EarlyStopping: {self.monitor}, {best}")
        raise StopFit

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.monitor.best, "n_worse": self.n_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.monitor.best, self.n_worse = state["best"], state["n_worse"]
