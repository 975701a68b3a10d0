"""A log as JSON lines: one object a line, for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learnkit.callbacks.recorder import Recorder
from learnkit.checkpoint.files import as_path
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.logs.journal import Journal, as_json_numbers
from learnkit.logs.line_file import Lines


class JSONLogger(Callback):
    """Write one JSON object a line: {"step": 0, "config": …} for a fit, then {"step": …, "epoch": …, "valid_loss": …}
    for every epoch.

    every_n_steps   also {"step": …, "loss": …, "lr": …}, the loss being the mean over the samples since the line before

    What is no finite number is null. Steps count on over the fits of a Learner. A fit that is resumed goes on in its
    file, without the lines after its checkpoint; a new one begins the file anew. On several ranks rank 0 writes.

    >>> learn.fit(5, callbacks=[JSONLogger("run.jsonl", every_n_steps=50)])  # doctest: +SKIP
    """

    order = Recorder.order - 20
    in_trials = False
    per_rank = True

    def __init__(self, path: str | Path = "history.jsonl", *, every_n_steps: int | None = None) -> None:
        self.lines, self.journal = Lines(as_path(path), step_of_record, epoch_of_record), Journal(every_n_steps)
        self.after: int | None = None

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
        self.lines.open(after, epoch=self.journal.epoch_continued)
        self.after = after

    def config(self, values: dict[str, Any]) -> None:
        self.lines.add(json.dumps({"step": self.after or 0, "config": values}))

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.add(json.dumps({"step": step, **as_json_numbers(values)}))

    def finish(self) -> None:
        self.lines.close()


def step_of_record(line: str) -> int | None:
    return json.loads(line)["step"]


def epoch_of_record(line: str) -> int | None:
    return json.loads(line).get("epoch")
