"""lr_find: the sweep equals a loop by hand, its readings those of their definitions, and nothing is left of it."""

import copy
import math
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import ParamScheduler
from learnkit.schedule import constant
from learnkit.trials.lr_find import RateFinder, longest_fall, smoothed, steepest, valley


def learner(n=64, bs=8, **options) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(n, 4)
    data = DataBunch.from_tensors((x, (x[:, 0] > 0).long()), (x[:8], (x[:8, 0] > 0).long()), bs=bs)
    return Learner(data, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), **options)


def by_hand(lrs: list[float], bs=8) -> list[float]:
    """The losses of plain SGD steps on the same batches with these rates."""
    learn = learner(bs=bs)
    model, losses, loader = copy.deepcopy(learn.model), [], learn.data.train_dl
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    while True:
        for x, y in loader:
            if len(losses) == len(lrs):
                return losses
            opt.param_groups[0]["lr"] = lrs[len(losses)]
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())


sgd = partial(learner, opt_func=torch.optim.SGD, wd=0.0)


@pytest.mark.parametrize(
    "sweep, rates",
    [
        ("exponential", [1e-3 * 10 ** (3 * k / 19) for k in range(20)]),
        ("linear", [1e-3 + (1 - 1e-3) * k / 19 for k in range(20)]),
    ],
)
def test_a_sweep_equals_a_loop_by_hand_over_several_epochs(sweep, rates):
    found = sgd().lr_find(1e-3, 1.0, 20, sweep=sweep)
    assert found.lrs == pytest.approx(rates)
    assert found.raw_losses == pytest.approx(by_hand(rates), rel=1e-5)


def test_losses_are_fastais_debiased_average():
    found = sgd().lr_find(1e-3, 1.0, 20)
    average = 0.0
    for k, (raw, smooth) in enumerate(zip(found.raw_losses, found.losses, strict=True), 1):
        average = 0.98 * average + 0.02 * raw
        assert smooth == pytest.approx(average / (1 - 0.98**k))


def test_it_stops_where_the_smoothed_loss_is_more_than_four_times_the_best():
    found = sgd().lr_find(1e-3, 1e6, 60)
    best = min(found.losses)
    assert found.diverged and len(found.lrs) < 60
    assert found.losses[-1] > 4 * best or len(found.losses) < 60
    assert all(loss <= 4 * min(found.losses[: i + 1]) for i, loss in enumerate(found.losses[:-1]))


def test_without_stop_div_only_what_is_no_number_ends_it():
    found = sgd().lr_find(1e-3, 30.0, 60, stop_div=False)
    assert len(found.lrs) == 60 and not found.diverged
    nowhere = sgd().lr_find(1e-3, 1e30, 60, stop_div=False)
    assert len(nowhere.lrs) < 60 and all(map(math.isfinite, nowhere.raw_losses))


def test_negative_losses_are_no_divergence():
    learn = learner(loss_func=lambda pred, target: pred.square().mean() * 1e-3 - 5)
    assert len(learn.lr_find(1e-6, 1e-3, 30).lrs) == 30


# --- nothing is left of it ---------------------------------------------------
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("fitted", [False, True])
def test_the_learner_is_bit_for_bit_as_it_was(fitted, fails):
    class Fails(Callback):
        def after_step(self, learn):
            if fails and learn.step == 7:
                raise ConnectionError

    with_sweep, without = learner(callbacks=Fails()), learner()
    for learn in (with_sweep, without):
        torch.manual_seed(1)
        if fitted:
            learn.fit(1, max_steps=5)
    if fails:
        with pytest.raises(ConnectionError):
            with_sweep.lr_find(num_it=20)
    else:
        with_sweep.lr_find(num_it=20)
    assert (with_sweep.opt is None) == (not fitted) and len(with_sweep.callbacks) == 3
    for learn in (with_sweep, without):
        learn.fit_one_cycle(1, max_steps=6)
    assert (
        with_sweep.recorder.losses == without.recorder.losses and with_sweep.recorder.values == without.recorder.values
    )


