"""Quick checks of a whole fit: one batch of everything, or a few batches repeatedly. The Learner stays unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from learnkit.callbacks.recorder import Recorder
from learnkit.hooks import Callback, StopTrain
from learnkit.learner import Learner
from learnkit.loop.fit import check_count
from learnkit.trials.trial import unchanged

if TYPE_CHECKING:
    from learnkit.learner import Rate


class FirstBatches:
    """The first n batches of one pass over a loader."""

    def __init__(self, loader: Any, n: int) -> None:
        self.loader, self.n = loader, n

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.n)


class OneOfEach(Callback):
    """One optimizer step per epoch, and one batch per validation."""

    order = Recorder.order - 50

    def before_validate(self, learn: Learner) -> None:
        learn.dl = FirstBatches(learn.dl, 1)  # the Learner restores its own

    def after_step(self, learn: Learner) -> None:
        raise StopTrain


def fast_run(learn: Learner) -> dict[str, float]:
    """Implement `learn.fast_run`."""
    with unchanged(learn):
        learn.fit(1, callbacks=[recorder := Recorder(), OneOfEach()])
        return dict(zip(recorder.metric_names, recorder.values[-1], strict=True))


def overfit(learn: Learner, n: int, steps: int, lr: Rate | None) -> list[float]:
    """Implement `learn.overfit_batches`."""
    check_count("n", n)
    check_count("steps", steps)
    with unchanged(learn):
        batches = list(islice(learn.data.train_dl, n * learn.world_size))
        if len(batches) < n * learn.world_size:
            raise ValueError(
                f"train_dl has {len(batches)} batches, expected {n} for each of {learn.world_size} ranks: use a "
                f"smaller n."
            )
        learn.data = copy.copy(learn.data)
        learn.data.train_dl, learn.data.valid_dl = batches, None
        learn.fit(steps, lr, callbacks=[recorder := Recorder()], max_steps=steps)
        return recorder.losses
