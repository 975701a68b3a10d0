"""Optimizers from other packages: schedule-free ones in their modes, timm's groups with a scale, LAMB and LARS,
LBFGS.
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner, StopTrain, accuracy
from learnkit.callbacks import Checkpoint, EarlyStopping, ParamScheduler, Recorder
from learnkit.schedule import linear

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def learner(*callbacks: Callback, **options: Any) -> Learner:
    torch.manual_seed(0)
    data = DataBunch.from_tensors((X, Y), (X[:8], Y[:8]), bs=8, seed=1)
    return Learner(
        data,
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)),
        metrics=accuracy,
        callbacks=callbacks,
        **options,
    )


class TwoWeights(torch.optim.SGD):
    """SGD whose weights are 1 larger in training mode: the modes can be seen in them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.is_training, self.log = False, []

    def train(self) -> None:
        self.move(True, 1.0)

    def eval(self) -> None:
        self.move(False, -1.0)

    @torch.no_grad()
    def move(self, training: bool, by: float) -> None:
        if self.is_training == training:
            return
        self.is_training = training
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(by)


class Sees(Callback):
    def __init__(self) -> None:
        self.log: list[tuple[str, bool]] = []

    def after_forward(self, learn):
        self.log.append(("train" if learn.training else "valid", learn.opt.is_training))

    def after_step(self, learn):
        if learn.step == 2:
            learn.validate()


@pytest.mark.parametrize("built", [False, True])
def test_the_optimizer_is_in_training_mode_while_training_and_in_no_evaluation(built: bool):
    learn = learner(sees := Sees(), opt_func=TwoWeights)
    if built:
        learn.opt = learn.opt_func = TwoWeights(learn.model.parameters())
    learn.fit(2)
    assert all(mode == (kind == "train") for kind, mode in sees.log) and ("valid", False) in sees.log[:4]
    assert not learn.opt.is_training
    learn.fit(1)
    assert not learn.opt.is_training


@pytest.mark.parametrize("error", [ConnectionError, StopTrain])
def test_it_is_in_evaluation_mode_after_an_error_too(error: Any):
    class Raises(Callback):
        def after_step(self, learn):
            raise error

    learn = learner(Raises(), opt_func=TwoWeights)
    if error is StopTrain:
        learn.fit(1)
    else:
        with pytest.raises(error):
            learn.fit(1)
    assert not learn.opt.is_training


def schedule_free(weight_decay: float, lr: float, epochs: int) -> list[torch.Tensor]:
    """By hand, as its own page says."""
    schedulefree: Any = pytest.importorskip("schedulefree")
    learn = learner()
    model, loader = learn.model, learn.data.train_dl
    opt = schedulefree.AdamWScheduleFree(model.parameters(), lr=lr, weight_decay=weight_decay)
    for _ in range(epochs):
        opt.train()
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
        opt.eval()
    return [p.detach() for p in model.parameters()]


def test_schedule_free_adamw_equals_a_loop_by_hand():
    schedulefree: Any = pytest.importorskip("schedulefree")
    learn = learner(opt_func=schedulefree.AdamWScheduleFree, wd=0.1).fit(3, 1e-2)
    for a, b in zip(learn.model.parameters(), schedule_free(0.1, 1e-2, 3), strict=True):
        assert torch.equal(a, b)


def test_schedule_free_fits_resume_to_the_bit():
    schedulefree: Any = pytest.importorskip("schedulefree")

    class Dies(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn):
            if learn.training and learn.step == 5:
                raise ConnectionAbortedError

    whole = learner(opt_func=schedulefree.AdamWScheduleFree).fit(3)
    for every in (1, 3):

        def half(*more, every=every):
            return learner(
                Checkpoint(f"kept{every}", every_n_steps=every), *more, opt_func=schedulefree.AdamWScheduleFree
            )

        with pytest.raises(ConnectionAbortedError):
            half(Dies()).fit(3)
        for a, b in zip(half().fit(3, resume=True).model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)


# --- timm --------------------------------------------------------------------
def scaled(learn: Learner) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [
            {"params": learn.model[0].parameters(), "lr_scale": 0.1},
            {"params": learn.model[2].parameters(), "lr_scale": 1.0},
        ],
        lr=0.5,
    )


class Rates(Callback):
    order = 500

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def before_step(self, learn):
        self.seen.append([group["lr"] for group in learn.opt.param_groups])


@pytest.mark.parametrize(
    "fit, expected",
    [
        (lambda learn: learn.fit(1), [0.5] * 3),
        (lambda learn: learn.fit(1).fit(1), [0.5] * 6),
        (lambda learn: learn.fit(1, 0.2), [0.2] * 3),
        (lambda learn: learn.fit(1, callbacks=[ParamScheduler({"lr": linear(1.0, 0.2)})]), [1.0, 0.6, 0.2]),
    ],
)
def test_groups_with_an_lr_scale_get_their_share_of_every_rate(fit, expected):
    learn = learner(rates := Rates())
    learn.opt = learn.opt_func = scaled(learn)
    fit(learn)
    assert rates.seen == [pytest.approx([0.1 * lr, lr]) for lr in expected]


@pytest.mark.parametrize("name", ["Lamb", "Lars"])
def test_timms_lamb_and_lars_are_optimizers_like_others(name: str):
    optimizers: Any = pytest.importorskip("timm.optim")
    learn = learner(opt_func=getattr(optimizers, name), wd=0.0)
    by_hand = copy.deepcopy(learn.model)
    opt = getattr(optimizers, name)(by_hand.parameters(), lr=0.05, weight_decay=0.0)
    learn.fit(1, 0.05)
    for x, y in learner().data.train_dl:
        F.cross_entropy(by_hand(x), y).backward()
        opt.step()
        opt.zero_grad()
    for a, b in zip(learn.model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


# --- LBFGS -------------------------------------------------------------------
class Closure(Callback):
    """Steps for optimizers that ask for the loss again: as in docs/callbacks.md."""

    order = Recorder.order + 10  # innermost, as what lies further in is left out

    def around_step(self, learn, run):
        def loss() -> torch.Tensor:
            learn.zero_grad()
            learn.stages.forward()
            learn.stages.backward()
            return learn.loss

        learn.opt.step(loss)
        learn.zero_grad()
        learn.step += 1


def test_lbfgs_by_around_step_equals_torchs_own_loop():
    make = partial(torch.optim.LBFGS, max_iter=4)
    learn = learner(Closure(), EarlyStopping("train_loss", patience=9), wd=0.0)
    by_hand = copy.deepcopy(learn.model)
    learn.opt = learn.opt_func = make(learn.model.parameters(), lr=0.5)
    learn.fit(2, 0.5)
    opt, loader = make(by_hand.parameters(), lr=0.5), learner().data.train_dl
    for _ in range(2):
        for x, y in loader:

            def loss(x=x, y=y):
                opt.zero_grad()
                value = F.cross_entropy(by_hand(x), y)
                value.backward()
                return value

            opt.step(loss)
    for a, b in zip(learn.model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(learn.recorder.losses) == 6