def test_a_schedule_of_the_learners_own_does_not_overrule_the_sweep():
    found = sgd(callbacks=ParamScheduler({"lr": constant(5.0)})).lr_find(1e-3, 1.0, 20)
    assert found.raw_losses == pytest.approx(by_hand(found.lrs), rel=1e-5)


def test_nothing_is_printed_and_nothing_validated(capsys):
    class NoValidation(Callback):
        def before_validate(self, learn):
            raise AssertionError

    learner(callbacks=NoValidation()).lr_find(num_it=20)
    assert capsys.readouterr().out == ""


# --- readings ----------------------------------------------------------------
def test_the_longest_fall_is_that_of_all_subsequences():
    for seed in range(20):
        losses = torch.rand(9, generator=torch.Generator().manual_seed(seed)).tolist()
        falls = [
            c
            for n in range(1, 10)
            for c in combinations(range(9), n)
            if all(losses[a] > losses[b] for a, b in pairwise(c))
        ]
        length = max(map(len, falls))
        assert longest_fall(losses) == (length, min(c[-1] for c in falls if len(c) == length))


def test_the_valley_is_half_way_down_a_fall():
    """As fastai 2 counts: a third and half a third behind the place before the fall's first member."""
    fall = [1.0] * 10 + [1 - k / 30 for k in range(1, 31)] + [5.0] * 5
    length, end = longest_fall(fall)
    assert (length, end) == (31, 39) and valley(fall) == 39 - 31 + 10 + 5


def test_the_steepest_place_is_that_of_the_derivative():
    lrs = [10 ** (k / 10) for k in range(30)]
    losses = [-math.tanh(k / 10 - 1.7) for k in range(30)]
    assert steepest(lrs, losses) in (16, 17)


def test_suggestions_are_read_without_the_ends_and_the_minimum_by_ten():
    lrs = [10 ** (-5 + k / 20) for k in range(100)]
    raw = [3 - 2 / (1 + math.exp((50 - k) / 8)) + math.exp((k - 80) / 4) for k in range(100)]
    found = RateFinder(lrs, raw, diverged=True)
    inner, losses = lrs[10:95], smoothed(raw)[10:95]
    assert found.suggestions["minimum"] == inner[losses.index(min(losses))] / 10
    assert found.suggestion == found.suggestions["valley"] < found.suggestions["minimum"] * 10
    assert all(inner[0] / 10 <= rate <= inner[-1] for rate in found.suggestions.values())


def test_a_suggested_rate_trains():
    learn = learner()
    rate = learn.lr_find(num_it=80).suggestion
    assert 1e-4 < rate < 1
    learn.fit_one_cycle(10, rate)
    assert learn.recorder.values[-1][0] < 0.5 * learn.recorder.losses[0]


def test_a_sweep_that_ended_at_once_says_why_there_is_no_suggestion():
    found = sgd().lr_find(1e5, 1e9, 50)
    with pytest.raises(ValueError, match=r"ended after \d+ steps.*Start lower"):
        found.suggestion  # noqa: B018
    assert "too few" in repr(found)
    found.plot()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(start_lr=1.0, end_lr=0.1), "the lower one first"),
        (dict(start_lr=0.0), "two rates above 0"),
        (dict(num_it=0), "num_it=0"),
        (dict(sweep="quadratic"), "'exponential' or 'linear'"),
        (dict(end_lr=math.nan), "end_lr=nan"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learner().lr_find(**options)


def test_lr_scale_of_a_group_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    opt = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr_scale": 0.5}, {"params": model[1].parameters()}], lr=0.1
    )
    seen = []

    class See(Callback):
        order = 50

        def before_step(self, learn):
            seen.append([group["lr"] for group in learn.opt.param_groups])

    data = learner().data
    Learner(data, model, opt_func=opt, callbacks=See()).lr_find(1e-3, 1.0, 12)
    assert seen[0] == pytest.approx([0.5e-3, 1e-3]) and seen[-1] == pytest.approx([0.5, 1.0])
