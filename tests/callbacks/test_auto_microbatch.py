"""AutoMicrobatch: a batch that does not fit is split until it does, with the numbers of the whole one."""
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner, SkipBackward
from learnkit.callbacks import EMA, Accumulate, AutoMicrobatch, Checkpoint, ClipGradients, MixedPrecision

Batch = tuple[Tensor, Tensor]


class Limited(nn.Module):
    """Holds so many samples in training and no more; notes how many it was given."""

    def __init__(self, limit: int, *extra: nn.Module, late: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.head = nn.Linear(4, 6), nn.Sequential(*extra), nn.Linear(6, 2)
        self.limit, self.late, self.seen = limit, late, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training: self.seen.append(len(x))
        x = self.extra(self.first(x))
        if self.training and len(x) > self.limit:
            if not self.late: raise torch.OutOfMemoryError(f"{len(x)} samples")
            x = Fails.apply(x)          # in the backward pass
        return self.head(torch.tanh(x))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor: return x.clone()
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor: raise torch.OutOfMemoryError("in the backward pass")


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)) for n in sizes]


def learner(model: nn.Module, *callbacks: Callback, train: Any = None, valid: Any = None, **options: Any) -> Learner:
    options = {"opt_func": torch.optim.SGD, "lr": .1, "wd": 0.} | options
    return Learner((train or batches(8, 8, 8, 5), valid), model, callbacks=callbacks, **options)


def weights(learn: Learner) -> list[Tensor]: return [p.detach().clone() for p in learn.model.parameters()]


