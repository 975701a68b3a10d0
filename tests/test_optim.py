"""From a model to its optimizer: groups, rates, fused kernels, and what is refused."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RAdam, RMSprop

from learnkit import Callback, Learner
from learnkit.callbacks import ParamScheduler
from learnkit.schedule import linear


class Net(nn.Module):
    """A body and a head, a norm, an embedding, and one parameter outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) * self.scale


def batches(dtype: torch.dtype = torch.float32) -> list[Any]:
    return [(torch.randn(6, 3, dtype=dtype), torch.randint(2, (6,)))] * 2


def make_learner(**options: Any) -> Learner:
    return Learner((batches(), None), Net(), **options)


def built(learn: Learner) -> Optimizer:
    assert learn.opt is not None
    return learn.opt


# --- fused -------------------------------------------------------------------
@pytest.mark.parametrize("opt_func", [SGD, Adam, AdamW, Adagrad])
def test_fused_kernels_are_used_where_torch_has_them(opt_func: Any):
    assert all(group["fused"] is True for group in built(make_learner(opt_func=opt_func).fit(1)).param_groups)


@pytest.mark.parametrize(
    "opt_func",
    [
        RAdam,
        partial(AdamW, foreach=True),
        partial(AdamW, fused=False),
        partial(SGD, foreach=False),
        lambda ps, lr: AdamW(ps, lr=lr),
    ],
    ids=["RAdam", "foreach=True", "fused=False", "foreach=False", "lambda"],
)
def test_the_users_choice_of_implementation_is_kept(opt_func: Any):
    learn = make_learner(opt_func=opt_func).fit(1)
    assert not any(group.get("fused") for group in built(learn).param_groups)
    for name, value in getattr(opt_func, "keywords", {}).items():
        assert built(learn).param_groups[0][name] == value


def test_options_of_a_partial_reach_the_optimizer():
    group = built(make_learner(opt_func=partial(AdamW, betas=(0.8, 0.9), eps=1e-5)).fit(1)).param_groups[0]
    assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-5


def test_a_double_precision_model_trains():
    learn = Learner((batches(torch.float64), None), Net().double()).fit(1)
    assert learn.step == 2 and all(p.dtype == torch.float64 for p in learn.model.parameters())


# --- groups ------------------------------------------------------------------
def test_the_optimizer_holds_every_parameter_once_in_every_way_of_grouping():
    def splitter(model: Any) -> list[Any]:
        return [model.body, [model.head, model.scale]]

    for options in ({}, {"bn_wd": False}, {"splitter": splitter}, {"splitter": splitter, "bn_wd": False}):
        learn = make_learner(**options).fit(1)
        held = [id(p) for group in built(learn).param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in learn.model.parameters())


def test_splitters_may_return_modules_parameters_and_iterables_of_both():
    ways = [
        lambda m: [m.body, [m.head, m.scale]],
        lambda m: (list(m.body.parameters()), (m.scale, *m.head.parameters())),
        lambda m: [m.body, nn.ModuleList([m.head]), m.scale],
    ]
    for way, n in zip(ways, (2, 2, 3), strict=True):
        learn = make_learner(splitter=way).fit(1, slice(1e-3, 1e-1))
        rates = [group["lr"] for group in built(learn).param_groups]
        assert len(rates) == n and rates[0] == 1e-3 and rates[-1] == 1e-1


def test_bn_wd_false_spares_every_kind_of_norm_and_every_bias():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1),
        nn.BatchNorm2d(2),
        nn.GroupNorm(1, 2),
        nn.InstanceNorm2d(2, affine=True),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        nn.Linear(8, 2),
    )
    Learner(
        ([(torch.randn(4, 1, 2, 2), torch.randint(2, (4,)))], None),
        model,
        opt_func=SGD,
        lr=0.5,
        wd=1.0,
        bn_wd=False,
        callbacks=ZeroGradients(),
    ).fit(1)
    decayed = [name for name, p in model.named_parameters() if (p.abs() < start_of(p)).any()]
    assert decayed == ["0.weight", "7.weight"]


def start_of(p: torch.Tensor) -> torch.Tensor:
    return p.start  # type: ignore[attr-defined]


