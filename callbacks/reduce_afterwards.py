"""One reduction of all gradients after the backward pass, instead of several during it."""

from __future__ import annotations

from collections.abc import Callable

from learnkit.callbacks.distributed import Distributed
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner


class ReduceAfterwards(Callback):
    """Average all gradients in one collective right before the step, not during the backward pass.

    This is Apex's delay_allreduce; `learn.to_distributed(delay_allreduce=True)` adds this callback.
    """

    order = Distributed.order + 10
    unique = True

    def __init__(self) -> None:
        self.reduce: Callable[[], None] = nothing  # the function that reduces the gradients, during a fit

    def around_fit(self, learn: Learner, run: Run) -> None:
        self.reduce, learn.reduce_gradients = learn.reduce_gradients, nothing
        try:
            run()
        finally:
            learn.reduce_gradients = self.reduce

    def around_batch(self, learn: Learner, run: Run) -> None:
        with learn.no_sync():
            run()

    def before_step(self, learn: Learner) -> None:
        self.reduce()


def nothing() -> None:
    pass
