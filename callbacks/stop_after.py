"""Stop a fit after a number of optimizer steps, or after some time."""

from __future__ import annotations

import math
import time
from typing import Any

from learnkit.hooks import Callback, StopFit, StopTrain
from learnkit.learner import Learner


class StopAfter(Callback):
    """Stop the fit after `steps` optimizer steps or after `seconds`, whichever is first.

    The current epoch is still validated. On several ranks all ranks stop after the same step, when the time of the
    first one is over.

    Args:
        steps: number of optimizer steps.
        seconds: time since the start of the fit's first run; when a fit is resumed, the time between two of its runs
            does not count.

    Raises:
        ValueError: when neither is given, or one is not above 0.

    Example:
        >>> learn.fit(100, callbacks=[StopAfter(seconds=3600)])  # doctest: +SKIP
    """

    in_trials = False

    def __init__(self, *, steps: int | None = None, seconds: float | None = None) -> None:
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps={steps!r}: expected a whole number of optimizer steps, 1 or more.")
        if seconds is not None and not (isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds={seconds!r}: expected a number above 0.")
        if steps is None and seconds is None:
            raise ValueError("StopAfter() has no limit: give steps=…, seconds=… or both.")
        self.steps, self.seconds = math.inf if steps is None else steps, math.inf if seconds is None else float(seconds)
        self.began, self.spent = 0.0, 0.0  # clock at the start of this run; seconds of the runs before

    def before_fit(self, learn: Learner) -> None:
        self.began, self.spent = time.monotonic(), 0.0

    def before_epoch(self, learn: Learner) -> None:
        if self.was_over(learn) and not learn.n_items_done:
            raise StopFit

    def before_train(self, learn: Learner) -> None:
        if self.was_over(learn):
            learn.dl = []  # the epoch counts as trained, and is validated

    def was_over(self, learn: Learner) -> bool:
        """Whether the limit was reached before this run, which has resumed from a checkpoint; the time on all ranks is
        rank 0's, from the checkpoint.
        """
        return learn.step >= self.steps or self.spent >= self.seconds

    def after_batch(self, learn: Learner) -> None:
        if learn.training and (learn.step >= self.steps or self.elapsed >= self.seconds):
            raise StopTrain

    def after_epoch(self, learn: Learner) -> None:
        if learn.step >= self.steps or self.elapsed >= self.seconds:
            raise StopFit

    @property
    def elapsed(self) -> float:
        """Seconds that this fit has taken so far."""
        return self.spent + time.monotonic() - self.began if self.seconds < math.inf else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"spent": self.elapsed} if self.seconds < math.inf else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.began, self.spent = time.monotonic(), state["spent"]
