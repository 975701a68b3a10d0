"""A fit ends when a value no longer gets better."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Learner, accuracy
from learnkit.callbacks import EarlyStopping

NAN = math.nan


class Script:
    """A metric whose value in each epoch is given."""

    def __init__(self, values: list[float], name: str = "score") -> None:
        self.values, self.name, self.n = values, name, 0

    def reset(self) -> None: ...
    def update(self, pred: Tensor, target: Tensor) -> None: ...

    def compute(self) -> float:
        self.n += 1
        return self.values[min(self.n, len(self.values)) - 1]


def make_learner(*callbacks: Any, values: list[float], name: str = "score", valid: bool = True) -> Learner:
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)))]
    return Learner(
        (batches, batches if valid else None), nn.Linear(3, 2), metrics=Script(values, name), callbacks=callbacks
    )


def n_epochs(values: list[float], name: str = "score", **options: Any) -> int:
    learn = make_learner(EarlyStopping(monitor=name, **options), values=values, name=name).fit(10)
    return len(learn.recorder.values)


@pytest.mark.parametrize(
    "values, options, expected",
    [
        ([1, 2, 3, 3, 3, 3], dict(patience=2), 5),
        ([1, 2, 3, 3, 3, 3], dict(patience=1), 4),
        ([5, 4, 3, 2, 1], dict(patience=3), 4),
        ([1, 0, 2, 1, 3, 2, 4, 3, 5, 4], dict(patience=2), 10),
        ([1, 1.05, 1.1, 1.15], dict(patience=2, min_delta=0.2), 3),
        ([1, 1.15, 1.3, 1.5, 1.5, 1.5], dict(patience=2, min_delta=0.2), 5),
        ([3, 2, 1, 1, 1], dict(patience=2, mode="min"), 5),
        ([1, NAN, NAN, 5], dict(patience=2), 3),
        ([NAN, NAN, 1, 1], dict(patience=3), 6),
        ([math.inf, 1, 1], dict(patience=1, mode="min"), 3),
    ],
    ids=[
        "patience 2",
        "patience 1",
        "worse from the start",
        "recovers",
        "min_delta",
        "slowly past min_delta",
        "min",
        "nan is no improvement",
        "nan first",
        "inf is beaten",
    ],
)
def test_the_fit_ends_after_patience_epochs_without_improvement(
    values: list[float], options: dict[str, Any], expected: int
):
    assert n_epochs(values, **options) == expected


@pytest.mark.parametrize(
    "name, falling_is_better",
    [
        ("my_loss", True),
        ("error_rate", True),
        ("mean_squared_error", True),
        ("perplexity", True),
        ("val_rmse", True),
        ("nll", True),
        ("cerebral_score", False),
        ("accuracy", False),
        ("f1", False),
        ("dice", False),
    ],
)
def test_without_a_mode_losses_and_errors_are_to_fall_and_the_rest_to_rise(name: str, falling_is_better: bool):
    falling, rising = [float(v) for v in range(10, 0, -1)], [float(v) for v in range(10)]
    assert n_epochs(falling, name, patience=2) == (10 if falling_is_better else 3)
    assert n_epochs(rising, name, patience=2) == (3 if falling_is_better else 10)


def test_the_default_watches_the_validation_loss():
    learn = make_learner(EarlyStopping(patience=1), values=[0.0]).fit(200, 1e3)
    losses = [row[1] for row in learn.recorder.values]
    assert len(losses) < 200 and losses[-1] >= losses[-2] and losses[:-1] == sorted(losses[:-1], reverse=True)


def test_the_train_loss_can_be_watched_without_validation_data():
    x = torch.randn(4, 3)
    learn = Learner(([(x, x[:, :1])], None), nn.Linear(3, 1), callbacks=EarlyStopping("train_loss", patience=1)).fit(
        5, 0.0
    )
    assert len(learn.recorder.values) == 2


def test_each_fit_begins_anew():
    learn = make_learner(EarlyStopping("score", patience=2), values=[5.0, 1.0, 1.0])
    assert len(learn.fit(10).recorder.values) == 3
    learn.metrics = Learner((learn.data.train_dl, None), nn.Linear(3, 2), metrics=Script([1.0, 2.0, 3.0, 4.0])).metrics
    assert len(learn.fit(4).recorder.values) == 4


def test_the_state_goes_round_and_continues():
    stop = EarlyStopping("score", patience=3)
    make_learner(stop, values=[5.0, 4.0, 3.0]).fit(3)
    state = stop.state_dict()
    assert state == {"best": 5.0, "n_worse": 2}
    other = EarlyStopping("score", patience=3)
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize(
    "name, message",
    [
        ("acuracy", r"'acuracy' to monitor: did you mean accuracy\?.*train_loss, valid_loss, accuracy"),
        ("bleu", r"'bleu' to monitor.*This fit measures train_loss, valid_loss, accuracy"),
    ],
)
def test_an_unknown_name_is_refused_before_the_first_step_with_the_near_one(name: str, message: str):
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)))]
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    learn = Learner((batches, batches), model, metrics=accuracy, callbacks=EarlyStopping(monitor=name))
    with pytest.raises(ValueError, match=message):
        learn.fit(1)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "name, measured", [("val_loss", "valid_loss"), ("valid_score", "score"), ("val_score", "score"), ("score", "score")]
)
def test_names_may_begin_with_valid_or_val(name: str, measured: str):
    stop = EarlyStopping(name, patience=2)
    make_learner(stop, values=[1.0, 2.0, 3.0]).fit(2)
    assert stop.monitor.name == measured and stop.monitor.mode == ("min" if "loss" in name else "max")


def test_it_says_what_it_waited_for_and_which_way(capsys):
    make_learner(EarlyStopping("score", patience=2), values=[5.0, 1.0, 1.0]).fit(9)
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "EarlyStopping: score, which is to rise, has not improved on 5 for 2 epochs"
    )
    with (learn := make_learner(EarlyStopping("score", patience=1), values=[5.0, 1.0])).no_logging():
        learn.fit(9)
    assert capsys.readouterr().out == ""


def test_negative_losses_fall_further():
    assert n_epochs([-1, -2, -3, -4, -4, -4], "my_loss", patience=2) == 6
    assert n_epochs([-1, -2, -2.05, -2.1], "my_loss", patience=2, min_delta=0.2) == 4


def test_a_validation_value_without_validation_data_is_refused_and_says_why():
    with pytest.raises(ValueError, match=r"'valid_loss' to monitor.*there is no validation data"):
        make_learner(EarlyStopping(), values=[1.0], valid=False).fit(1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(patience=0), "patience=0: expected 1 or more"),
        (dict(patience=-2), "patience=-2: expected 1 or more"),
        (dict(mode="best"), "mode='best': expected 'min', 'max' or None"),
        (dict(min_delta=-0.1), r"min_delta=-0\.1: expected a finite number, 0 or more"),
        (dict(min_delta=NAN), "min_delta=nan: expected a finite number"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_construction(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**options)
