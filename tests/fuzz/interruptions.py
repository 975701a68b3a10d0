"""What ends a fit before its time, at a hook and a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from learnkit import Callback, Learner, StopEpoch, StopFit, StopTrain
from tests.fuzz.part import Part, part


class Broken(RuntimeError):
    """What a drawn hook raises."""


HOOKS = (
    "before_fit",
    "before_epoch",
    "before_train",
    "before_batch",
    "before_forward",
    "after_forward",
    "before_backward",
    "after_backward",
    "before_step",
    "after_step",
    "after_batch",
    "after_train",
    "before_validate",
    "after_validate",
    "after_epoch",
    "after_fit",
)

# ends        the process does not come back from the fit
# saves       first it keeps a checkpoint
INTERRUPTIONS: dict[str, Part] = {
    "raise": part("raise Broken", "ends", weight=3),
    "raise on all": part("raise Broken", "ends", "all", weight=2),
    "kill": part("os.kill(os.getpid(), signal.SIGKILL)", "ends", weight=2),
    "SIGTERM": part("os.kill(os.getpid(), signal.SIGTERM)", "ends", "saves", weight=3),
    "SIGINT": part("os.kill(os.getpid(), signal.SIGINT)", "ends", "saves"),
    "SIGTERM on all": part("os.kill(os.getpid(), signal.SIGTERM)", "ends", "saves", "all"),
    "SIGUSR1 on all": part("os.kill(os.getpid(), signal.SIGUSR1)", "saves", "all", weight=0.5),
    "SIGUSR1": part("os.kill(os.getpid(), signal.SIGUSR1)", "saves"),
    "exit": part("os._exit(3)", "ends", weight=0.5),
}


def signal_of(kind: str) -> int:
    return signal.SIGKILL if kind == "kill" else getattr(signal, kind.split()[0])


def strike(kind: str) -> None:
    if kind.startswith("raise"):
        raise Broken
    if kind == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal_of(kind))


def interrupt(
    kind: str, hook: str, step: int, rank: int | None, *, early: bool = False, fit: int = 1, note: Path | None = None
) -> Callback:
    """Strikes once, at the first call of `hook` when `step` steps of the `fit`-th fit are done, and writes a note; on
    `rank` alone, or on all. Hooks are found in the class: it is made for this one.
    """

    def strike_once(self: Any, learn: Learner) -> None:
        if self.struck or learn.step < step or learn.n_fits < fit or rank not in (None, learn.rank):
            return
        self.struck = True
        if note is not None:
            note.touch()
        strike(kind)

    return type(
        "Interrupt",
        (Callback,),
        {hook: strike_once, "order": -200 if early else 200, "struck": False, "in_trials": False},
    )()


STOPS = {"StopFit": StopFit, "StopEpoch": StopEpoch, "StopTrain": StopTrain}


class Stop(Callback):
    """A user's own end: part of the fit, also where it is never interrupted. `alone`: only the last rank raises it, and
    all end soon after.
    """

    order = 150
    in_trials = False

    def __init__(self, signal: str, step: int, *, alone: bool = False) -> None:
        self.signal, self.step, self.alone = signal, step, alone

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step == self.step and (not self.alone or learn.rank == learn.world_size - 1):
            raise STOPS[self.signal]
