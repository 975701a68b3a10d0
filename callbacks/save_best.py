"""Keeping the weights of the best epochs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from learnkit.checkpoint.files import as_path
from learnkit.checkpoint.weights import write_weights
from learnkit.devices.dtensor import whole_on_main
from learnkit.devices.wrappers import plain_state
from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.logs.monitor import Monitor


class SaveBest(Callback):
    """Write the model's weights after each epoch that is among the best `keep`: learn.load("best") takes the best ones
    back.

    monitor     a name of learn.values: train_loss, valid_loss or a metric's, also as val_loss or valid_accuracy
    mode        "min" or "max": which way is better. None: "min" for losses and errors, "max" for the rest
    keep        how many: path/model_dir/best.pt, and best-2.pt, … for the second best and so on

    >>> learn.fit(5, callbacks=[SaveBest(monitor="accuracy")]).load("best")  # doctest: +SKIP
    """

    in_trials = False

    def __init__(self, monitor: str = "valid_loss", mode: str | None = None, keep: int = 1, name: str = "best") -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}: expected 1 or more.")
        self.monitor, self.keep, self.name = Monitor(monitor, mode, 0.0), keep, name
        self.values: list[float] = []  # of the files, the best one's first

    def before_fit(self, learn: Learner) -> None:
        self.monitor.start(learn)
        self.values = []

    def after_epoch(self, learn: Learner) -> None:
        if not self.monitor.is_measured(learn):
            return
        value = learn.values[self.monitor.name]
        place = sum(kept <= value if self.monitor.mode == "min" else kept >= value for kept in self.values)
        if place >= self.keep or math.isnan(value):
            return
        with learn.saved_weights():
            state = {"model": whole_on_main(plain_state(learn.model), learn.rank)}
            learn.ranks.on_main(lambda: self.write(learn.path / learn.model_dir, place, state), f"write {self.name}.pt")
        self.values = [*self.values[:place], value, *self.values[place:]][: self.keep]

    def write(self, folder: Path, place: int, state: dict[str, Any]) -> None:
        """The new one first, under another name, so that at no time a good one is lost."""
        write_weights(folder / as_path(f"{self.name}-new.pt"), state)
        for i in reversed(range(place, min(len(self.values), self.keep - 1))):
            self.file(folder, i).replace(self.file(folder, i + 1))
        (folder / as_path(f"{self.name}-new.pt")).replace(self.file(folder, place))

    def file(self, folder: Path, place: int) -> Path:
        return folder / as_path(f"{self.name}{f'-{place + 1}' if place else ''}.pt")

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = list(state["values"])
