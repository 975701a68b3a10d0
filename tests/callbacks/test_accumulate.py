"""Accumulate: a step of k batches is the step of one batch of all their samples, however the window ends."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from learnkit import Callback, DataBunch, Learner, SkipBackward, SkipBatch, SkipForward, StopEpoch, StopFit, StopTrain
from learnkit.callbacks import EMA, Accumulate, Checkpoint, ClipGradients, StopAfter

Batch = tuple[Tensor, Tensor]
PLACES = (
    "count",
    "whole",
    "in_step",
    "n_held",
    "differentiate",
    "no_sync",
    "reduce_gradients",
    "n_of_all",
    "training_model",
)


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)) for n in sizes]


class Stream(IterableDataset[Batch]):
    """Batches whose number is not known before they end."""

    def __init__(self, given: list[Batch]) -> None:
        self.given = given

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.given)


def stream(given: list[Batch]) -> DataLoader[Any]:
    return DataLoader(Stream(given), batch_size=None)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def learner(
    train: Any, *callbacks: Callback, valid: Any = None, opt_func: Any = torch.optim.SGD, **options: Any
) -> Learner:
    return Learner((train, valid), net(), opt_func=opt_func, lr=0.1, wd=0.0, callbacks=callbacks, **options)


def by_hand(
    windows: list[list[Batch]], loss_func: Callable[..., Tensor] = F.mse_loss
) -> tuple[list[Tensor], list[float]]:
    """One plain step on all samples of each window at once."""
    model, losses = net(), []
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in windows:
        loss = loss_func(model(torch.cat([x for x, _ in window])), torch.cat([y for _, y in window]))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return list(model.parameters()), losses


def windows(given: list[Any], n: int) -> list[list[Any]]:
    return [given[i : i + n] for i in range(0, len(given), n)]


def assert_same(learn: Learner, expected: tuple[list[Tensor], list[float]]) -> None:
    weights, losses = expected
    torch.testing.assert_close(list(learn.model.parameters()), weights, rtol=1e-5, atol=1e-6)
    assert learn.recorder.losses == pytest.approx(losses, rel=1e-5)
    assert learn.step == len(losses)


SIZES = {"equal": [4] * 6, "a last short batch": [4] * 6 + [1], "all different": [3, 1, 5, 2, 7, 4, 1]}


@pytest.mark.parametrize("kind", [list, stream], ids=["known length", "unknown length"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_window_equals_one_batch_of_all_its_samples(sizes, n, kind):
    given = batches(*sizes)
    learn = learner(kind(given), Accumulate(n)).fit(2)
    assert_same(learn, by_hand(windows(given, n) * 2))
    assert learn.n_steps == (2 * len(windows(given, n)) if kind is list else None)


def test_train_loss_is_the_mean_over_the_samples_of_the_epoch():
    given = batches(3, 1, 5, 2, 4)
    learn = learner(given, Accumulate(2))
    learn.fit(1, lr=0.0)
    expected = F.mse_loss(net()(torch.cat([x for x, _ in given])), torch.cat([y for _, y in given]))
    assert learn.recorder.values[0][0] == pytest.approx(expected.item(), rel=1e-5)


# --- tok ---------------------------------------------------------------------
IGNORED = -100


def sentences() -> list[Batch]:
    """(2, length) tokens with very different numbers of those that count, one batch with none."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for n in (12, 1, 7, 3, 9, 2, 5):
        target = torch.randint(3, (2, 6), generator=generator).flatten()
        target[torch.randperm(12, generator=generator)[n:]] = IGNORED
        made.append((torch.randn(12, 4, generator=generator), target))
    return made


def n_tokens(inputs: Any, target: Tensor) -> Tensor:
    return (target != IGNORED).sum()


