"""From a fit to a log: what is told, when, and to whom. The callbacks CSVLogger, TensorBoardLogger and so on are a
`Journal` and a `Sink`.

A log goes on where its run did: of a fit that is resumed from a checkpoint, what was logged after that is told anew,
once.
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
    """Where a log goes: three methods of its own, and one that says where it begins. All are called on rank 0 alone."""

    def open(self, after: int | None, names: list[str]) -> None:
        """Begin. `after`: None for a new log; a step, after which everything that is there is to be forgotten. `names`:
        of all values.
        """
        ...

    def config(self, values: dict[str, Any]) -> None:
        """What the run is: plain numbers and strings. Once, at the beginning of each of its fits."""
        ...

    def log(self, values: dict[str, float], step: int) -> None:
        """Values measured when so many optimizer steps were done."""
        ...

    def finish(self) -> None:
        """The fit is over, or has failed."""
        ...


class Journal:
    """What a fit tells a sink: every n steps the loss over the samples since the last time and the rate, every epoch
    all values.

    Values are those of all ranks. Nothing waits for the device: sums stay on it, and a row of steps is logged when its
    numbers have arrived, at the latest before the next row or a checkpoint. Steps count on from fit to fit.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and (
            isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1
        ):
            raise ValueError(
                f"every_n_steps={every_n_steps!r}: expected a whole number, 1 or more, or None for epochs alone."
            )
        self.every = every_n_steps
        self.n_before = 0  # steps of the fits before this one
        self.n_done = 0  # steps of this one
        self.next_step = 0  # of this fit, after which it is time again
        self.total: Any = 0.0  # of the losses since the last time, each by its samples
        self.count: Any = 0.0  # these samples
        self.place: int | None = None  # the step after which a log goes on; None: it begins
        self.epoch_continued: int | None = None  # the epoch within which that is
        self.told: dict[str, Any] | None = None  # what the fit is, as it was at its first step
        self.begin: Callable[[], None] | None = None  # opens the sink, in a fit that has not said a word
        self.in_fit = False
        self.writes = False  # whether this rank does
        self.due: Callable[[], None] | None = (
            None  # what logs a row of steps whose numbers are on their way from the device
        )
        self.readings: list[Reading] = []  # these numbers

    @contextmanager
    def of_fit(self, learn: Learner, sink: Sink) -> Iterator[None]:
        """For the length of a fit. The sink is opened at the first word or checkpoint, when it is known where a resumed
        fit goes on.
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
                    self.tell_due()  # after an error the device may never answer
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
        """Log the last row of steps, where that was not done yet; waits for its numbers."""
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
        """Of this rank: each one sums up its own losses. The log has all up to here, its beginning too: a resumed fit
        goes on after it.
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
        """For another number of ranks: what all had summed up is rank 0's."""
        return {
            **states[0],
            **{name: sum(state[name] for state in states) if rank == 0 else 0.0 for name in ("total", "count")},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Told after a fit began and before its first word, or when it turned out to be over already."""
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
    """What a run is, in plain numbers and strings."""
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
    """With None for what JSON cannot say."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
