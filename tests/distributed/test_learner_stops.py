"""What one rank stops, all stop, after the same step, and go on together: many times over, as it is a matter of
time.
"""

import importlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
import torch.distributed as dist
from torch import nn

from learnkit import Callback, DataBunch, Learner
from learnkit.distributed import RankFailed, get_rank, get_world_size, guard, watcher
from learnkit.distributed.stop import StopTogether
from learnkit.hooks import SkipStep, StopEpoch, StopFit, StopTrain

POLLS = (
    watcher.POLL,
    0.01,
    0.003,
    0.01,
    0.003,
)  # seconds between two looks: often the usual ones, more often shorter ones

TIMES, STEPS, EPOCHS = 10, 5, 3  # repetitions; training steps an epoch


class Raises(Callback):
    """Raises at moments given as {(rank or None for all, hook, epoch, batch): signal}; counts epochs and
    validations.
    """

    def __init__(self, moments: dict[tuple[Any, ...], type[Exception]], *, jitter: float = 0.0) -> None:
        self.moments, self.jitter = moments, jitter
        self.n_epochs = self.n_validations = 0

    def signal(self, learn, hook: str) -> None:
        for rank in (learn.rank, None):
            signal = self.moments.get((rank, hook, learn.epoch, learn.batch_index))
            if signal is not None:
                raise signal

    def before_epoch(self, learn):
        self.n_epochs += 1
        self.signal(learn, "before_epoch")

    def after_epoch(self, learn):
        self.signal(learn, "after_epoch")

    def before_batch(self, learn):
        self.signal(learn, "before_batch")

    def after_forward(self, learn):
        self.signal(learn, "after_forward")

    def after_step(self, learn):
        self.signal(learn, "after_step")

    def after_validate(self, learn):
        self.n_validations += 1

    def after_batch(self, learn):
        if self.jitter:
            time.sleep(random.random() * self.jitter)
        if learn.training:
            self.signal(learn, "after_batch")


def fits(moments: Any, times: int = TIMES, **options) -> list[tuple[Any, ...]]:
    """What each of so many fits came to: (steps, epochs, validations, weights)."""
    found = []
    for i in range(times):
        watcher.POLL = POLLS[i % len(POLLS)]
        random.seed(i * 10 + get_rank())
        torch.manual_seed(i)
        data = DataBunch.from_tensors(
            (torch.randn(2 * STEPS * get_world_size(), 3), torch.randn(2 * STEPS * get_world_size(), 1)),
            (torch.randn(5, 3), torch.randn(5, 1)),
            bs=2,
        )
        cb = Raises(moments, jitter=0.001 * (i % 2))
        learn = Learner(data, nn.Linear(3, 1), callbacks=cb).to_distributed()
        with learn.no_logging():
            learn.fit(EPOCHS, **options)
        weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist()
        found.append((learn.step, cb.n_epochs, cb.n_validations, weights))
    return found


def fits_of_all(cases: dict[str, Any]) -> dict[str, Any]:
    return {name: fits(moments) for name, (moments, *_) in cases.items()}


@pytest.fixture
def agreed(ranks):
    """agreed(name, cases): (steps, epochs, validations) of a case's fits, equal on all ranks, as the weights are. All
    cases in one launch.
    """

    def of(name: str, cases: dict[str, Any], n: int = 2) -> list[tuple[Any, ...]]:
        if tuple(cases) not in DONE:
            DONE[tuple(cases)] = ranks(n, fits_of_all, cases, timeout=120)
        shares = [share[name] for share in DONE[tuple(cases)]]
        for share in shares:
            assert share == shares[0]
        assert len(shares[0]) == TIMES
        return [fit[:3] for fit in shares[0]]

    return of


DONE: dict[tuple[str, ...], list[dict[str, Any]]] = {}


# --- all ranks at once -------------------------------------------------------
ALL = {  # moments; steps, epochs, validations
    "StopFit": ({(None, "after_batch", 1, 2): StopFit}, (8, 2, 1)),
    "StopFit after the step": ({(None, "after_step", 1, 2): StopFit}, (8, 2, 1)),
    "StopFit after the epoch": ({(None, "after_epoch", 1, -1): StopFit}, (10, 2, 2)),
    "StopFit at the first batch": ({(None, "after_batch", 0, 0): StopFit}, (1, 1, 0)),
    "StopFit at the last batch": ({(None, "after_batch", 2, 4): StopFit}, (15, 3, 2)),
    "StopEpoch": ({(None, "after_batch", 1, 2): StopEpoch}, (13, 3, 2)),
    "StopTrain": ({(None, "after_batch", 1, 2): StopTrain}, (13, 3, 3)),
    "StopTrain in every epoch": ({(None, "after_batch", epoch, 1): StopTrain for epoch in range(3)}, (6, 3, 3)),
    "StopTrain at an epoch's last batch": ({(None, "after_batch", 1, 4): StopTrain}, (15, 3, 3)),
}