def token_net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def token_loss(pred: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(pred, target, ignore_index=IGNORED)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 9])
def test_with_a_count_of_tokens_each_token_of_a_window_weighs_alike(n):
    given, model = sentences(), token_net()
    learn = Learner((given, None), token_net(), loss_func=token_loss, opt_func=torch.optim.SGD, lr=0.5, wd=0.0)
    learn.fit(1, callbacks=[Accumulate(n, count=n_tokens)])
    opt, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for window in windows(given, n):
        opt.zero_grad()
        loss = token_loss(model(torch.cat([x for x, _ in window])), torch.cat([y for _, y in window]))
        loss.backward()
        opt.step()
        losses.append(loss.item())
    torch.testing.assert_close(learn.model.weight, model.weight)
    assert learn.recorder.losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "count",
    [n_tokens, lambda x, y: int(n_tokens(x, y)), lambda x, y: n_tokens(x, y).float()],
    ids=["int64", "int", "float"],
)
@pytest.mark.parametrize("n", [2, 3, 9])
def test_counts_of_a_float64_model_are_exact(n, count):
    """Whole numbers in tensors divide in float32: gradients were 6e-8 off."""
    given, model = [(x.double(), y) for x, y in sentences()], token_net().double()
    learn = Learner((given, None), token_net().double(), loss_func=token_loss, opt_func=torch.optim.SGD, lr=0.5, wd=0.0)
    learn.fit(1, callbacks=[Accumulate(n, count=count)])
    for window in windows(given, n):
        loss = token_loss(model(torch.cat([x for x, _ in window])), torch.cat([y for _, y in window]))
        for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data -= 0.5 * gradient
    torch.testing.assert_close(learn.model.state_dict(), model.state_dict(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("empty", [0, 1, 4])
def test_a_batch_that_counts_for_nothing_adds_nothing(empty):
    def loss_sum_over_count(pred: Tensor, target: Tensor) -> Tensor:
        summed = F.cross_entropy(pred, target, ignore_index=IGNORED, reduction="sum")
        return summed / (target != IGNORED).sum().clamp(min=1)

    given, results = sentences(), []
    without = [batch for i, batch in enumerate(given) if i != empty]
    given[empty] = (given[empty][0], torch.full_like(given[empty][1], IGNORED))
    for train in (given, without):
        learn = Learner(
            (train, None), token_net(), loss_func=loss_sum_over_count, opt_func=torch.optim.SGD, lr=0.5, wd=0.0
        )
        results.append(learn.fit(1, callbacks=[Accumulate(7, count=n_tokens)]).model.weight)
        assert bool(results[-1].isfinite().all())
    torch.testing.assert_close(*results)


# --- steps, not b ------------------------------------------------------------
def test_schedules_callbacks_and_limits_see_optimizer_steps():
    class Seen(Callback):
        def __init__(self) -> None:
            self.before, self.after = [], []

        def before_step(self, learn: Learner) -> None:
            self.before.append((learn.step, learn.batch_index))

        def after_step(self, learn: Learner) -> None:
            self.after.append(learn.step)

    given, seen = batches(*[4] * 7), Seen()
    joined = [(torch.cat([x for x, _ in w]), torch.cat([y for _, y in w])) for w in windows(given, 3)]
    learn = learner(given, Accumulate(3), seen).fit_one_cycle(2, 0.1)
    plain = learner(joined).fit_one_cycle(2, 0.1)
    assert learn.recorder.lrs == plain.recorder.lrs and learn.recorder.moms == plain.recorder.moms
    assert learn.n_steps == plain.n_steps == 6
    assert seen.before == [(0, 2), (1, 5), (2, 6), (3, 2), (4, 5), (5, 6)] and seen.after == [1, 2, 3, 4, 5, 6]
    assert learner(given, Accumulate(3)).fit(2, max_steps=4).step == 4
    assert learner(given, Accumulate(3)).fit(2, callbacks=[StopAfter(steps=2)]).recorder.losses == pytest.approx(
        by_hand(windows(given, 3)[:2])[1]
    )


def averages(ema: EMA) -> list[Tensor]:
    assert ema.average is not None
    return list(ema.average.values.values())


def test_adaptive_optimizers_momentum_clipping_and_averages_see_the_whole_window():
    given = batches(3, 1, 5, 2, 7, 4, 1)
    joined = [(torch.cat([x for x, _ in w]), torch.cat([y for _, y in w])) for w in windows(given, 3)]
    results = []
    for train, more in ((given, [Accumulate(3)]), (joined, [])):
        clip, ema = ClipGradients(0.3), EMA(0.5)
        learn = learner(train, *more, clip, ema, opt_func=torch.optim.AdamW).fit(2)
        results.append(([*learn.model.parameters(), *averages(ema)], clip.norms))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4) and len(results[0][1]) == 6


# --- leaving a window in its mi ----------------------------------------------
class Raise(Callback):
    """Raises at a batch of an epoch, in one hook."""

    order = 5

    def __init__(self, error: Any, hook: str, batch: int, epoch: int = 0) -> None:
        self.error, self.hook, self.at = error, hook, (epoch, batch)

    def meet(self, learn: Learner, hook: str) -> None:
        if learn.training and hook == self.hook and (learn.epoch, learn.batch_index) == self.at:
            raise self.error

    def before_batch(self, learn: Learner) -> None:
        self.meet(learn, "before_batch")

    def before_forward(self, learn: Learner) -> None:
        self.meet(learn, "before_forward")

    def before_backward(self, learn: Learner) -> None:
        self.meet(learn, "before_backward")

    def after_backward(self, learn: Learner) -> None:
        self.meet(learn, "after_backward")

    def after_batch(self, learn: Learner) -> None:
        self.meet(learn, "after_batch")


@pytest.mark.parametrize("signal", [StopTrain, StopEpoch])
@pytest.mark.parametrize("hook", ["before_batch", "before_backward", "after_batch"])
def test_what_is_left_of_a_window_when_an_epoch_is_stopped_does_not_leak_into_the_next(signal, hook):
    given = batches(*[4] * 6)
    learn = learner(given, Accumulate(3), Raise(signal, hook, 4)).fit(2)
    assert_same(learn, by_hand([given[:3], given[:3], given[3:]]))
    assert learn.n_held == 0


def test_a_fit_that_is_stopped_within_a_window_leaves_nothing_behind():
    given = batches(*[4] * 6)
    learn = learner(given, Accumulate(3), Raise(StopFit, "after_batch", 3)).fit(2)
    assert_same(learn, by_hand([given[:3]]))
    assert learn.n_held == 0 and all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


@pytest.mark.parametrize("kind", [list, stream], ids=["known length", "unknown length"])
@pytest.mark.parametrize(
    "signal, hook", [(SkipBatch, "before_batch"), (SkipForward, "before_forward"), (SkipBackward, "before_backward")]
)
@pytest.mark.parametrize("skipped", [0, 2, 5])
def test_a_batch_that_is_skipped_weighs_nothing_in_its_window(signal, hook, skipped, kind):
    """Also the last one of the epoch, which would have ended the window."""
    given = batches(3, 1, 5, 2, 7, 4)
    learn = learner(kind(given), Accumulate(6), Raise(signal, hook, skipped)).fit(1)
    assert_same(learn, by_hand([[batch for i, batch in enumerate(given) if i != skipped]]))


def test_a_window_whose_batches_were_all_skipped_changes_nothing():
    class SkipAll(Callback):
        def before_backward(self, learn: Learner) -> None:
            raise SkipBackward

    learn = learner(batches(3, 1, 5), SkipAll(), Accumulate(2)).fit(1)
    torch.testing.assert_close(list(learn.model.parameters()), list(net().parameters()), rtol=0, atol=0)
    assert all(loss == loss for loss in learn.recorder.losses)  # no NaN


@pytest.mark.parametrize("hook", ["before_batch", "before_forward", "before_backward", "after_backward", "after_batch"])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_error_within_a_window_leaves_everything_as_it_was(hook, batch):
    given = batches(*[4] * 6)
    learn = learner(given, Accumulate(3))
    before = {name: getattr(learn, name) for name in PLACES}
    with pytest.raises(ConnectionAbortedError):
        learn.fit(1, callbacks=[Raise(ConnectionAbortedError(), hook, batch)])
    assert {name: getattr(learn, name) for name in PLACES} == before
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    learn.model.load_state_dict(net().state_dict())
    assert_same(learn.fit(1), by_hand(windows(given, 3)))


def test_a_validation_within_a_window_changes_nothing():
    class Validate(Callback):
        def after_batch(self, learn: Learner) -> None:
            if learn.training:
                learn.validate()

        def after_backward(self, learn: Learner) -> None:
            learn.validate()

    given = batches(3, 1, 5, 2)
    learn = learner(given, Accumulate(3), Validate(), valid=batches(4, 4)).fit(1)
    assert_same(learn, by_hand(windows(given, 3)))


# --- two ---------------------------------------------------------------------
class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def sum_of_two(pred: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(pred[0], target) + F.l1_loss(pred[1], target)


class OneAfterTheOther(Callback):
    """Differentiates two losses by themselves."""

    order = 50

    def around_backward(self, learn: Learner, run: Any) -> None:
        whole = learn.loss
        try:
            for loss in (F.mse_loss(learn.pred[0], learn.target), F.l1_loss(learn.pred[1], learn.target)):
                learn.loss = loss
                run()
        finally:
            learn.loss = whole


@pytest.mark.parametrize("half", [False, True])
def test_two_losses_differentiated_apart_equal_their_sum(half):
    given, results = batches(3, 1, 5, 2), []
    for more in ([], [OneAfterTheOther()]):
        learn = Learner((given, None), TwoHeads(), loss_func=sum_of_two, opt_func=torch.optim.SGD, lr=0.1, wd=0.0)
        if half:
            learn.to_fp16(init_scale=64.0)
        learn.fit(2, callbacks=[Accumulate(3), *more])
        results.append((list(learn.model.parameters()), learn.recorder.losses))
    torch.testing.assert_close(*[weights for weights, _ in results])
    assert results[0][1] == pytest.approx(results[1][1])
    joined = [(torch.cat([x for x, _ in w]), torch.cat([y for _, y in w])) for w in windows(given, 3)]
    plain = Learner((joined, None), TwoHeads(), loss_func=sum_of_two, opt_func=torch.optim.SGD, lr=0.1, wd=0.0).fit(2)
    tolerance = 2e-3 if half else 1e-6
    torch.testing.assert_close(results[1][0], list(plain.model.parameters()), rtol=tolerance, atol=tolerance)


# --- -------------------------------------------------------------------------
class SignalAt(Callback):
    """Sends this process a signal during a batch, by its number in the whole fit; dies after one, as if killed."""

    order = Checkpoint.order - 10

    def __init__(self, number: int, at: int, dies: bool) -> None:
        self.number, self.at, self.dies, self.n = number, at, dies, 0

    def after_backward(self, learn: Learner) -> None:
        if self.n == self.at:
            os.kill(os.getpid(), self.number)

    def after_batch(self, learn: Learner) -> None:
        if not learn.training:
            return
        self.n += 1
        if self.dies and self.n == self.at + 1:
            raise ConnectionAbortedError


def interruptible(n: int, **options: Any) -> Learner:
    torch.manual_seed(4)
    x, y = torch.randn(30, 4), torch.randn(30, 2)
    data = DataBunch.from_tensors((x, y), (x[:5], y[:5]), bs=4, drop_last=False)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))
    return Learner(data, model, lr=0.01, callbacks=[Accumulate(n, **options), Checkpoint("kept", every_n_steps=1)])


