"""A fit of so many optimizer steps."""
from __future__ import annotations

from learnkit.hooks import Callback, StopFit, StopTrain
from learnkit.learner import Learner


class StopAfter(Callback):
    """End the fit after `steps` optimizer steps; the epoch under way is still validated.

    >>> learn.fit(100, callbacks=[StopAfter(steps=10)])  # doctest: +SKIP
    """
    in_trials = False

    def __init__(self, *, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: expected a whole number of optimizer steps, 1 or more.")
        self.steps = steps

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step >= self.steps: raise StopTrain

    def after_epoch(self, learn: Learner) -> None:
        if learn.step >= self.steps: raise StopFit
