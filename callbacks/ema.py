"""An exponential moving average of the weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from learnkit.callbacks.distributed import Distributed
from learnkit.checkpoint.regroup import mean_state
from learnkit.hooks import Callback, Run, run_then
from learnkit.learner import Learner
from learnkit.optim.average import Average


class EMA(Callback):
    """Average the weights and buffers over the steps of a fit, and validate and predict with the average.

    The average starts at the model's weights at the start of the fit (Polyak, 1992). The model keeps its own weights;
    the average replaces them during evaluations and within `with ema.swapped(learn):`. `ema.apply(learn)` makes the
    average the model's weights permanently.

    Args:
        decay: in each optimizer step, average = decay × average + (1 − decay) × weights.
        warmup: start with smaller decays, min(decay, (1 + t) / (10 + t)) in step t, for short fits.
        saves: let learn.save, SaveBest and export write the average instead of the weights, until the next fit.

    Raises:
        ValueError: when `decay` is not between 0 and 1.

    Example:
        >>> learn.fit(5, callbacks=[EMA(decay=0.99)])  # doctest: +SKIP
    """

    order = Distributed.order + 40  # further out than all others that change the weights in a step
    unique = True

    def __init__(self, decay: float = 0.999, *, warmup: bool = False, saves: bool = False) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay}: expected a number from 0 to 1, such as 0.999.")
        self.decay, self.warmup, self.saves = decay, warmup, saves
        self.average: Average | None = None  # None: no fit has begun
        self.n_updates = 0

    def before_fit(self, learn: Learner) -> None:
        self.average, self.n_updates = Average(learn.model), 0
        if self.saves:
            learn.saved_weights = self.average.swapped

    def after_step(self, learn: Learner) -> None:
        assert self.average is not None
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates)) if self.warmup else self.decay
        self.average.update(1 - decay)

    def around_train(self, learn: Learner, run: Run) -> None:
        """Unite the ranks' averages after the training pass: each rank has averaged its own batch norm statistics and
        its own weights.
        """
        assert self.average is not None
        run_then(run, partial(self.average.unite, learn.ranks))

    def around_validate(self, learn: Learner, run: Run) -> None:
        with self.swapped(learn):
            run()

    def swapped(self, learn: Learner) -> AbstractContextManager[None]:
        """Return a context manager within which the model has the average's weights; before a first fit, its own.

        Args:
            learn: the Learner of the fit.
        """
        return nullcontext() if self.average is None else self.average.swapped()

    def apply(self, learn: Learner) -> None:
        """Make the average the model's weights.

        Args:
            learn: the Learner of the fit.

        Raises:
            RuntimeError: when no fit has run with this EMA.
        """
        if self.average is None:
            raise RuntimeError("there is no average yet: fit with this EMA first.")
        self.average.apply()

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        return mean_state(states)

    def state_dict(self) -> dict[str, Any]:
        return {"n_updates": self.n_updates, "average": {} if self.average is None else self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_updates = state["n_updates"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
