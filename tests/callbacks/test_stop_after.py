"""A fit of so many optimizer steps."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from learnkit import Callback, Learner, SkipStep
from learnkit.callbacks import Checkpoint, StopAfter


def make_learner(*callbacks: Callback, n_batches: int = 3) -> Learner:
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)))] * n_batches
    return Learner((batches, batches[:1]), nn.Linear(3, 2), callbacks=callbacks)


@pytest.mark.parametrize("steps, n_epochs", [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_a_fit_ends_after_exactly_so_many_steps_and_the_last_epoch_is_validated(steps: int, n_epochs: int):
    for learn in (make_learner(StopAfter(steps=steps)).fit(50), make_learner().fit(50, max_steps=steps)):
        assert learn.step == len(learn.recorder.losses) == steps
        assert len(learn.recorder.values) == n_epochs and len(learn.recorder.values[-1]) == 2
        assert learn.recorder.values[-1][1] == pytest.approx(learn.validate()["valid_loss"], rel=1e-12)


def test_a_fit_that_is_shorter_is_left_alone():
    assert make_learner(StopAfter(steps=100)).fit(2).step == 6


def test_max_steps_equals_stopping_by_hand_bit_for_bit():
    runs = []
    for epochs, max_steps in ((9, 3), (1, None)):
        torch.manual_seed(1)
        runs.append(make_learner().fit(epochs, max_steps=max_steps))
    assert runs[0].recorder.losses == runs[1].recorder.losses and runs[0].recorder.values == runs[1].recorder.values


def test_steps_and_not_batches_are_counted():
    class EverySecond(Callback):
        def before_step(self, learn):
            if learn.batch_index % 2:
                raise SkipStep

    n_batches: list[int] = []

    class Count(Callback):
        def before_batch(self, learn):
            n_batches.append(learn.training)

    assert make_learner(EverySecond(), Count(), StopAfter(steps=3), n_batches=10).fit(5).step == 3
    assert sum(n_batches) == 5


def test_the_fit_after_it_is_not_cut():
    learn = make_learner()
    assert learn.fit(5, max_steps=2).step == 2 and learn.fit(2).step == 6


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_a_number_of_steps_that_makes_no_sense_is_refused_at_construction(steps: Any):
    with pytest.raises((TypeError, ValueError), match=f"steps={steps!r}"):
        StopAfter(steps=steps)


# --- seconds -----------------------------------------------------------------
class Sleeps(Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def before_step(self, learn: Learner) -> None:
        time.sleep(self.seconds)


def test_a_fit_ends_when_its_seconds_are_over_and_the_epoch_is_validated():
    learn = make_learner(Sleeps(0.03), StopAfter(seconds=0.1), n_batches=100)
    began = time.monotonic()
    learn.fit(50)
    assert 0.1 <= time.monotonic() - began < 5 and learn.step <= 4 and len(learn.recorder.values) == 1


def test_the_seconds_of_an_interrupted_fit_count():
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_epoch(self, learn: Learner) -> None:
            raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        make_learner(Sleeps(0.05), StopAfter(seconds=0.2), Checkpoint("kept")).fit(9, callbacks=[Die()])
    learn = make_learner(Sleeps(0.05), StopAfter(seconds=0.2), Checkpoint("kept")).fit(9, resume=True)
    assert 3 < learn.step <= 5


def test_both_limits_hold():
    assert make_learner(StopAfter(steps=2, seconds=1000)).fit(5).step == 2
    assert make_learner(Sleeps(0.05), StopAfter(steps=1000, seconds=0.01)).fit(5).step == 1


@pytest.mark.parametrize(
    "options", [{}, dict(seconds=0), dict(seconds=-1.0), dict(seconds=float("nan")), dict(seconds="3")]
)
def test_limits_that_are_none_are_refused(options: Any):
    with pytest.raises(ValueError, match=r"no limit|seconds="):
        StopAfter(**options)
