"""A log for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learnkit.callbacks.recorder import Recorder
from learnkit.checkpoint.files import as_path
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.logs.journal import Journal


class TensorBoardLogger(Callback):
    """Write scalars for TensorBoard: the values of every epoch, and the loss and rate of every n-th step.

    The x axis counts the optimizer steps of all fits of a Learner; the settings are written as a text. On several ranks
    rank 0 writes. Needs the package tensorboard, which the extra 'tensorboard' installs.

    Args:
        dir: the run's folder. A resumed fit continues in it, and TensorBoard hides the values after its checkpoint. A
            new fit in a folder that already has a run also starts from step 0: use a separate folder for each run.
        every_n_steps: also write the loss and the rate of every n-th step. None: only epochs.

    Raises:
        ImportError: at the start of the fit, when tensorboard is not installed.

    Example:
        >>> learn.fit(5, callbacks=[TensorBoardLogger("runs/first", every_n_steps=50)])  # doctest: +SKIP
    """

    order = Recorder.order - 20
    in_trials = False
    per_rank = True

    def __init__(self, dir: str | Path = "runs/learnkit", *, every_n_steps: int | None = None) -> None:
        self.dir, self.journal = as_path(dir), Journal(every_n_steps)
        self.writer: Any = None

    def around_fit(self, learn: Learner, run: Run) -> None:
        summary_writer()  # raises before training when the package is missing
        with self.journal.of_fit(learn, self):
            run()

    def after_step(self, learn: Learner) -> None:
        self.journal.step(learn, self)

    def after_epoch(self, learn: Learner) -> None:
        self.journal.epoch(learn, self)

    def state_dict(self) -> dict[str, Any]:
        return self.journal.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.journal.load(state)

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        return self.journal.regroup(states, rank)

    # --- the sink ------------------------------------------------------------
    def open(self, after: int | None, names: list[str]) -> None:
        self.writer = summary_writer()(str(self.dir), purge_step=0 if after is None else after + 1)

    def config(self, values: dict[str, Any]) -> None:
        self.writer.add_text("config", "```json\n" + json.dumps(values, indent=1) + "\n```", self.journal.place or 0)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoardLogger needs tensorboard, which is not installed: install it, or the extra 'tensorboard' of "
            "this library."
        ) from error
    return SummaryWriter
