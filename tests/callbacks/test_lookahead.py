"""Lookahead: k steps forward, one step back, as in the paper; other callbacks see what comes of it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner, SkipStep
from learnkit.callbacks import EMA, Accumulate, Checkpoint, ClipGradients, Lookahead, MixedPrecision

Batch = tuple[Tensor, Tensor]


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)) for n in sizes]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def learner(*callbacks: Callback, train: Any = None, **options: Any) -> Learner:
    return Learner(
        (train or batches(4, 4, 3, 4, 2), None),
        net(),
        callbacks=callbacks,
        **{"opt_func": torch.optim.SGD, "lr": 0.1, "wd": 0.0} | options,
    )


def weights(learn: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in learn.model.parameters()]


def by_hand(given: list[Batch], k: int, alpha: float, clip: float | None = None) -> list[Tensor]:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    slow = [p.detach().clone() for p in model.parameters()]
    for i, (x, y) in enumerate(given, 1):
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        if i % k == 0:
            slow = [s + alpha * (p.detach() - s) for s, p in zip(slow, model.parameters(), strict=True)]
            with torch.no_grad():
                for p, s in zip(model.parameters(), slow, strict=True):
                    p.copy_(s)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("k, alpha", [(1, 0.5), (2, 0.5), (3, 0.8), (5, 0.0), (2, 1.0), (100, 0.5)])
def test_it_is_the_algorithm_by_hand_also_over_the_ends_of_epochs(k, alpha):
    torch.testing.assert_close(
        weights(learner(Lookahead(k, alpha)).fit(3)), by_hand(batches(4, 4, 3, 4, 2) * 3, k, alpha)
    )


@pytest.mark.parametrize("n", [2, 3])
def test_it_counts_optimizer_steps_and_goes_back_after_clipping(n):
    given = batches(4, 4, 3, 4, 2)
    joined: Any = [tuple(map(torch.cat, zip(*given[i : i + n], strict=True))) for i in range(0, 5, n)]
    learn = learner(Lookahead(2, 0.4), Accumulate(n), ClipGradients(0.2)).fit(2)
    torch.testing.assert_close(weights(learn), by_hand(joined * 2, 2, 0.4, 0.2))


def test_what_is_averaged_recorded_and_validated_is_what_it_went_back_to():
    class Seen(Callback):
        order = Lookahead.order - 1  # those of a higher order are told within its step

        def __init__(self) -> None:
            self.kept: list[list[Tensor]] = []

        def after_step(self, learn: Learner) -> None:
            self.kept.append(weights(learn))

    ema, seen = EMA(0.0), Seen()
    learn = learner(Lookahead(2), ema, seen).fit(2)
    assert ema.average is not None
    torch.testing.assert_close([ema.average.values[n] for n, _ in learn.model.named_parameters()], weights(learn))
    given = batches(4, 4, 3, 4, 2) * 2
    for i, kept in enumerate(seen.kept, 1):
        torch.testing.assert_close(kept, by_hand(given[:i], 2, 0.5))


def test_a_step_that_is_skipped_is_none_of_the_k():
    class SkipSome(Callback):
        def before_step(self, learn: Learner) -> None:
            if learn.batch_index in (1, 3):
                learn.zero_grad()
                raise SkipStep

    given = batches(4, 4, 3, 4, 2)
    torch.testing.assert_close(
        weights(learner(Lookahead(2), SkipSome()).fit(1)), by_hand([given[0], given[2], given[4]], 2, 0.5)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_mixed_precision_it_comes_near_float32(dtype):
    half = learner(Lookahead(2), MixedPrecision(dtype, init_scale=64.0)).fit(2)
    torch.testing.assert_close(weights(half), by_hand(batches(4, 4, 3, 4, 2) * 2, 2, 0.5), rtol=0, atol=0.02)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_after_an_error_the_next_fit_begins_from_the_weights_as_they_are():
    class Raise(Callback):
        def after_step(self, learn: Learner) -> None:
            if learn.step == 3:
                raise ConnectionAbortedError

    learn = learner(Lookahead(2))
    with pytest.raises(ConnectionAbortedError):
        learn.fit(1, callbacks=[Raise()])
    learn.model.load_state_dict(net().state_dict())
    torch.testing.assert_close(weights(learn.fit(1)), by_hand(batches(4, 4, 3, 4, 2), 2, 0.5))


@pytest.mark.parametrize("at", [(0, 1), (0, 4), (1, 2), (2, 3)])
def test_a_resumed_fit_goes_back_to_where_one_that_was_not_interrupted_does(at):
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.batch_index) == at:
                raise ConnectionAbortedError

    def make(folder: str) -> Learner:
        x, y = torch.cat([x for x, _ in batches(22)]), torch.cat([y for _, y in batches(22)])
        data = DataBunch.from_tensors((x, y), bs=4)
        return Learner(data, net(), lr=0.05, seed=1, callbacks=[Lookahead(3), Checkpoint(folder, every_n_steps=1)])

    plain = make("a").fit(3)
    with pytest.raises(ConnectionAbortedError):
        make("b").fit(3, callbacks=[Die()])
    learn = make("b").fit(3, resume=True)
    for p, q in zip(weights(learn), weights(plain), strict=True):
        assert torch.equal(p, q)


def test_numbers_that_are_none_are_refused():
    for k in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match=r"k=.*expected a number of steps, 1 or more"):
            Lookahead(k)  # type: ignore[arg-type]
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"alpha={alpha}: expected a number from 0 to 1"):
            Lookahead(alpha=alpha)