class ZeroGradients(Callback):
    """So that weight decay alone moves the weights."""

    def before_fit(self, learn: Learner) -> None:
        for p in learn.model.parameters():
            p.start = p.detach().abs().clone()  # type: ignore[attr-defined]

    def before_step(self, learn: Learner) -> None:
        for p in learn.model.parameters():
            p.grad = torch.zeros_like(p)


def test_weights_without_a_gradient_do_not_decay():
    learn = make_learner(opt_func=SGD, wd=0.5)
    unused = nn.Parameter(torch.ones(3))
    learn.model.register_parameter("unused", unused)
    learn.fit(1)
    assert torch.equal(unused, torch.ones(3))


def test_one_parameter_that_two_layers_share_is_held_and_decayed_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    Learner(
        ([(torch.randn(4, 3), torch.randn(4, 3))], None), model, opt_func=SGD, lr=0.5, wd=0.5, callbacks=ZeroGradients()
    ).fit(1)
    torch.testing.assert_close(model[0].weight.abs(), start_of(model[0].weight) * 0.75)  # type: ignore


# --- the optimizer over several fits -----------------------------------------
def test_the_optimizer_is_made_at_the_first_fit_and_kept_with_its_state():
    learn = make_learner()
    assert learn.opt is None
    first = built(learn.fit(1))
    state = first.state[learn.model.head.weight]  # type: ignore[union-attr,index]
    learn.fit(2)
    assert learn.opt is first and state["step"].item() == 6


def test_setting_opt_to_none_begins_anew():
    learn = make_learner().fit(1)
    first, learn.opt = learn.opt, None  # type: ignore
    learn.fit(1)
    assert learn.opt is not first


def test_an_optimizer_that_holds_none_of_the_models_parameters_is_refused_before_the_first_step():
    for learn in (make_learner(opt_func=SGD(nn.Linear(3, 2).parameters(), lr=0.1)), make_learner().fit(1)):
        learn.model = Net()
        with pytest.raises(ValueError, match=r"holds none of the model's parameters.*learn\.opt = None"):
            learn.fit(1)


def test_a_layer_replaced_between_two_fits_is_refused_rather_than_left_untrained():
    learn = make_learner().fit(1)
    learn.model.head = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"head\.weight.*learn\.opt = None"):
        learn.fit(1)
    learn.opt = None  # type: ignore
    before = learn.model.head.weight.clone()
    assert not torch.equal(learn.fit(1).model.head.weight, before)  # type: ignore[union-attr,arg-type]


def test_a_built_optimizer_over_some_of_the_parameters_trains_these_alone():
    model = Net()
    body, head = model.body[0].weight.clone(), model.head.weight.clone()  # type: ignore
    Learner((batches(), None), model, opt_func=SGD(model.head.parameters(), lr=0.1)).fit(1)
    assert torch.equal(model.body[0].weight, body) and not torch.equal(model.head.weight, head)  # type: ignore


def test_an_optimizer_that_needs_a_closure_is_refused_with_an_error_that_names_it():
    learn = make_learner(opt_func=lambda groups, lr: LBFGS([p for g in groups for p in g["params"]], lr=lr))
    with pytest.raises((TypeError, ValueError), match=r"LBFGS|closure"):
        learn.fit(1)