def assert_near(a: Learner, b: Learner) -> None:
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-5, atol=1e-6)
    assert a.recorder.losses == pytest.approx(b.recorder.losses, rel=1e-5) and a.step == b.step


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("limit, size, first", [(8, None, [8]), (7, 4, [8, 4, 4]), (3, 2, [8, 4, 2, 2, 2, 2]), (1, 1, [8, 4, 2, 1] + [1] * 7)])
def test_a_batch_is_halved_until_it_fits_and_has_the_numbers_of_the_whole_one(limit, size, first, late):
    auto, model = AutoMicrobatch(), Limited(limit, late=late)
    split, whole = learner(model, auto).fit(2), learner(Limited(99)).fit(2)
    assert_near(split, whole)
    assert model.seen[:len(first)] == first and auto.size == size
    part = size or 8
    last = {8: [5], 4: [3, 2], 2: [2, 2, 1], 1: [1] * 5}[part]
    rest = [part] * (8 // part) * 2 + last
    assert model.seen[len(first):len(first) + len(rest)] == rest        # no batch is tried whole again


@pytest.mark.parametrize("size, parts", [(3, [3, 3, 2]), (5, [4, 4]), (7, [4, 4]), (8, [8])])
def test_parts_are_about_alike_and_count_for_what_they_are(size, parts):
    model = Limited(99)
    assert_near(learner(model, AutoMicrobatch(size)).fit(2), learner(Limited(99)).fit(2))
    assert model.seen[:len(parts)] == parts


def test_batch_norm_gets_no_last_part_of_one_sample():
    model = Limited(99, nn.BatchNorm1d(6))
    learner(model, AutoMicrobatch(4), train=batches(9, 5, 11)).fit(1)
    assert model.seen == [3, 3, 3, 3, 2, 4, 4, 3]


def test_a_batch_that_fits_is_trained_as_without_it_bit_for_bit():
    plain, auto = learner(Limited(99, nn.Dropout(.5))), learner(Limited(99, nn.Dropout(.5)), AutoMicrobatch())
    for learn in (plain, auto):
        torch.manual_seed(7)
        learn.fit(2)
    for p, q in zip(weights(plain), weights(auto), strict=True): assert torch.equal(p, q)
    assert plain.recorder.losses == auto.recorder.losses


def test_a_failed_attempt_leaves_no_trace_in_random_numbers_and_statistics():
    """A fit that finds out the size is the one that was told it."""
    def make(size: int | None) -> Learner:
        return learner(Limited(3, nn.BatchNorm1d(6), nn.Dropout(.5)), AutoMicrobatch(size), train=batches(8, 8, 6))
    found, told = make(None), make(2)
    for learn in (found, told):
        torch.manual_seed(7)
        learn.fit(2)
    for a, b in zip(found.model.state_dict().values(), told.model.state_dict().values(), strict=True): assert torch.equal(a, b)
    assert found.recorder.losses == told.recorder.losses


def test_others_are_told_of_a_batch_and_a_step_once():
    class Count(Callback):
        def __init__(self) -> None: self.batches, self.steps, self.sizes = 0, 0, []
        def before_batch(self, learn: Learner) -> None: self.batches += 1
        def after_batch(self, learn: Learner) -> None: self.sizes.append(len(learn.target))
        def after_step(self, learn: Learner) -> None: self.steps += 1
    count, clip, ema = Count(), ClipGradients(.3), EMA(.5)
    split = learner(Limited(3), AutoMicrobatch(), count, clip, ema).fit(1)
    assert (count.batches, count.steps, count.sizes, ema.n_updates) == (4, 4, [8, 8, 8, 5], 4)
    whole_clip = ClipGradients(.3)
    assert_near(split, learner(Limited(99), whole_clip).fit(1))
    assert clip.norms == pytest.approx(whole_clip.norms, rel=1e-4)


@pytest.mark.parametrize("limit", [99, 3, 1])
@pytest.mark.parametrize("n", [2, 3, 9])
def test_beside_accumulate_the_windows_are_the_same(limit, n):
    given = batches(8, 6, 8, 5, 7)
    assert_near(learner(Limited(limit), AutoMicrobatch(), Accumulate(n), train=given).fit(2), learner(Limited(99), Accumulate(n), train=given).fit(2))


def test_memory_that_runs_out_within_a_window_keeps_its_earlier_batches():
    given = batches(4, 4, 8, 4)
    assert_near(learner(Limited(5), AutoMicrobatch(), Accumulate(4), train=given).fit(1), learner(Limited(99), Accumulate(4), train=given).fit(1))


def positive(inputs: Any, target: Tensor) -> Tensor: return (target[:, 0] > 0).sum()


def loss_of_positive(pred: Tensor, target: Tensor) -> Tensor:
    counted = (target[:, :1] > 0).float()
    return ((pred - target).pow(2) * counted).sum() / counted.sum().clamp(min=1)


@pytest.mark.parametrize("n", [1, 2])
def test_parts_count_by_what_accumulate_counts(n):
    options = {"loss_func": loss_of_positive, "train": batches(8, 6, 8, 5)}
    split = learner(Limited(2), AutoMicrobatch(), Accumulate(n, count=positive), **options).fit(2)
    assert_near(split, learner(Limited(99), Accumulate(n, count=positive), **options).fit(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pure", [False, True])
def test_beside_mixed_precision_the_parts_make_up_the_batch(dtype, pure):
    split, whole = (learner(Limited(limit), AutoMicrobatch(), MixedPrecision(dtype, pure=pure, init_scale=32.)).fit(2) for limit in (3, 99))
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=.01)
    assert not torch.is_autocast_enabled("cpu")


def test_an_error_of_another_kind_is_not_taken_for_one_of_memory_and_leaves_all_as_it_was():
    class Raise(Callback):
        def after_forward(self, learn: Learner) -> None:
            if learn.training and len(learn.target) == 1: raise ConnectionAbortedError     # a last part
    given = batches(7, 7)
    learn = learner(Limited(4), AutoMicrobatch(), Accumulate(2), train=given)
    before = {name: getattr(learn, name) for name in ("count", "whole", "n_held", "no_sync", "differentiate", "in_step")}
    with pytest.raises(ConnectionAbortedError): learn.fit(1, callbacks=[Raise()])
    assert {name: getattr(learn, name) for name in before} == before
    learn.model.load_state_dict(Limited(4).state_dict())
    assert_near(learn.fit(1), learner(Limited(99), Accumulate(2), train=given).fit(1))


@pytest.mark.parametrize("late", [False, True])
def test_where_not_even_one_sample_fits_the_error_is_that_of_the_memory(late):
    learn = learner(Limited(0, late=late), AutoMicrobatch())
    with pytest.raises(torch.OutOfMemoryError, match=r"1 samples|backward"): learn.fit(1)
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


def test_a_backward_pass_that_is_skipped_for_one_part_leaves_that_part_out():
    class Skip(Callback):
        n = 0
        def before_backward(self, learn: Learner) -> None:
            self.n += 1
            if self.n == 2: raise SkipBackward
    given = batches(8)
    x, y = given[0]
    half = learner(Limited(99), train=[(x[:4], y[:4])], lr=.05).fit(1)      # four of eight samples: half the gradient of their mean
    torch.testing.assert_close(weights(learner(Limited(99), AutoMicrobatch(4), Skip(), train=given).fit(1)), weights(half))


def test_validations_are_whole():
    model = Limited(3)
    learn = learner(model, AutoMicrobatch(), valid=batches(8)).fit(1)
    assert learn.validate()["valid_loss"] == pytest.approx(learn.recorder.values[-1][1])


def test_inputs_by_keyword_and_several_inputs_are_cut_alike():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(4, 2)
        def forward(self, x: Tensor, scale: Tensor, of_all: Tensor) -> Tensor: return self.a(x) * scale * of_all
    (x, y), scale = batches(8)[0], torch.rand(8, 1)
    forms: list[Any] = [{"x": x, "scale": scale, "of_all": torch.tensor(2.), "labels": y}, (x, scale, torch.tensor(2.), y)]
    for batch in forms:
        assert_near(learner(Two(), AutoMicrobatch(3), train=[batch]).fit(2), learner(Two(), train=[batch]).fit(2))


def test_inputs_that_share_no_dimension_are_refused_with_their_shapes():
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)
        def forward(self, x: Tensor, other: Tensor) -> Tensor: return self.a(x) + other.sum()
    (x, y) = batches(8)[0]
    with pytest.raises(ValueError, match=r"splits inputs along their first dimension, which they must share; got \(float32 \(8, 4\), float32 \(3,\)\)"):
        learner(First(), AutoMicrobatch(2), train=[(x, torch.rand(3), y)]).fit(1)


def test_a_resumed_fit_goes_on_with_the_size_that_was_found():
    class Die(Callback):
        order = Checkpoint.order - 10
        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.batch_index) == (1, 1): raise ConnectionAbortedError

    def make(folder: str) -> tuple[Learner, Limited]:
        [(x, y)] = batches(24)
        model = Limited(3, nn.BatchNorm1d(6), nn.Dropout(.3))
        data = DataBunch.from_tensors((x, y), bs=8)
        return Learner(data, model, lr=.05, seed=1, callbacks=[AutoMicrobatch(), Checkpoint(folder, every_n_steps=1)]), model
    plain, _ = make("a")
    plain.fit(2)
    with pytest.raises(ConnectionAbortedError): make("b")[0].fit(2, callbacks=[Die()])
    learn, model = make("b")
    learn.fit(2, resume=True)
    assert max(model.seen) == 2
    for p, q in zip(weights(learn), weights(plain), strict=True): assert torch.equal(p, q)


def test_each_fit_begins_with_the_size_that_was_given():
    auto, model = AutoMicrobatch(), Limited(3)
    learn = learner(model, auto).fit(1)
    assert auto.size == 2
    model.limit = 99
    learn.fit(1)
    assert auto.size is None and model.seen[-4:] == [8, 8, 8, 5]


@pytest.mark.parametrize("size", [0, -1, True, 2.])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=r"size=.*expected a whole number of samples, 1 or more"): AutoMicrobatch(size)
