"""SAM: the step has the gradient from rho uphill; whatever is raised up there, the weights come down again."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import (
    EMA,
    SAM,
    Accumulate,
    AutoMicrobatch,
    Checkpoint,
    ClipGradients,
    Lookahead,
    MixedPrecision,
)

Batch = tuple[Tensor, Tensor]


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)) for n in sizes]


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5) if norm else nn.Identity(), nn.Tanh(), nn.Linear(5, 2))


def learner(*callbacks: Callback, norm: bool = False, valid: Any = None, **options: Any) -> Learner:
    options = {"opt_func": torch.optim.SGD, "lr": 0.1, "wd": 0.0} | options
    return Learner((batches(4, 4, 3, 4), valid), net(norm), callbacks=callbacks, **options)


def weights(learn: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in learn.model.parameters()]


def by_hand(given: list[Batch], rho: float, clip: float | None = None) -> tuple[list[Tensor], list[float]]:
    model, losses = net(), []
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in given:
        loss = F.mse_loss(model(x), y)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        start = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.add_(rho * g / norm)
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        with torch.no_grad():
            for p, s in zip(model.parameters(), start, strict=True):
                p.copy_(s)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
    return [p.detach() for p in model.parameters()], losses


@pytest.mark.parametrize("rho", [0.01, 0.05, 1.0])
def test_it_is_the_algorithm_by_hand_and_records_the_loss_of_the_weights_themselves(rho):
    learn = learner(SAM(rho)).fit(3)
    expected, losses = by_hand(batches(4, 4, 3, 4) * 3, rho)
    torch.testing.assert_close(weights(learn), expected)
    assert learn.recorder.losses == pytest.approx(losses)


def test_what_is_clipped_is_the_gradient_uphill():
    torch.testing.assert_close(
        weights(learner(SAM(0.5), ClipGradients(0.3)).fit(2)), by_hand(batches(4, 4, 3, 4) * 2, 0.5, 0.3)[0]
    )


def test_the_statistics_of_batch_norm_are_those_of_one_pass():
    learn, plain = learner(SAM(0.5), norm=True, lr=0.0).fit(2), learner(norm=True, lr=0.0).fit(2)
    for a, b in zip(learn.model.buffers(), plain.model.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hook", ["after_forward", "before_backward", "after_backward"])
@pytest.mark.parametrize("error", [ConnectionAbortedError, KeyboardInterrupt])
def test_after_an_error_uphill_the_weights_are_those_before_the_step(hook, error):
    class Raise(Callback):
        """In the second pass of the third batch."""

        def __init__(self) -> None:
            self.n = 0

        def before_batch(self, learn: Learner) -> None:
            self.n, self.kept = 0, [*weights(learn)]

        def after_forward(self, learn: Learner) -> None:
            self.n += 1
            self.meet(learn, "after_forward")

        def before_backward(self, learn: Learner) -> None:
            self.meet(learn, "before_backward")

        def after_backward(self, learn: Learner) -> None:
            self.meet(learn, "after_backward")

        def meet(self, learn: Learner, at: str) -> None:
            if at == hook and self.n == 2 and learn.batch_index == 2:
                raise error

    fails = Raise()
    learn = learner(SAM(0.5), fails)
    with pytest.raises(error):
        learn.fit(1)
    for p, q in zip(weights(learn), fails.kept, strict=True):
        assert torch.equal(p, q)
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


def test_beside_averages_lookahead_and_bfloat16_a_step_is_one_step():
    ema = EMA(0.5)
    learn = learner(SAM(), ema, Lookahead(2), valid=batches(4)).to_bf16().fit(2)
    assert learn.step == ema.n_updates == 8 == len(learn.recorder.losses)
    near = learner(SAM(), Lookahead(2)).fit(2)
    torch.testing.assert_close(weights(learn), weights(near), rtol=0, atol=0.02)
    averages = [callback for callback in learn.callbacks if isinstance(callback, EMA)]
    assert averages == [ema] and learn.validate()["valid_loss"] > 0


def test_frozen_parameters_do_not_climb():
    learn = learner(SAM(1.0))
    learn.model[0].weight.requires_grad_(False)
    learn.fit(1)
    assert torch.equal(learn.model[0].weight, net()[0].weight) and not torch.equal(
        learn.model[3].weight, net()[3].weight
    )


@pytest.mark.parametrize("at", [(0, 1), (1, 2)])
def test_a_resumed_fit_is_the_one_that_was_not_interrupted(at):
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.batch_index) == at:
                raise ConnectionAbortedError

    def make(folder: str) -> Learner:
        [(x, y)] = batches(22)
        model = nn.Sequential(*net(), nn.Dropout(0.2))
        return Learner(
            DataBunch.from_tensors((x, y), bs=4),
            model,
            lr=0.05,
            seed=1,
            callbacks=[SAM(), Checkpoint(folder, every_n_steps=1)],
        )

    plain = make("a").fit(3)
    with pytest.raises(ConnectionAbortedError):
        make("b").fit(3, callbacks=[Die()])
    learn = make("b").fit(3, resume=True)
    for p, q in zip(weights(learn), weights(plain), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "other, message",
    [
        (
            lambda: Accumulate(2),
            "SAM cannot be combined with Accumulate: its second pass needs the whole batch of a step at once",
        ),
        (
            lambda: AutoMicrobatch(),
            "SAM cannot be combined with AutoMicrobatch: its second pass needs the whole batch of a step at once",
        ),
        (
            lambda: MixedPrecision(torch.float16),
            r"SAM cannot be combined with float16: it moves along gradients that sometimes overflow.*"
            r"Use to_bf16\(\) or to_fp32\(\)",
        ),
    ],
)
def test_what_it_cannot_go_with_is_refused_before_the_first_step(other, message):
    learn = learner(SAM(), other())
    with pytest.raises(ValueError, match=message):
        learn.fit(1)
    assert learn.step == 0
    for p, q in zip(weights(learn), net().parameters(), strict=True):
        assert torch.equal(p, q)


def test_with_windows_of_one_batch_it_goes_with_accumulate():
    torch.testing.assert_close(
        weights(learner(SAM(0.3), Accumulate(1)).fit(2)), by_hand(batches(4, 4, 3, 4) * 2, 0.3)[0]
    )


def test_a_distance_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"rho=0: expected a distance above 0, such as 0.05"):
        SAM(0)
