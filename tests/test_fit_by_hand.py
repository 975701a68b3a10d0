"""A fit against the same loop written by hand, bit for bit."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, accuracy

N, BS, EPOCHS = 28, 8, 3


def make_tensors() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4), torch.randint(3, (N,))


def make_model(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 3))


def twin(model: nn.Module) -> Any:
    other = make_model(model[3].p)  # type: ignore[index,union-attr,arg-type]
    other.load_state_dict(model.state_dict())
    return other


def assert_equal(model: nn.Module, hand: nn.Module) -> None:
    for (name, value), other in zip(model.state_dict().items(), hand.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


class Rates:
    """What the loop by hand sets before each step; nothing by default."""

    def __init__(self, lrs: Sequence[float] = (), moms: Sequence[float] = ()) -> None:
        self.lrs, self.moms = lrs, moms

    def set(self, opt: Optimizer, step: int) -> None:
        for group in opt.param_groups:
            if self.lrs:
                group["lr"] = self.lrs[step]
            if self.moms and "betas" in group:
                group["betas"] = (self.moms[step], group["betas"][1])
            elif self.moms:
                group["momentum"] = self.moms[step]


def train_by_hand(
    model: nn.Module,
    batches: Iterable[Any],
    opt: Optimizer,
    *,
    wd: float = 0.0,
    valid: Iterable[Any] = (),
    rates: Rates | None = None,
    epochs: int = EPOCHS,
) -> tuple[list[float], list[tuple[float, float]]]:
    """Losses of every step, and (valid_loss, accuracy) of every epoch; `wd` multiplies the weights before each step."""
    losses, measured, step = [], [], 0
    for _ in range(epochs):
        model.train()
        for x, y in batches:
            if rates is not None:
                rates.set(opt, step)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if wd:
                with torch.no_grad():
                    for group in opt.param_groups:
                        for p in group["params"]:
                            if p.grad is not None:
                                p.mul_(1 - group["lr"] * wd)
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
            step += 1
        model.eval()
        with torch.no_grad():
            total, right, n = 0.0, 0.0, 0
            for x, y in valid:
                pred = model(x)
                total += F.cross_entropy(pred, y).item() * len(y)
                right += (pred.argmax(1) == y).sum().item()
                n += len(y)
        if n:
            measured.append((total / n, right / n))
    return losses, measured


OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], Callable[[Iterable[Any]], Optimizer], float]] = {
    # what the Learner is given; the same by hand; the weight decay that by hand is a multiplication of its own
    "SGD": (SGD, lambda ps: SGD(ps, lr=0.02, fused=True), 0.1),
    "SGD with momentum": (
        lambda groups, lr: SGD(groups, lr=lr, momentum=0.9, nesterov=True),
        lambda ps: SGD(ps, lr=0.02, momentum=0.9, nesterov=True),
        0.1,
    ),
    "AdamW": (AdamW, lambda ps: AdamW(ps, lr=0.02, weight_decay=0.1, fused=True), 0.0),
    "Adam": (Adam, lambda ps: Adam(ps, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True, fused=True), 0.0),
    "RAdam": (RAdam, lambda ps: RAdam(ps, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True), 0.0),
    "NAdam": (NAdam, lambda ps: NAdam(ps, lr=0.02, weight_decay=0.1, decoupled_weight_decay=True), 0.0),
    "RMSprop": (RMSprop, lambda ps: RMSprop(ps, lr=0.02), 0.1),
    "Adamax": (Adamax, lambda ps: Adamax(ps, lr=0.02), 0.1),
    "Adagrad": (Adagrad, lambda ps: Adagrad(ps, lr=0.02, fused=True), 0.1),
}


@pytest.mark.parametrize("opt_func, by_hand, wd", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_fit_with_any_optimizer_equals_the_loop_by_hand_with_decoupled_weight_decay(
    opt_func: Any, by_hand: Callable[[Iterable[Any]], Optimizer], wd: float
):
    x, y = make_tensors()
    batches = [(x[i : i + BS], y[i : i + BS]) for i in range(0, N, BS)]
    model = make_model()
    hand = twin(model)
    learn = Learner((batches, batches), model, opt_func=opt_func, lr=0.02, wd=0.1, metrics=accuracy).fit(EPOCHS)
    losses, measured = train_by_hand(hand, batches, by_hand(hand.parameters()), wd=wd, valid=batches)
    assert_equal(model, hand)
    assert learn.recorder.losses == losses
    for row, expected in zip(learn.recorder.values, measured, strict=True):
        assert row[1:] == pytest.approx(expected, rel=1e-7)


def test_adam_and_adamw_are_the_same_to_a_learner():
    x, y = make_tensors()
    models = [make_model()]
    models.append(twin(models[0]))
    for model, opt_func in zip(models, (Adam, AdamW), strict=True):
        Learner(([(x, y)], None), model, opt_func=opt_func, wd=0.3).fit(4)
    assert_equal(*models)


LOADERS: dict[str, Callable[[Tensor, Tensor], DataBunch]] = {
    "from_tensors": lambda x, y: DataBunch.from_tensors((x, y), (x, y), bs=BS, seed=5),
    "create": lambda x, y: DataBunch.create(TensorDataset(x, y), TensorDataset(x, y), bs=BS, seed=5),
    "keeping the last batch": lambda x, y: DataBunch.from_tensors((x, y), (x, y), bs=BS, seed=5, drop_last=False),
    "user's loaders": lambda x, y: DataBunch(
        DataLoader(TensorDataset(x, y), BS, shuffle=True, generator=torch.Generator().manual_seed(5)),
        DataLoader(TensorDataset(x, y), BS),
    ),
}


@pytest.mark.parametrize("make_data", LOADERS.values(), ids=LOADERS)
def test_a_fit_equals_the_loop_by_hand_over_the_same_loader(make_data: Callable[[Tensor, Tensor], DataBunch]):
    x, y = make_tensors()
    model = make_model()
    hand = twin(model)
    learn = Learner(make_data(x, y), model, lr=0.02, metrics=accuracy).fit(EPOCHS)
    data = make_data(x, y)
    losses, measured = train_by_hand(
        hand, data.train_dl, AdamW(hand.parameters(), lr=0.02, weight_decay=1e-2, fused=True), valid=data.valid_dl or ()
    )
    assert_equal(model, hand)
    assert learn.recorder.losses == losses
    for row, expected in zip(learn.recorder.values, measured, strict=True):
        assert row[1:] == pytest.approx(expected, rel=1e-7)


def test_dropout_draws_the_masks_of_the_loop_by_hand_with_validation_in_between():
    x, y = make_tensors()
    batches = [(x[:BS], y[:BS]), (x[BS:], y[BS:])]
    model = make_model(dropout=0.5)
    hand = twin(model)
    torch.manual_seed(3)
    learn = Learner((batches, batches), model).fit(EPOCHS)
    torch.manual_seed(3)
    losses, _ = train_by_hand(
        hand, batches, AdamW(hand.parameters(), lr=3e-3, weight_decay=1e-2, fused=True), valid=batches
    )
    assert_equal(model, hand)
    assert learn.recorder.losses == losses


# --- schedules ---------------------------------------------------------------
def closed_form(k: int, n: int, start: float, peak: float, end: float, pct_start: float) -> float:
    """API.md, section 3: cosine from `start` at step 0 to `peak` at int(n * pct_start), then to `end` at step n - 1."""
    a = int(n * pct_start)
    low, t = (start, k / a) if k < a else (end, 1 - (k - a) / (n - 1 - a))
    return low + (peak - low) * (1 - math.cos(math.pi * t)) / 2


CYCLES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "div_factor": dict(div_factor=10.0),
    "final_div": dict(final_div=50.0),
    "pct_start": dict(pct_start=0.6),
    "moms": dict(moms=(0.9, 0.7)),
    "all": dict(div_factor=4.0, final_div=8.0, pct_start=0.5, moms=(0.8, 0.6)),
}


@pytest.mark.parametrize("options", CYCLES.values(), ids=CYCLES)
@pytest.mark.parametrize("opt_func", [SGD, AdamW])
def test_rates_and_momentum_of_one_cycle_follow_the_closed_form(opt_func: Any, options: dict[str, Any]):
    x, y = make_tensors()
    data = DataBunch.from_tensors((x, y), bs=BS)
    learn = Learner(data, make_model(), opt_func=opt_func).fit_one_cycle(7, 0.1, **options)
    n = 7 * (N // BS)
    div, pct = options.get("div_factor", 25.0), options.get("pct_start", 0.3)
    final, (high, low) = options.get("final_div", div * 1e4), options.get("moms", (0.95, 0.85))
    lrs = [closed_form(k, n, 0.1 / div, 0.1, 0.1 / final, pct) for k in range(n)]
    moms = [closed_form(k, n, high, low, high, pct) for k in range(n)]
    assert learn.recorder.lrs == pytest.approx(lrs, rel=1e-12) and learn.recorder.moms == pytest.approx(moms, rel=1e-12)
    assert (
        learn.recorder.lrs[0] == 0.1 / div
        and learn.recorder.lrs[int(n * pct)] == 0.1
        and learn.recorder.lrs[-1] == 0.1 / final
    )


@pytest.mark.parametrize(
    "make_opt, fused", [(lambda ps, lr: SGD(ps, lr=lr, momentum=0.9), False), (AdamW, True)], ids=["SGD", "AdamW"]
)
def test_one_cycle_equals_the_loop_by_hand_that_sets_rate_and_momentum(make_opt: Any, fused: bool):
    x, y = make_tensors()
    batches = [(x[i : i + BS], y[i : i + BS]) for i in range(0, N, BS)]
    model = make_model()
    hand = twin(model)
    learn = Learner((batches, None), model, opt_func=make_opt, wd=0.0).fit_one_cycle(EPOCHS, 0.05)
    opt = AdamW(hand.parameters(), weight_decay=0.0, fused=True) if fused else SGD(hand.parameters(), momentum=0.9)
    losses, _ = train_by_hand(hand, batches, opt, rates=Rates(learn.recorder.lrs, learn.recorder.moms))
    assert len(set(learn.recorder.moms)) > 5
    assert_equal(model, hand)
    assert learn.recorder.losses == losses


def test_weight_decay_follows_the_rate_of_a_schedule():
    x, y = make_tensors()
    batches = [(x, y)] * 4
    model = make_model()
    hand = twin(model)
    learn = Learner((batches, None), model, opt_func=SGD, wd=0.2).fit_one_cycle(1, 0.5, moms=None)
    train_by_hand(hand, batches, SGD(hand.parameters(), fused=True), wd=0.2, rates=Rates(learn.recorder.lrs), epochs=1)
    assert_equal(model, hand)


def test_moms_none_leaves_the_momentum_alone():
    x, y = make_tensors()
    learn = Learner(([(x, y)] * 5, None), make_model()).fit_one_cycle(1, moms=None)
    assert learn.recorder.moms == [0.9] * 5


def test_an_optimizer_without_momentum_takes_one_cycle_without_it():
    x, y = make_tensors()
    learn = Learner(([(x, y)] * 5, None), make_model(), opt_func=Adagrad).fit_one_cycle(1, 0.1)
    assert learn.recorder.moms == [] and learn.recorder.lrs[-1] == 0.1 / 25e4


def test_max_steps_is_the_length_of_the_schedule():
    x, y = make_tensors()
    learn = Learner(([(x, y)] * 4, None), make_model()).fit_one_cycle(10, 0.1, max_steps=6)
    assert learn.recorder.lrs == pytest.approx(
        [closed_form(k, 6, 0.004, 0.1, 0.1 / 25e4, 0.3) for k in range(6)], rel=1e-12
    )


def test_max_steps_beyond_the_end_does_not_stretch_the_schedule():
    x, y = make_tensors()
    learn = Learner(([(x, y)] * 4, None), make_model()).fit_one_cycle(2, 0.1, max_steps=100)
    assert len(learn.recorder.lrs) == 8 and learn.recorder.lrs[-1] == 0.1 / 25e4


def test_flat_cos_is_flat_and_then_a_cosine():
    x, y = make_tensors()
    learn = Learner(([(x, y)] * 20, None), make_model()).fit_flat_cos(1, 0.1, pct_start=0.5, div_final=100.0)
    cosine = [0.001 + 0.099 * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(10)]
    assert learn.recorder.lrs == pytest.approx([0.1] * 10 + cosine, rel=1e-12)


def test_sgdr_restarts_at_the_full_rate_with_cycles_that_double():
    x, y = make_tensors()
    learn = Learner(([(x, y)] * 3, None), make_model()).fit_sgdr(3, 0.1, cycle_len=1, cycle_mult=2)
    lrs = learn.recorder.lrs
    assert len(lrs) == 3 * (1 + 2 + 4) and lrs[-1] == 0
    assert [k for k, lr in enumerate(lrs) if lr == 0.1] == [0, 3, 9]
    assert lrs[:9] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
        + [0.05 * (1 + math.cos(math.pi * k / 6)) for k in range(6)],
        rel=1e-12,
    )


# --- layer groups ------------------------------------------------------------
def splitter(model: Any) -> list[Any]:
    return [model[0], model[1], model[4]]


def groups_by_hand(model: Any, rates: Sequence[float]) -> list[dict[str, Any]]:
    return [{"params": list(part.parameters()), "lr": lr} for part, lr in zip(splitter(model), rates, strict=True)]


@pytest.mark.parametrize(
    "lr, rates",
    [(slice(1e-4, 1e-2), (1e-4, 1e-3, 1e-2)), (slice(1e-2), (1e-3, 1e-3, 1e-2)), (1e-2, (1e-2,) * 3)],
    ids=["lo-hi", "hi", "number"],
)
def test_a_slice_gives_each_layer_group_its_rate(lr: float | slice, rates: tuple[float, ...]):
    x, y = make_tensors()
    batches = [(x[:BS], y[:BS]), (x[BS:], y[BS:])]
    model = make_model()
    hand = twin(model)
    learn = Learner((batches, None), model, splitter=splitter, opt_func=SGD, wd=0.0).fit(EPOCHS, lr)
    assert learn.opt is not None
    assert [group["lr"] for group in learn.opt.param_groups] == pytest.approx(rates, rel=1e-12)
    exact = [group["lr"] for group in learn.opt.param_groups]
    train_by_hand(hand, batches, SGD(groups_by_hand(hand, exact), fused=True))
    assert_equal(model, hand)


def test_one_cycle_with_a_slice_scales_each_groups_cycle():
    x, y = make_tensors()
    seen: list[list[float]] = []

    class Rows(Callback):
        def before_step(self, learn):
            seen.append([group["lr"] for group in learn.opt.param_groups])

    learn = Learner(([(x, y)] * 6, None), make_model(), splitter=splitter, callbacks=Rows()).fit_one_cycle(
        1, slice(1e-4, 1e-2)
    )
    for k, row in enumerate(seen):
        expected = [closed_form(k, 6, peak / 25, peak, peak / 25e4, 0.3) for peak in (1e-4, 1e-3, 1e-2)]
        assert row == pytest.approx(expected, rel=1e-9)
    assert learn.recorder.lrs == [row[-1] for row in seen]


@pytest.mark.parametrize(
    "freeze, trained",
    [
        (lambda learn: learn.freeze(), (2,)),
        (lambda learn: learn.freeze_to(1), (1, 2)),
        (lambda learn: learn.freeze_to(-1), (2,)),
        (lambda learn: learn.freeze_to(-2), (1, 2)),
        (lambda learn: learn.unfreeze(), (0, 1, 2)),
        (lambda learn: learn.freeze_to(0), (0, 1, 2)),
        (lambda learn: learn.freeze().unfreeze(), (0, 1, 2)),
    ],
    ids=["freeze", "freeze_to 1", "freeze_to -1", "freeze_to -2", "unfreeze", "freeze_to 0", "freeze and unfreeze"],
)
def test_frozen_layer_groups_stay_to_the_bit_and_the_others_train(
    freeze: Callable[[Learner], Any], trained: tuple[int, ...]
):
    x, y = make_tensors()
    model = make_model()
    hand = twin(model)
    learn = Learner(([(x, y)], None), model, splitter=splitter, opt_func=AdamW, wd=0.5)
    assert freeze(learn) is learn
    learn.fit(EPOCHS)
    kept = [p for i, part in enumerate(splitter(hand)) if i in trained for p in part.parameters()]
    for p in hand.parameters():
        p.requires_grad_(any(p is q for q in kept))
    train_by_hand(hand, [(x, y)], AdamW(kept, lr=3e-3, weight_decay=0.5, fused=True))
    assert_equal(model, hand)


def test_freezing_between_fits_keeps_the_optimizers_state():
    x, y = make_tensors()
    model = make_model()
    hand = twin(model)
    opt = SGD(hand.parameters(), lr=0.05, momentum=0.9)
    learn = Learner(
        ([(x, y)], None),
        model,
        splitter=splitter,
        opt_func=lambda ps, lr: SGD(ps, lr=lr, momentum=0.9),
        lr=0.05,
        wd=0.1,
    )
    for frozen in (0, 2, 0):
        learn.freeze_to(frozen).fit(2)
        for i, part in enumerate(splitter(hand)):
            part.requires_grad_(i >= frozen)
        train_by_hand(hand, [(x, y)], opt, wd=0.1, epochs=2)
    assert_equal(model, hand)


def test_fine_tune_trains_the_head_alone_first_and_then_everything():
    x, y = make_tensors()
    model = make_model()
    start, changed = model[0].weight.clone(), []  # type: ignore

    class Watch(Callback):
        def after_epoch(self, learn):
            changed.append(not torch.equal(model[0].weight, start))  # type: ignore

    learn = Learner(([(x, y)] * 3, None), model, splitter=splitter, callbacks=Watch())
    assert learn.fine_tune(2, 1e-2, freeze_epochs=2) is learn
    assert changed == [False, False, True, True]
    assert all(p.requires_grad for p in model.parameters())


# --- weight decay, one step, built optimizers --------------------------------
def test_bn_wd_false_spares_norms_and_biases_alone():
    x, y = make_tensors()
    batches = [(x[:BS], y[:BS]), (x[BS:], y[BS:])]
    model = make_model()
    hand = twin(model)
    Learner((batches, None), model, bn_wd=False, wd=0.4, lr=0.02).fit(EPOCHS)
    decayed, spared = [hand[0].weight, hand[4].weight], [hand[0].bias, *hand[1].parameters(), hand[4].bias]
    opt = AdamW(
        [{"params": decayed, "weight_decay": 0.4}, {"params": spared, "weight_decay": 0.0}], lr=0.02, fused=True
    )
    train_by_hand(hand, batches, opt)
    assert_equal(model, hand)


def test_bn_wd_false_keeps_layer_groups_and_their_rates():
    x, y = make_tensors()
    model = make_model()
    hand = twin(model)
    Learner(([(x, y)], None), model, bn_wd=False, wd=0.4, splitter=splitter, opt_func=SGD).fit(
        EPOCHS, slice(0.01, 0.04)
    )
    rates = (0.01, 0.01 * 4**0.5, 0.04)
    for _ in range(EPOCHS):
        hand.train()
        grads = torch.autograd.grad(F.cross_entropy(hand(x), y), list(hand.parameters()))
        with torch.no_grad():
            for (name, p), grad in zip(hand.named_parameters(), grads, strict=True):
                lr = rates[{"0": 0, "1": 1, "4": 2}[name[0]]]
                if name in ("0.weight", "4.weight"):
                    p.mul_(1 - lr * 0.4)
                p.sub_(lr * grad)
    for p, q in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("opt_func", [SGD, AdamW])
def test_wd_given_to_fit_holds_for_that_fit(opt_func: Any):
    x, y = make_tensors()
    model = make_model()
    hand = twin(model)
    Learner(([(x, y)], None), model, opt_func=opt_func, lr=0.02, wd=0.1).fit(2, wd=0.7).fit(2)
    opt: Optimizer = (
        SGD(hand.parameters(), lr=0.02, fused=True)
        if opt_func is SGD
        else AdamW(hand.parameters(), lr=0.02, fused=True)
    )
    for wd in (0.7, 0.1):
        if opt_func is AdamW:
            opt.param_groups[0]["weight_decay"] = wd
        train_by_hand(hand, [(x, y)], opt, wd=wd if opt_func is SGD else 0.0, epochs=2)
    assert_equal(model, hand)


def test_one_step_of_linear_regression_moves_along_the_gradient_computed_by_hand():
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    Learner(([(x, y)], None), model, opt_func=SGD, wd=0.1).fit(1, 0.5)
    residual = x @ weight.T + bias - y
    expected = (
        weight * (1 - 0.5 * 0.1) - 0.5 * 2 / 10 * residual.T @ x,
        bias * (1 - 0.5 * 0.1) - 0.5 * 2 / 10 * residual.sum(0),
    )
    torch.testing.assert_close(model.weight.data, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.bias.data, expected[1], rtol=1e-12, atol=1e-12)


def test_a_built_optimizer_keeps_its_own_rates_and_its_coupled_weight_decay():
    x, y = make_tensors()
    model = make_model()
    hand = twin(model)
    built = SGD(groups_by_hand(model, (0.01, 0.02, 0.03)), momentum=0.9, weight_decay=0.2)
    learn = Learner(([(x, y)], None), model, opt_func=built, lr=9.0, wd=9.0).fit(EPOCHS)
    assert learn.opt is built
    train_by_hand(hand, [(x, y)], SGD(groups_by_hand(hand, (0.01, 0.02, 0.03)), momentum=0.9, weight_decay=0.2))
    assert_equal(model, hand)


def test_a_rate_or_weight_decay_given_to_fit_overrules_a_built_optimizers_own():
    x, y = make_tensors()
    model = make_model()
    hand = twin(model)
    Learner(([(x, y)], None), model, opt_func=AdamW(model.parameters(), lr=0.5, weight_decay=0.5)).fit(
        EPOCHS, 0.02, wd=0.1
    )
    train_by_hand(hand, [(x, y)], AdamW(hand.parameters(), lr=0.02, weight_decay=0.1))
    assert_equal(model, hand)


def test_a_built_optimizer_takes_one_cycle():
    x, y = make_tensors()
    model = make_model()
    hand = twin(model)
    learn = Learner(([(x, y)] * 4, None), model, opt_func=SGD(model.parameters(), lr=0.5, momentum=0.9)).fit_one_cycle(
        1, 0.1
    )
    train_by_hand(
        hand,
        [(x, y)] * 4,
        SGD(hand.parameters(), momentum=0.9),
        rates=Rates(learn.recorder.lrs, learn.recorder.moms),
        epochs=1,
    )
    assert_equal(model, hand)
    assert learn.recorder.lrs[0] == 0.1 / 25


def test_two_fits_go_on_with_the_same_optimizer():
    x, y = make_tensors()
    models = [make_model()]
    models.append(twin(models[0]))
    Learner(([(x, y)], None), models[0]).fit(4)
    Learner(([(x, y)], None), models[1]).fit(2).fit(2)
    assert_equal(*models)