@pytest.mark.parametrize("name", ALL)
def test_what_all_ranks_stop_stops_at_once(agreed, name):
    assert agreed(name, ALL) == [ALL[name][1]] * TIMES


def test_max_steps_are_exact(ranks):
    def fn():
        return {n: fits({}, times=3, max_steps=n) for n in (1, 4, 5, 6, 15)}

    shares = ranks(2, fn)
    assert shares[0] == shares[1]
    for n, found in shares[0].items():
        n_epochs = -(-n // STEPS)
        assert [fit[:3] for fit in found] == [(n, n_epochs, n_epochs)] * 3


# --- one rank ----------------------------------------------------------------
ONE = {  # moments; the fewest and the most steps, epochs, validations: all stop after the same step, or one later
    "StopFit": ({(1, "after_batch", 1, 2): StopFit}, (8, 2, 1), (9, 2, 1)),
    "StopFit of rank 0": ({(0, "after_batch", 1, 2): StopFit}, (8, 2, 1), (9, 2, 1)),
    "StopFit after the step": ({(1, "after_step", 1, 2): StopFit}, (8, 2, 1), (9, 2, 1)),
    "StopFit after the epoch": ({(1, "after_epoch", 1, -1): StopFit}, (10, 2, 2), (10, 2, 2)),
    "StopFit after the last epoch": ({(1, "after_epoch", 2, -1): StopFit}, (15, 3, 3), (15, 3, 3)),
    "StopFit at the first batch": ({(1, "after_batch", 0, 0): StopFit}, (1, 1, 0), (2, 1, 0)),
    "StopFit at an epoch's last batch": ({(1, "after_batch", 1, 4): StopFit}, (10, 2, 1), (10, 2, 2)),
    "StopFit at an epoch's last batch but one": ({(1, "after_batch", 1, 3): StopFit}, (9, 2, 1), (10, 2, 2)),
    "StopFit at the fit's last batch": ({(1, "after_batch", 2, 4): StopFit}, (15, 3, 2), (15, 3, 3)),
    "StopEpoch": ({(1, "after_batch", 1, 2): StopEpoch}, (13, 3, 2), (14, 3, 2)),
    "StopEpoch at an epoch's last batch": ({(1, "after_batch", 1, 4): StopEpoch}, (15, 3, 2), (15, 3, 3)),
    "StopTrain": ({(1, "after_batch", 1, 2): StopTrain}, (13, 3, 3), (14, 3, 3)),
    "StopTrain at an epoch's last batch": ({(1, "after_batch", 1, 4): StopTrain}, (15, 3, 3), (15, 3, 3)),
    "StopTrain in every epoch": ({(1, "after_batch", epoch, 1): StopTrain for epoch in range(3)}, (6, 3, 3), (9, 3, 3)),
    "different ones at different steps": (
        {(0, "after_batch", 1, 1): StopTrain, (1, "after_step", 1, 2): StopFit},
        (7, 2, 1),
        (12, 3, 3),
    ),
    "different ones at one step": (
        {(0, "after_batch", 1, 1): StopTrain, (1, "after_batch", 1, 1): StopEpoch},
        (12, 3, 2),
        (12, 3, 3),
    ),
    "again in the next epoch": (
        {(0, "after_batch", 0, 4): StopTrain, (1, "after_batch", 1, 0): StopTrain},
        (11, 3, 3),
        (12, 3, 3),
    ),
    "at the last batch and the next": (
        {(0, "after_batch", 0, 4): StopFit, (1, "after_batch", 1, 0): StopTrain},
        (5, 1, 0),
        (5, 1, 1),
    ),
}


@pytest.mark.parametrize("name", ONE)
def test_what_one_rank_stops_all_stop(agreed, name):
    _, fewest, most = ONE[name]
    for found in agreed(name, ONE):
        assert all(low <= value <= high for low, value, high in zip(fewest, found, most, strict=True)), found


def test_of_three_ranks_all_stop(agreed):
    moments = {
        (2, "after_batch", 0, 2): StopTrain,
        (0, "after_step", 1, 2): StopTrain,
        (1, "after_batch", 2, 2): StopFit,
    }
    for n_steps, *rest in agreed("", {"": [moments]}, 3):
        assert 9 <= n_steps <= 12 and rest == [3, 2]


# --- what is left of a st ----------------------------------------------------
def test_a_stop_is_forgotten_when_its_fit_is_over_also_within_a_guard_of_the_users(ranks):
    def fn():
        with guard():
            return [
                fit for _ in range(3) for fit in fits({(1, "after_batch", 0, 2): StopFit}, times=1) + fits({}, times=1)
            ]

    shares = ranks(2, fn)
    assert shares[0] == shares[1]
    assert [fit[0] for fit in shares[0][1::2]] == [STEPS * EPOCHS] * 3


class Late:
    """A store whose answer to the guard's thread comes late: meanwhile the main thread gets on."""

    def __init__(self, store: dist.Store, meanwhile: Callable[[], Any]) -> None:
        self.store, self.meanwhile = store, meanwhile

    def set(self, *pair):
        self.store.set(*pair)

    def check(self, keys):
        found = self.store.check(keys)
        self.meanwhile()
        return found


def test_a_promise_that_comes_too_late_is_not_made():
    """The guard's thread has seen the wish, and sleeps; the main thread reaches the same stop by itself, and goes
    on.
    """
    store, stopped = dist.HashStore(), []
    first, second = StopTogether(store, 0, 2), StopTogether(store, 1, 2)
    second.number = first.number  # as if in two processes
    waiting = threading.Thread(target=lambda: stopped.append(first.passed("train")))
    waiting.start()
    while not store.check([first.key("wish")]):
        time.sleep(0.001)
    second.look(Late(store, lambda: stopped.append(second.passed("train"))))  # type: ignore[arg-type]
    waiting.join()
    assert stopped == ["train", "train"]
    assert not second.under_way and second.passed(None) is None


# --- where one rank alone canno ----------------------------------------------
def leave_out_a_step(hook: str, signal: type[Exception]) -> None:
    class LeavesOut(Callback):
        def leave(self, learn):
            if learn.rank == 1 and learn.batch_index == 3:
                raise signal

    setattr(LeavesOut, hook, LeavesOut.leave)
    data = DataBunch.from_tensors((torch.randn(32, 3), torch.randn(32, 1)), bs=2)
    with pytest.raises(
        ValueError, match=r"the ranks disagree(.|\n)*number of steps done.*: rank 1 has \d+; rank 0 has"
    ):
        Learner(data, nn.Linear(3, 1), callbacks=LeavesOut()).to_distributed().fit(1)


@pytest.mark.parametrize("hook", ["after_backward", "before_step"])
@pytest.mark.parametrize("signal", [StopFit, StopEpoch])
def test_a_step_that_one_rank_left_out_is_an_error_on_all(ranks, hook, signal):
    ranks(2, leave_out_a_step, hook, signal)


@pytest.mark.parametrize("signal", [SkipStep, StopTrain])
def test_a_step_that_one_rank_left_out_in_an_epoch_that_goes_on_is_an_error_too(ranks, signal):
    with pytest.raises(RankFailed, match="the ranks have done different numbers of steps in this epoch"):
        ranks(2, leave_out_a_step, "before_step", signal)


@pytest.mark.parametrize("hook", ["before_batch", "after_forward"])
def test_a_rank_that_stops_alone_before_its_backward_is_told_where_to_stop(ranks, hook):
    with pytest.raises(
        RankFailed, match="StopFit was raised before the backward pass of this batch, by rank 1 and not by all"
    ):
        ranks(2, fits, {(1, hook, 1, 3): StopFit}, 1)


def test_one_rank_may_stop_beside_a_bar_that_shows_the_loss_of_all(ranks, monkeypatch):
    monkeypatch.setattr(importlib.import_module("learnkit.callbacks.progress"), "is_interactive", lambda: True)

    def fn():
        data = DataBunch.from_tensors((torch.randn(160, 3), torch.randn(160, 1)), bs=2)
        return (
            Learner(data, nn.Linear(3, 1), callbacks=Raises({(1, "after_step", 0, 24): StopTrain}))
            .to_distributed()
            .fit(1)
            .step
        )

    [step] = set(ranks(2, fn))
    assert 25 <= step <= 27