class Lion(Optimizer):
    """An optimizer of the user's own, without weight decay."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()


def test_an_optimizer_of_the_users_own_gets_decoupled_weight_decay():
    model = nn.Linear(3, 1, bias=False)
    weight = model.weight.detach().clone()
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    Learner(([(x, y)], None), model, opt_func=Lion, lr=0.1, wd=0.5).fit(1)
    grad = (x @ weight.T - y).mul(2 / 4).T @ x
    torch.testing.assert_close(model.weight.data, weight * (1 - 0.1 * 0.5) - 0.1 * grad.sign())


def test_closures_over_weight_decay_are_refused_and_say_where_it_goes():
    with pytest.raises(ValueError, match=r"weight_decay=0\.3.*wd="):
        make_learner(opt_func=partial(SGD, weight_decay=0.3)).fit(1)


def test_the_rate_of_a_fit_does_not_become_the_default():
    learn = make_learner(lr=0.01).fit(1, 0.5)
    learn.fit(1)
    assert learn.recorder.lrs == [0.01, 0.01]


# --- settings that change when torch has made its st -------------------------
def changed(opt: Optimizer, setting: str, value: Any) -> None:
    for group in opt.param_groups:
        group[setting] = value


def by_hand(model: nn.Module, opt: Optimizer, rows: list[Any]) -> None:
    for x, y in rows:
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


ONE_BY_ONE, FOREACH = {"foreach": False}, {"foreach": True}


@pytest.mark.parametrize(
    ("cls", "options", "setting", "value", "name"),
    [
        (cls, options, setting, value, name)
        for cls, setting, value, name, ways in [
            (RMSprop, "momentum", 0.9, "momentum_buffer", [ONE_BY_ONE, FOREACH, {"centered": True}]),
            (RMSprop, "centered", True, "grad_avg", [ONE_BY_ONE, FOREACH, {"momentum": 0.9}]),
            (Adam, "amsgrad", True, "max_exp_avg_sq", [ONE_BY_ONE, FOREACH, {"fused": True}]),
            (AdamW, "amsgrad", True, "max_exp_avg_sq", [{}, {"maximize": True}]),
        ]
        for options in ways
    ],
)
def test_a_setting_switched_on_later_begins_at_zero(
    cls: Any, options: dict[str, Any], setting: str, value: Any, name: str
):
    rows, model = batches(), Net()
    hand, options = copy.deepcopy(model), {"weight_decay": 0.0, **options}
    opt = cls(hand.parameters(), lr=1e-2, **options)
    by_hand(hand, opt, rows)
    changed(opt, setting, value)
    for p, kept in opt.state.items():
        kept[name] = torch.zeros_like(p)
    by_hand(hand, opt, rows)
    changed(opt, setting, type(value)())
    by_hand(hand, opt, rows)
    changed(opt, setting, value)
    by_hand(hand, opt, rows)

    learn = Learner((rows, None), model, opt_func=cls(model.parameters(), lr=1e-2, **options)).fit(1)
    for now in (value, type(value)(), value):
        changed(built(learn), setting, now)
        learn.fit(1)
    assert_equal(model, hand)


def test_a_schedule_may_switch_momentum_on_within_a_fit_and_between_fits():
    rows, model = batches(), Net()
    hand = copy.deepcopy(model)
    learn = Learner((rows, None), model, opt_func=RMSprop, wd=0.0).fit(1, 1e-2).fit_one_cycle(2, 1e-2)
    lrs, moms = learn.recorder.lrs, learn.recorder.moms
    learn.fit(1, 1e-2, callbacks=[ParamScheduler({"mom": linear(0.0, 0.5)})])
    opt = RMSprop(hand.parameters(), lr=1e-2)
    by_hand(hand, opt, rows)
    for p, kept in opt.state.items():
        kept["momentum_buffer"] = torch.zeros_like(p)
    for row, lr, mom in zip([*rows * 2, *rows], [*lrs, 1e-2, 1e-2], [*moms, 0.0, 0.5], strict=True):
        opt.param_groups[0].update(lr=lr, momentum=mom)
        by_hand(hand, opt, [row])
    assert_equal(model, hand)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}, {"maximize": True}])
def test_momentum_takes_parameters_that_are_thawed_by_hand(options: dict[str, Any], fused: bool):
    rows, model, options = batches(), Net(), {**options, "momentum": 0.9, "fused": fused}
    hand = copy.deepcopy(model)
    model.body.requires_grad_(False)
    learn = Learner((rows, None), model, opt_func=partial(SGD, **options), wd=0.0).fit(1, 1e-2)
    model.body.requires_grad_(True)
    learn.fit(2)
    opt = SGD(hand.parameters(), lr=1e-2, **options)
    hand.body.requires_grad_(False)
    by_hand(hand, opt, rows)
    hand.body.requires_grad_(True)
    if fused:
        opt.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in hand.body.parameters()})
    changed(opt, "lr", learn.lr)
    by_hand(hand, opt, rows * 2)
    assert_equal(model, hand)


def test_what_a_file_lacks_begins_at_zero_too(tmp_path: Any):
    """A state from before the setting was switched on, put back into an optimizer whose state had it."""
    model = Net()
    learn = Learner((batches(), None), model, opt_func=RMSprop, path=tmp_path).fit(1, 1e-2)
    learn.save("plain")
    learn.fit_one_cycle(1)
    learn.load("plain").fit_one_cycle(1)
    assert all("momentum_buffer" in kept for kept in built(learn).state.values())
