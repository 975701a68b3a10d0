"""A fit of so many optimizer steps."""
from typing import Any

import pytest
import torch
from torch import nn

from learnkit import Callback, Learner, SkipStep
from learnkit.callbacks import StopAfter


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
            if learn.batch_index % 2: raise SkipStep

    n_batches: list[int] = []

    class Count(Callback):
        def before_batch(self, learn): n_batches.append(learn.training)

    assert make_learner(EverySecond(), Count(), StopAfter(steps=3), n_batches=10).fit(5).step == 3
    assert sum(n_batches) == 5


def test_the_fit_after_it_is_not_cut():
    learn = make_learner()
    assert learn.fit(5, max_steps=2).step == 2 and learn.fit(2).step == 6


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "3"])
def test_a_number_of_steps_that_makes_no_sense_is_refused_at_construction(steps: Any):
    with pytest.raises((TypeError, ValueError), match=f"steps={steps!r}"): StopAfter(steps=steps)
