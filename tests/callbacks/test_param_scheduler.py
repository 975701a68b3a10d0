"""Any hyper-parameter of any optimizer follows a schedule, exactly, step by step."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, RMSprop

from learnkit import Callback, Learner, SkipStep
from learnkit.callbacks import ParamScheduler
from learnkit.schedule import compose, constant, cosine, exponential, linear, polynomial


class Used(Callback):
    """The value that each step used, one a parameter group."""

    order = 1_000

    def __init__(self, name: str) -> None:
        self.name, self.values = name, []

    def around_step(self, learn: Learner, run: Any) -> None:
        assert learn.opt is not None
        self.values.append([group[self.name] for group in learn.opt.param_groups])
        run()


def fit(schedules: Any, name: str, epochs: int = 2, **options: Any) -> list[list[Any]]:
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)))] * 5
    model = options.pop("model", None) or nn.Linear(3, 2)
    Learner((batches, None), model, callbacks=[ParamScheduler(schedules), used := Used(name)], **options).fit(epochs)
    return used.values


@pytest.mark.parametrize(
    "schedule, closed_form",
    [
        (constant(0.3), lambda t: 0.3),
        (linear(0.1, 0.7), lambda t: 0.1 + 0.6 * t),
        (cosine(0.1, 0.7), lambda t: 0.7 - 0.3 * (1 + math.cos(math.pi * t))),
        (polynomial(0.1, 0.7, 2), lambda t: 0.7 - 0.6 * (1 - t) ** 2),
        (exponential(0.1, 0.8), lambda t: 0.1 * 8**t),
    ],
    ids=["constant", "linear", "cosine", "polynomial", "exponential"],
)
def test_the_rate_follows_the_closed_form_from_the_first_step_to_the_last_of_all_epochs(
    schedule: Any, closed_form: Any
):
    assert fit({"lr": schedule}, "lr") == [[pytest.approx(closed_form(k / 9))] for k in range(10)]


def test_composed_schedules_follow_each_other():
    values = fit({"lr": compose([(0.5, linear(0.0, 1.0)), (0.5, constant(0.2))])}, "lr")
    assert [v for (v,) in values] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.2, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    "opt_func, key, name",
    [
        (AdamW, "eps", "eps"),
        (AdamW, "weight_decay", "weight_decay"),
        (SGD, "momentum", "momentum"),
        (SGD, "mom", "momentum"),
        (SGD, "wd", "wd"),
        (RMSprop, "alpha", "alpha"),
        (SGD, "dampening", "dampening"),
    ],
)
def test_any_hyper_parameter_can_be_scheduled_under_its_own_name(opt_func: Any, key: str, name: str):
    assert fit({key: linear(0.1, 0.9)}, name, opt_func=opt_func) == [[v] for v in linear(0.1, 0.9).values(10)]


def test_mom_is_the_first_beta_of_adam_and_the_second_stays():
    assert fit({"mom": linear(0.1, 0.9)}, "betas") == [[(v, 0.999)] for v in linear(0.1, 0.9).values(10)]


def test_the_decay_of_spared_groups_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    for key, opt_func in (("weight_decay", AdamW), ("wd", SGD)):
        values = fit({key: linear(0.1, 0.9)}, key, opt_func=opt_func, bn_wd=False, model=model)
        assert values == [[v, 0.0] for v in linear(0.1, 0.9).values(10)]


def test_each_layer_group_may_have_a_schedule_of_its_own():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    values = fit({"lr": [linear(0.0, 1.0), constant(0.5)]}, "lr", model=model, splitter=list)
    assert values == [[v, 0.5] for v in linear(0.0, 1.0).values(10)]


def test_several_parameters_are_scheduled_together_and_overrule_those_of_fit():
    schedules = {"lr": linear(0.1, 0.2), "mom": linear(0.9, 0.8)}
    assert fit(schedules, "lr", lr=77.0) == [[v] for v in linear(0.1, 0.2).values(10)]
    assert fit(schedules, "betas") == [[(v, 0.999)] for v in linear(0.9, 0.8).values(10)]


def test_a_schedule_is_as_long_as_each_fit():
    callback, used = ParamScheduler({"lr": linear(0.0, 1.0)}), Used("lr")
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)))] * 3
    learn = Learner((batches, None), nn.Linear(3, 2), callbacks=[callback, used])
    learn.fit(1).fit(2)
    learn.fit(100, max_steps=5)
    assert used.values == [[v] for n in (3, 6, 5) for v in linear(0.0, 1.0).values(n)]


def test_skipped_steps_do_not_use_up_the_schedule():
    class EverySecond(Callback):
        order = -100

        def before_step(self, learn):
            if learn.batch_index % 2:
                raise SkipStep

    used = Used("lr")
    batches = [(torch.randn(4, 3), torch.randint(2, (4,)))] * 6
    Learner(
        (batches, None), nn.Linear(3, 2), callbacks=[EverySecond(), ParamScheduler({"lr": linear(0.0, 5.0)}), used]
    ).fit(1)
    assert used.values == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize(
    "opt_func, name, known",
    [(AdamW, "momentun", "betas"), (SGD, "betas", "momentum"), (Adagrad, "mom", "lr_decay"), (AdamW, "LR", "lr")],
)
def test_an_unknown_hyper_parameter_is_refused_before_the_first_step_with_those_there_are(
    opt_func: Any, name: str, known: str
):
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(
        ValueError,
        match=rf"{opt_func.__name__} has no hyper-parameter '{name}' to schedule, expected one of .*\b{known}\b",
    ):
        fit({name: constant(0.1)}, "lr", opt_func=opt_func, model=model)
    assert torch.equal(model.weight, before)


class Liar:
    """Says that it has 2 batches, and gives 4."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter([(torch.randn(4, 3), torch.randint(2, (4,)))] * 4)


def test_a_loader_that_gives_more_batches_than_its_length_is_warned_about_and_keeps_the_last_value():
    used = Used("lr")
    learn = Learner((Liar(), None), nn.Linear(3, 2), callbacks=[ParamScheduler({"lr": linear(0.0, 1.0)}), used])
    with pytest.warns(UserWarning, match=r"Liar gave more batches than its length.*schedule of 2 steps.*__len__"):
        learn.fit(1)
    assert used.values == [[0.0], [1.0], [1.0], [1.0]]
