"""From a fit to a log: what is logged, when and where.

CSVLogger, TensorBoardLogger and so on are a `Journal` and a `Sink`. A log continues where its run continues: if a fit
is resumed from a checkpoint, entries after the checkpoint are replaced and appear once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from learnkit.data.loaders import n_batches
from learnkit.devices.transfer import Reading
from learnkit.hooks import ControlFlow
from learnkit.optim.groups import as_number

if TYPE_CHECKING:
    from learnkit.learner import Learner


class Sink(Protocol):
    """Where a log is written. All four methods are called on rank 0 only."""

    def open(self, after: int | None, names: list[str]) -> None:
        """Open the log.

        Args:
            after: None for a new log; a step for an existing one, whose entries after this step must be removed
            names: the names of all values
        """
        ...

    def config(self, values: dict[str, Any]) -> None:
        """Log the configuration of the run: plain numbers and strings.

        Called once, at the beginning of each fit of the run.
        """
        ...

    def log(self, values: dict[str, float], step: int) -> None:
        """Log values.

        Args:
            values: values by name
            step: number of optimizer steps done when they were measured
        """
        ...

    def finish(self) -> None:
        """Close the log: the fit has ended or failed."""
        ...


class Journal:
    """Log a fit to a sink: every n steps the loss and the rate, every epoch all values.

    The loss is the mean over the samples since the last entry. Values are those of all ranks. Nothing waits for the
    device: sums stay on it, and an entry is logged when its numbers have arrived, at the latest before the next entry
    or a checkpoint. The step number continues from fit to fit.

    Args:
        every_n_steps: number of steps between two entries; None: log epochs only
    """

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and (
            isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1
        ):
            raise ValueError(
                f"every_n_steps={every_n_steps!r}: expected an integer, 1 or more, or None to log epochs only."
            )
        self.every = every_n_steps
        self.n_before = 0  # steps of the fits before this one
        self.n_done = 0  # steps of this one
        self.next_step = 0  # the step of this fit after which the next entry is logged
        self.total: Any = 0.0  # sum of the losses since the last entry, weighted by samples
        self.count: Any = 0.0  # number of these samples
        self.place: int | None = None  # the step after which an existing log continues; None: a new log
        self.epoch_continued: int | None = None  # the epoch that contains this step, if it continues
        self.told: dict[str, Any] | None = None  # the configuration at the first step
        self.begin: Callable[[], None] | None = None  # opens the sink, if this fit has logged nothing yet
        self.in_fit = False
        self.writes = False  # whether this rank writes the log
        self.due: Callable[[], None] | None = None  # logs an entry whose numbers are being copied from the device
        self.readings: list[Reading] = []  # these numbers

    @contextmanager
    def of_fit(self, learn: Learner, sink: Sink) -> Iterator[None]:
        """Log one fit.

        The sink is opened at the first entry or checkpoint, because only then it is known where a resumed fit
        continues.
        """
        self.writes, self.total, self.count = learn.rank == 0, 0.0, 0.0
        self.n_done, self.next_step = learn.step, learn.step + (self.every or 0)
        self.place = self.n_before + learn.step if learn.resumed is not None else (self.n_before or None)
        within = learn.resumed is not None and learn.n_items_done > 0 and learn.step > 0
        self.epoch_continued = learn.epoch if within else None
        self.begin, self.told = partial(self.open, learn, sink), None
        self.in_fit, self.due, self.readings = True, None, []
        failed = True
        try:
            yield
            failed = False
        except ControlFlow:
            failed = False
            raise
        finally:
            try:
                if not failed or self.has_arrived():
                    self.tell_due()  # after an error the device may never respond
            finally:
                if self.begin is None and self.writes:
                    sink.finish()
                self.in_fit, self.begin = False, None
                self.n_before += self.n_done

    def open(self, learn: Learner, sink: Sink) -> None:
        self.begin = None
        if not self.writes:
            return
        sink.open(self.place, column_names(learn, steps=self.every is not None))
        if learn.resumed is None:
            sink.config(self.told or config_of(learn))

    def step(self, learn: Learner, sink: Sink) -> None:
        self.n_done = learn.step
        if self.told is None:
            self.told = config_of(learn)
        if self.every is None:
            return
        if self.readings and self.has_arrived():
            self.tell_due()
        n = learn.count(learn.inputs, learn.target) if learn.in_step is None else learn.in_step
        self.total, self.count = self.total + learn.loss.detach() * n, self.count + n
        if learn.step >= self.next_step:
            self.tell_step(learn, sink)

    def tell_step(self, learn: Learner, sink: Sink) -> None:
        assert self.every is not None
        self.next_step = learn.step + self.every
        total, count = learn.ranks.all_sum([self.total, self.count])
        self.total, self.count = 0.0, 0.0
        self.tell_due()  # in the order of their steps
        if self.begin is not None:
            self.begin()
        if not self.writes:
            return
        lr, step = learn.opt.param_groups[-1]["lr"], self.n_before + learn.step
        values = {"loss": total / count, "lr": lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)}
        readings = {name: Reading(value.reshape(1)) for name, value in values.items()}
        self.readings = list(readings.values())
        self.due = lambda: sink.log({name: reading.tolist()[0] for name, reading in readings.items()}, step)
        if self.has_arrived():
            self.tell_due()

    def has_arrived(self) -> bool:
        return all(reading.has_arrived for reading in self.readings)

    def tell_due(self) -> None:
        """Log the pending entry, if there is one; this waits for its numbers."""
        due, self.due, self.readings = self.due, None, []
        if due is not None:
            due()

    def epoch(self, learn: Learner, sink: Sink) -> None:
        self.tell_due()
        if self.begin is not None:
            self.begin()
        lr = as_number(learn.opt.param_groups[-1]["lr"])
        if self.writes:
            sink.log({"epoch": learn.epoch, **learn.values, "lr": lr}, self.n_before + learn.step)

    # --- checkpoints ---------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Return the state of this rank; each rank sums its own losses.

        Everything up to this point, including the beginning, is logged first: a resumed fit continues after it.
        """
        if self.begin is not None:
            self.begin()
        self.tell_due()
        return {
            "n_before": self.n_before,
            "n_done": self.n_done,
            "next_step": self.next_step,
            "total": self.total,
            "count": self.count,
        }

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Return the state for another number of ranks: rank 0 gets the sums of all ranks."""
        return {
            **states[0],
            **{name: sum(state[name] for state in states) if rank == 0 else 0.0 for name in ("total", "count")},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Load a state.

        Called after a fit began and before its first entry, or when the fit turned out to be finished already.
        """
        if not self.in_fit:
            self.n_before = state["n_before"] + state["n_done"]
            return
        if self.place is not None:
            self.place += state["n_before"] - self.n_before
        self.n_before, self.n_done, self.next_step = state["n_before"], state["n_done"], state["next_step"]
        self.total, self.count = state["total"], state["count"]


def column_names(learn: Learner, *, steps: bool) -> list[str]:
    return [*(["loss"] if steps else []), "epoch", *learn.value_names, "lr"]


def config_of(learn: Learner) -> dict[str, Any]:
    """Return the configuration of a run as plain numbers and strings."""
    loss = learn.loss_func
    group = learn.opt.param_groups[-1]
    return {
        "model": type(learn.model).__name__,
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "optimizer": type(learn.opt).__name__,
        "lr": as_number(group["lr"]),
        "weight_decay": as_number(group.get("weight_decay", 0.0)) or as_number(group.get("wd", 0.0)),
        "loss": "default" if loss is None else getattr(loss, "__name__", type(loss).__name__),
        "epochs": learn.n_epochs,
        "steps": learn.n_steps or -1,
        "batches": n_batches(learn.data.train_dl) or -1,
        "batch_size": getattr(learn.data.train_dl, "batch_size", None) or -1,
        "world_size": learn.world_size,
        "seed": -1 if learn.seed is None else learn.seed,
        "device": str(learn.device),
        "torch": str(torch.__version__),
    }


def as_json_numbers(values: dict[str, float]) -> dict[str, float | None]:
    """Return the values with None for those that JSON cannot represent."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
