"""Save the weights of the best epochs."""

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
    """Save the model's weights after each epoch that is one of the `keep` best; learn.load("best") loads the best ones.

    Args:
        monitor: a name in learn.values: train_loss, valid_loss or a metric, also written as val_loss or valid_accuracy.
        mode: "min" or "max": the direction of improvement. None: "min" for losses and errors, "max" for the rest.
        keep: number of files: path/model_dir/best.pt, then best-2.pt for the second best, and so on.
        name: name of the files, without the number and ".pt".

    Raises:
        ValueError: when `keep` is not a whole number of 1 or more, when `mode` is wrong, or, at the start of the fit,
            when the fit does not measure `monitor`.

    Example:
        >>> learn.fit(5, callbacks=[SaveBest(monitor="accuracy")]).load("best")  # doctest: +SKIP
    """

    in_trials = False

    def __init__(self, monitor: str = "valid_loss", mode: str | None = None, keep: int = 1, name: str = "best") -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}: expected 1 or more.")
        self.monitor, self.keep, self.name = Monitor(monitor, mode, 0.0), keep, name
        self.values: list[float] = []  # values of the saved files, the best first

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
        """Write the new file first, under another name, so that no good file is lost at any time."""
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