def state(learn: Learner) -> Any:
    return (
        [v.tolist() for v in learn.model.state_dict().values()],
        learn.recorder.losses,
        learn.recorder.values,
        learn.recorder.lrs,
        learn.step,
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize(
    "options", [{}, {"count": lambda inputs, target: (inputs[0][:, 0] > 0).sum()}], ids=["samples", "a count"]
)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["killed after a save", "SIGTERM"])
def test_a_fit_stopped_at_any_batch_of_a_window_and_resumed_is_the_one_that_was_not(
    number, options, monkeypatch, tmp_path
):
    expected = state(interruptible(3, **options).fit_one_cycle(2, 0.05))
    for at in (0, 1, 2, 4, 7, 8, 12):  # of two times eight batches, in windows of three
        folder = tmp_path / str(at)
        folder.mkdir()
        monkeypatch.chdir(folder)
        with pytest.raises(ConnectionAbortedError if number == signal.SIGUSR1 else SystemExit):
            interruptible(3, **options).fit_one_cycle(
                2, 0.05, callbacks=[SignalAt(number, at, number == signal.SIGUSR1)]
            )
        learn = interruptible(3, **options)
        torch.manual_seed(99)
        assert state(learn.fit_one_cycle(2, 0.05, resume=True)) == expected, f"stopped at batch {at}"


def test_a_fit_killed_within_a_window_goes_on_from_its_start():
    expected = state(interruptible(3).fit_one_cycle(2, 0.05))

    class Die(Callback):
        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.batch_index) == (1, 4):
                raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        interruptible(3).fit_one_cycle(2, 0.05, callbacks=[Die()])
    assert state(interruptible(3).fit_one_cycle(2, 0.05, resume=True)) == expected


# --- w -----------------------------------------------------------------------
@pytest.mark.parametrize("n", [0, -1, 2.5, True, "2"])
def test_a_number_of_batches_that_is_none_is_refused(n):
    with pytest.raises(ValueError, match=r"n=.*expected a number of batches, 1 or more"):
        Accumulate(n)


def test_a_count_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"count=3, expected a function \(inputs, target\) -> number"):
        Accumulate(2, count=3)  # type: ignore[arg-type]
