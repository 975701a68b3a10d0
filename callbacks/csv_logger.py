"""A log as a table: one line a row, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from learnkit.callbacks.recorder import Recorder
from learnkit.checkpoint.files import as_path
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.logs.journal import Journal
from learnkit.logs.line_file import Lines


class CSVLogger(Callback):
    """Write the values of every epoch, and with `every_n_steps` the loss of every so many steps too, to a CSV file.

    Columns: step, loss (with every_n_steps: the mean over the samples since the row before), epoch, the names of
    learn.values, lr. Steps count on over the fits of a Learner. A fit that is resumed goes on in its file, without the
    rows after its checkpoint; a new one begins the file anew. On several ranks rank 0 writes; values are those of all.

    >>> learn.fit(5, callbacks=[CSVLogger("history.csv")])  # doctest: +SKIP
    """

    order = Recorder.order - 20
    in_trials = False
    per_rank = True

    def __init__(self, path: str | Path = "history.csv", *, every_n_steps: int | None = None) -> None:
        self.columns: list[str] = []
        self.lines, self.journal = (
            Lines(as_path(path), step_of_row, lambda line: epoch_of_row(line, self.columns)),
            Journal(every_n_steps),
        )

    def around_fit(self, learn: Learner, run: Run) -> None:
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
        self.columns = ["step", *names]
        if not self.lines.open(after, epoch=self.journal.epoch_continued):
            self.lines.add(as_row(self.columns))

    def config(self, values: dict[str, Any]) -> None:
        "A table has no place for it."

    def log(self, values: dict[str, float], step: int) -> None:
        row = {"step": step, **values}
        self.lines.add(as_row([row.get(name, "") for name in self.columns]))

    def finish(self) -> None:
        self.lines.close()


def as_row(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def step_of_row(line: str) -> int | None:
    first = line.split(",", 1)[0]
    return None if first == "step" else int(first)


def epoch_of_row(line: str, columns: list[str]) -> int | None:
    cell = line.rstrip("\n").split(",")[columns.index("epoch")]
    return int(float(cell)) if cell else None
