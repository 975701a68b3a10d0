"""ReduceLROnPlateau: the rates of torch's scheduler, and those of Keras's rule."""

import math
import random
from typing import Any

import pytest
import torch
from torch import nn

from learnkit import Callback, Learner
from learnkit.callbacks import Checkpoint, ParamScheduler, ReduceLROnPlateau
from learnkit.schedule import linear

NAN = math.nan


class Scripted(Callback):
    """Says what each epoch measured, and keeps the rates of its steps."""

    order = -50

    def __init__(self, values: list[float]) -> None:
        self.script, self.lrs = values, []

    def before_step(self, learn: Learner) -> None:
        self.lrs.append([group["lr"] for group in learn.opt.param_groups])

    def after_validate(self, learn: Learner) -> None:
        learn.values["valid_loss"] = self.script[learn.epoch]


def learner(*callbacks: Callback, **options: Any) -> Learner:
    batches = [(torch.ones(4, 3), torch.zeros(4, 2))]
    return Learner((batches, batches), nn.Linear(3, 2), opt_func=torch.optim.SGD, callbacks=callbacks, **options)


def rates(values: list[float], lr: Any = 1.0, splitter: Any = None, **options: Any) -> list[Any]:
    script = Scripted(values)
    learner(script, ReduceLROnPlateau(**options), splitter=splitter).fit(len(values), lr)
    return [lrs if splitter else lrs[0] for lrs in script.lrs]


def torchs(
    values: list[float], *, patience: int, min_delta: float = 0.0, mode: str = "min", **options: Any
) -> list[float]:
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        opt, mode, patience=patience - 1, threshold=min_delta, threshold_mode="abs", eps=0.0, **options
    )
    found = []
    for value in values:
        found.append(opt.param_groups[0]["lr"])
        scheduler.step(value)
    return found


def test_rates_are_those_of_torch():
    rng = random.Random(0)
    for _ in range(30):
        values = [NAN if rng.random() < 0.05 else round(rng.uniform(-3, 3), 1) for _ in range(14)]
        options = dict(
            patience=rng.randint(1, 4),
            factor=rng.choice([0.1, 0.5]),
            cooldown=rng.randint(0, 3),
            min_lr=rng.choice([0.0, 0.2]),
            mode=rng.choice(["min", "max"]),
            min_delta=rng.choice([0.0, 0.55]),
        )
        assert rates(values, **options) == pytest.approx(torchs(values, **options)), (values, options)


def test_without_a_cooldown_they_are_those_of_keras():
    """Wait rises at each epoch that is not better; at `patience` the rate falls and wait begins again."""
    assert rates([1, 2, 2, 2, 2, 0.5, 0.5, 0.5, 0.5], patience=2, factor=0.5) == [
        1,
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
        0.25,
        0.125,
    ]


def test_groups_keep_their_ratios_until_the_floor():
    found = rates(
        [1.0] * 6, lr=slice(0.01, 1.0), splitter=lambda model: [[model.weight], [model.bias]], patience=1, min_lr=0.05
    )
    assert found == [
        pytest.approx(pair)
        for pair in [(0.01, 1.0), (0.01, 1.0), (0.01, 0.1), (0.01, 0.05), (0.01, 0.05), (0.01, 0.05)]
    ]


def test_it_says_when_the_rate_falls(capsys):
    learner(Scripted([1.0, 1.0, 1.0]), ReduceLROnPlateau(patience=1)).fit(3, 0.1)
    assert (
        "ReduceLROnPlateau: valid_loss, which is to fall, has stalled: the rate falls from 0.1 to 0.01"
        in capsys.readouterr().out
    )


def test_beside_a_schedule_of_the_rate_it_refuses_to_run_and_says_why():
    with pytest.raises(ValueError, match=r"no effect together with a schedule of the rate.*learn\.fit"):
        learner(ReduceLROnPlateau()).fit_one_cycle(2)
    learner(ReduceLROnPlateau(), ParamScheduler({"weight_decay": linear(0.0, 0.1)})).fit(1)


def test_a_resumed_fit_has_the_same_rates():
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_epoch(self, learn: Learner) -> None:
            if learn.epoch == 2:
                raise ConnectionAbortedError

    values, options = [1.0, 2, 2, 2, 2, 2, 2], dict(patience=2, cooldown=1, factor=0.5)
    whole = rates(values, **options)
    first, second = Scripted(values), Scripted(values)
    with pytest.raises(ConnectionAbortedError):
        learner(first, ReduceLROnPlateau(**options), Checkpoint("kept"), Die()).fit(7, 1.0)
    learner(second, ReduceLROnPlateau(**options), Checkpoint("kept")).fit(7, 1.0, resume=True)
    assert [lr for [lr] in first.lrs + second.lrs] == whole


def test_the_state_goes_round():
    reduce, other = ReduceLROnPlateau(patience=3, cooldown=2), ReduceLROnPlateau(patience=3, cooldown=2)
    learner(Scripted([1.0, 2.0, 2.0]), reduce).fit(3)
    assert reduce.state_dict() == {"best": 1.0, "n_worse": 2, "n_cooling": 0}
    other.load_state_dict(reduce.state_dict())
    assert other.state_dict() == reduce.state_dict()


def test_each_fit_begins_anew():
    learn = learner(script := Scripted([1.0] * 3), ReduceLROnPlateau(patience=2, factor=0.5))
    learn.fit(3, 1.0).fit(3, 1.0)
    assert [lr for [lr] in script.lrs] == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(factor=1.0), "between 0 and 1"),
        (dict(patience=0), "patience=0"),
        (dict(cooldown=-1), "cooldown=-1"),
        (dict(min_lr=NAN), "min_lr=nan"),
        (dict(mode="up"), "mode='up'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReduceLROnPlateau(**options)
