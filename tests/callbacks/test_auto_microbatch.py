"""AutoMicrobatch: a batch that does not fit is split until it does, with the numbers of the whole one."""

import time
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner, SkipBackward, StopFit
from learnkit.callbacks import EMA, Accumulate, AutoMicrobatch, Checkpoint, ClipGradients, MixedPrecision
from learnkit.distributed import RankFailed, get_rank, init_process_group, launch

Batch = tuple[Tensor, Tensor]


class Limited(nn.Module):
    """Holds so many samples in training and no more; notes how many it was given."""

    def __init__(self, limit: int, *extra: nn.Module, late: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.head = nn.Linear(4, 6), nn.Sequential(*extra), nn.Linear(6, 2)
        self.limit, self.late, self.seen = limit, late, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(len(x))
        x = self.extra(self.first(x))
        if self.training and len(x) > self.limit:
            if not self.late:
                raise torch.OutOfMemoryError(f"{len(x)} samples")
            x = Fails.apply(x)  # in the backward pass
        return self.head(torch.tanh(x))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("in the backward pass")


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)) for n in sizes]


def learner(model: nn.Module, *callbacks: Callback, train: Any = None, valid: Any = None, **options: Any) -> Learner:
    options = {"opt_func": torch.optim.SGD, "lr": 0.1, "wd": 0.0} | options
    return Learner((train or batches(8, 8, 8, 5), valid), model, callbacks=callbacks, **options)


def weights(learn: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in learn.model.parameters()]


def assert_near(a: Learner, b: Learner) -> None:
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-5, atol=1e-6)
    assert a.recorder.losses == pytest.approx(b.recorder.losses, rel=1e-5) and a.step == b.step


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "limit, size, first",
    [(8, None, [8]), (7, 4, [8, 4, 4]), (3, 2, [8, 4, 2, 2, 2, 2]), (1, 1, [8, 4, 2, 1] + [1] * 7)],
)
def test_a_batch_is_halved_until_it_fits_and_has_the_numbers_of_the_whole_one(limit, size, first, late):
    auto, model = AutoMicrobatch(), Limited(limit, late=late)
    split, whole = learner(model, auto).fit(2), learner(Limited(99)).fit(2)
    assert_near(split, whole)
    assert model.seen[: len(first)] == first and auto.size == size
    part = size or 8
    last = {8: [5], 4: [3, 2], 2: [2, 2, 1], 1: [1] * 5}[part]
    rest = [part] * (8 // part) * 2 + last
    assert model.seen[len(first) : len(first) + len(rest)] == rest  # no batch is tried whole again


@pytest.mark.parametrize("size, parts", [(3, [3, 3, 2]), (5, [4, 4]), (7, [4, 4]), (8, [8])])
def test_parts_are_about_alike_and_count_for_what_they_are(size, parts):
    model = Limited(99)
    assert_near(learner(model, AutoMicrobatch(size)).fit(2), learner(Limited(99)).fit(2))
    assert model.seen[: len(parts)] == parts


def test_batch_norm_gets_no_last_part_of_one_sample():
    model = Limited(99, nn.BatchNorm1d(6))
    learner(model, AutoMicrobatch(4), train=batches(9, 5, 11)).fit(1)
    assert model.seen == [3, 3, 3, 3, 2, 4, 4, 3]


def test_a_batch_that_fits_is_trained_as_without_it_bit_for_bit():
    plain, auto = learner(Limited(99, nn.Dropout(0.5))), learner(Limited(99, nn.Dropout(0.5)), AutoMicrobatch())
    for learn in (plain, auto):
        torch.manual_seed(7)
        learn.fit(2)
    for p, q in zip(weights(plain), weights(auto), strict=True):
        assert torch.equal(p, q)
    assert plain.recorder.losses == auto.recorder.losses


def test_a_failed_attempt_leaves_no_trace_in_random_numbers_and_statistics():
    """A fit that finds out the size is the one that was told it."""

    def make(size: int | None) -> Learner:
        return learner(Limited(3, nn.BatchNorm1d(6), nn.Dropout(0.5)), AutoMicrobatch(size), train=batches(8, 8, 6))

    found, told = make(None), make(2)
    for learn in (found, told):
        torch.manual_seed(7)
        learn.fit(2)
    for a, b in zip(found.model.state_dict().values(), told.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert found.recorder.losses == told.recorder.losses


def test_others_are_told_of_a_batch_and_a_step_once():
    class Count(Callback):
        def __init__(self) -> None:
            self.batches, self.steps, self.sizes = 0, 0, []

        def before_batch(self, learn: Learner) -> None:
            self.batches += 1

        def after_batch(self, learn: Learner) -> None:
            self.sizes.append(len(learn.target))

        def after_step(self, learn: Learner) -> None:
            self.steps += 1

    count, clip, ema = Count(), ClipGradients(0.3), EMA(0.5)
    split = learner(Limited(3), AutoMicrobatch(), count, clip, ema).fit(1)
    assert (count.batches, count.steps, count.sizes, ema.n_updates) == (4, 4, [8, 8, 8, 5], 4)
    whole_clip = ClipGradients(0.3)
    assert_near(split, learner(Limited(99), whole_clip).fit(1))
    assert clip.norms == pytest.approx(whole_clip.norms, rel=1e-4)


@pytest.mark.parametrize("limit", [99, 3, 1])
@pytest.mark.parametrize("n", [2, 3, 9])
def test_beside_accumulate_the_windows_are_the_same(limit, n):
    given = batches(8, 6, 8, 5, 7)
    assert_near(
        learner(Limited(limit), AutoMicrobatch(), Accumulate(n), train=given).fit(2),
        learner(Limited(99), Accumulate(n), train=given).fit(2),
    )


def test_memory_that_runs_out_within_a_window_keeps_its_earlier_batches():
    given = batches(4, 4, 8, 4)
    assert_near(
        learner(Limited(5), AutoMicrobatch(), Accumulate(4), train=given).fit(1),
        learner(Limited(99), Accumulate(4), train=given).fit(1),
    )


def positive(inputs: Any, target: Tensor) -> Tensor:
    return (target[:, 0] > 0).sum()


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
    split, whole = (
        learner(Limited(limit), AutoMicrobatch(), MixedPrecision(dtype, pure=pure, init_scale=32.0)).fit(2)
        for limit in (3, 99)
    )
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=0.01)
    assert not torch.is_autocast_enabled("cpu")


def test_an_error_of_another_kind_is_not_taken_for_one_of_memory_and_leaves_all_as_it_was():
    class Raise(Callback):
        def after_forward(self, learn: Learner) -> None:
            if learn.training and len(learn.target) == 1:
                raise ConnectionAbortedError  # a last part

    given = batches(7, 7)
    learn = learner(Limited(4), AutoMicrobatch(), Accumulate(2), train=given)
    before = {
        name: getattr(learn, name) for name in ("count", "whole", "n_held", "no_sync", "differentiate", "in_step")
    }
    with pytest.raises(ConnectionAbortedError):
        learn.fit(1, callbacks=[Raise()])
    assert {name: getattr(learn, name) for name in before} == before
    learn.model.load_state_dict(Limited(4).state_dict())
    assert_near(learn.fit(1), learner(Limited(99), Accumulate(2), train=given).fit(1))


@pytest.mark.parametrize("late", [False, True])
def test_where_not_even_one_sample_fits_the_error_is_that_of_the_memory(late):
    learn = learner(Limited(0, late=late), AutoMicrobatch())
    with pytest.raises(torch.OutOfMemoryError, match=r"1 samples|backward"):
        learn.fit(1)
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


def test_a_backward_pass_that_is_skipped_for_one_part_leaves_that_part_out():
    class Skip(Callback):
        n = 0

        def before_backward(self, learn: Learner) -> None:
            self.n += 1
            if self.n == 2:
                raise SkipBackward

    given = batches(8)
    x, y = given[0]
    half = learner(Limited(99), train=[(x[:4], y[:4])], lr=0.05).fit(
        1
    )  # four of eight samples: half the gradient of their mean
    torch.testing.assert_close(
        weights(learner(Limited(99), AutoMicrobatch(4), Skip(), train=given).fit(1)), weights(half)
    )


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

        def forward(self, x: Tensor, scale: Tensor, of_all: Tensor) -> Tensor:
            return self.a(x) * scale * of_all

    (x, y), scale = batches(8)[0], torch.rand(8, 1)
    forms: list[Any] = [
        {"x": x, "scale": scale, "of_all": torch.tensor(2.0), "labels": y},
        (x, scale, torch.tensor(2.0), y),
    ]
    for batch in forms:
        assert_near(learner(Two(), AutoMicrobatch(3), train=[batch]).fit(2), learner(Two(), train=[batch]).fit(2))


def test_inputs_that_share_no_dimension_are_refused_with_their_shapes():
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.a(x) + other.sum()

    (x, y) = batches(8)[0]
    with pytest.raises(
        ValueError,
        match=r"splits inputs along their first dimension, which must be the same for all; got \(float32 \(8, 4\), "
        r"float32 \(3,\)\)",
    ):
        learner(First(), AutoMicrobatch(2), train=[(x, torch.rand(3), y)]).fit(1)


def test_a_resumed_fit_goes_on_with_the_size_that_was_found():
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.batch_index) == (1, 1):
                raise ConnectionAbortedError

    def make(folder: str) -> tuple[Learner, Limited]:
        [(x, y)] = batches(24)
        model = Limited(3, nn.BatchNorm1d(6), nn.Dropout(0.3))
        data = DataBunch.from_tensors((x, y), bs=8)
        return Learner(
            data, model, lr=0.05, seed=1, callbacks=[AutoMicrobatch(), Checkpoint(folder, every_n_steps=1)]
        ), model

    plain, _ = make("a")
    plain.fit(2)
    with pytest.raises(ConnectionAbortedError):
        make("b")[0].fit(2, callbacks=[Die()])
    learn, model = make("b")
    learn.fit(2, resume=True)
    assert max(model.seen) == 2
    for p, q in zip(weights(learn), weights(plain), strict=True):
        assert torch.equal(p, q)


def test_each_fit_begins_with_the_size_that_was_given():
    auto, model = AutoMicrobatch(), Limited(3)
    learn = learner(model, auto).fit(1)
    assert auto.size == 2
    model.limit = 99
    learn.fit(1)
    assert auto.size is None and model.seen[-4:] == [8, 8, 8, 5]


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=r"size=.*expected a whole number of samples, 1 or more"):
        AutoMicrobatch(size)


# --- wha ---------------------------------------------------------------------
class Shrinks(Callback):
    """From the end of step `after` on there is room for fewer samples: what the optimizer's state does in the first
    one.
    """

    def __init__(self, limit: int, after: int = 1) -> None:
        self.limit, self.after = limit, after

    def after_step(self, learn: Learner) -> None:
        if learn.step == self.after:
            learn.model.limit = self.limit


class Told(Callback):
    """Splits from that step on, without an error."""

    def __init__(self, size: int, after: int = 1) -> None:
        self.size, self.after = size, after

    def after_step(self, learn: Learner) -> None:
        if learn.step == self.after:
            next(cb for cb in learn.callbacks if isinstance(cb, AutoMicrobatch)).size = self.size


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
def test_memory_that_the_optimizers_state_takes_splits_the_second_batch_and_leaves_no_trace(late):
    extra = nn.BatchNorm1d(6), nn.Dropout(0.5)
    found = learner(Limited(99, *extra, late=late), AutoMicrobatch(), Shrinks(3), train=batches(8, 8, 6))
    told = learner(Limited(99, nn.BatchNorm1d(6), nn.Dropout(0.5)), AutoMicrobatch(), Told(2), train=batches(8, 8, 6))
    for learn in (found, told):
        torch.manual_seed(7)
        learn.fit(2)
    assert found.model.seen[0] == 8 and 2 in found.model.seen
    for a, b in zip(found.model.state_dict().values(), told.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert found.recorder.losses == told.recorder.losses


@pytest.mark.parametrize("limit", [7, 3])
def test_in_windows_of_accumulate_the_batches_after_the_first_step_are_trials_too(limit):
    given = batches(*[8] * 8)
    split = learner(Limited(99), AutoMicrobatch(), Accumulate(2), Shrinks(limit), train=given).fit(1)
    assert_near(split, learner(Limited(99), Accumulate(2), train=given).fit(1))
    split = learner(Limited(99), AutoMicrobatch(), Accumulate(2), ShrinksWithin(limit), train=given).fit(1)
    assert_near(split, learner(Limited(99), Accumulate(2), train=given).fit(1))


class ShrinksWithin(Callback):
    """In the second window, once gradients wait: there is less room with them."""

    def after_batch(self, learn: Learner) -> None:
        if learn.step == 1 and learn.n_held:
            learn.model.limit = self.limit

    def __init__(self, limit: int) -> None:
        self.limit = limit


class LimitedNumbers(nn.Module):
    """Holds so many numbers of a batch (samples, length, 4) in training and no more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.limit, self.seen = nn.Linear(4, 2), limit, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape[:2]))
        if x.numel() > self.limit:
            raise torch.OutOfMemoryError(f"{tuple(x.shape)}")
        return torch.tanh(self.net(x)).mean(1)


def sequences(*shapes: tuple[int, int]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(*shape, 4, generator=generator), torch.randn(shape[0], 2, generator=generator)) for shape in shapes
    ]


def test_a_longer_sequence_is_a_trial_though_its_samples_are_no_more():
    given = sequences((8, 3), (8, 3), (8, 3), (8, 5), (8, 4), (4, 5), (8, 9))
    split = learner(model := LimitedNumbers(8 * 4 * 4), AutoMicrobatch(), train=given).fit(1)
    assert_near(split, learner(LimitedNumbers(10**9), train=given).fit(1))
    assert model.seen[:6] == [(8, 3), (8, 3), (8, 3), (8, 5), (4, 5), (4, 5)]
    assert model.seen[-5:] == [(4, 9), *[(2, 9)] * 4]


def test_a_size_that_has_fitted_is_trusted_for_all_that_is_no_larger_in_any_dimension():
    """Memory that runs out in what is trusted is the warning; that of a trial is none."""
    given = sequences((8, 9), (8, 9), (6, 9), (8, 2), (3, 3))
    for last in range(2, 5):
        learn = learner(LimitedNumbers(10**9), AutoMicrobatch(), train=given)
        with pytest.warns(
            UserWarning, match=r"memory ran out at \d samples, which had fitted before, epoch 0, training batch"
        ):
            learn.fit(1, callbacks=[RunsOutIn(last)])
    learner(LimitedNumbers(10**9), AutoMicrobatch(), train=sequences((8, 9), (8, 9), (2, 10))).fit(
        1, callbacks=[RunsOutIn(2)]
    )


class RunsOutIn(Callback):
    """In the forward pass of one batch, once."""

    def __init__(self, batch: int, rank: int = 0) -> None:
        self.batch, self.rank, self.done = batch, rank, False

    def before_forward(self, learn: Learner) -> None:
        if learn.training and learn.batch_index == self.batch and get_rank() == self.rank and not self.done:
            self.done = True
            raise torch.OutOfMemoryError("another process took it")


def test_memory_that_another_process_takes_later_splits_the_batches_from_there_on():
    given, auto = batches(*[8] * 6), AutoMicrobatch()
    split = learner(model := Limited(99), auto, Shrinks(3, after=4), train=given)
    with pytest.warns(
        UserWarning, match=r"memory ran out at 8 samples, which had fitted before.*continues with parts of 4"
    ):
        split.fit(1)
    assert_near(split, learner(Limited(99), train=given).fit(1))
    assert model.seen == [8] * 5 + [4] + [2] * 8 and auto.size == 2


def test_memory_that_runs_out_later_within_a_window_is_an_error_that_says_why():
    given = batches(*[8] * 6)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        learner(Limited(99), AutoMicrobatch(), Accumulate(2), train=given).fit(1, callbacks=[RunsOutIn(5)])
    assert any("its gradients are mixed with those that Accumulate holds" in note for note in raised.value.__notes__)


def test_one_sample_that_does_not_fit_any_more_is_the_error_of_the_memory():
    with pytest.raises(torch.OutOfMemoryError, match="1 samples"):
        learner(Limited(99), AutoMicrobatch(1), Shrinks(0, after=3)).fit(1)


# --- wha ---------------------------------------------------------------------
class Raises(Limited):
    """Another error than torch.OutOfMemoryError."""

    def __init__(self, limit: int, text: str) -> None:
        super().__init__(limit)
        self.text = text

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except torch.OutOfMemoryError:
            raise RuntimeError(self.text) from None


NOT_SUPPORTED = (
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
)


@pytest.mark.parametrize(
    "text",
    [
        NOT_SUPPORTED,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_the_errors_of_libraries_under_torch_split_a_batch_too(text):
    assert_near(learner(Raises(3, text), AutoMicrobatch()).fit(2), learner(Limited(99)).fit(2))


def test_an_error_that_a_smaller_part_does_not_cure_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="CUDNN_STATUS_NOT_SUPPORTED"):
        learner(Raises(0, NOT_SUPPORTED), AutoMicrobatch()).fit(1)


def test_no_tensor_of_a_failed_attempt_is_alive_in_the_next_one():
    class Holds(Limited):
        def __init__(self, limit: int) -> None:
            super().__init__(limit)
            self.alive: list[list[bool]] = []
            self.made: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            self.alive.append([ref() is not None for ref in self.made])
            hidden = self.first(x)
            self.made.append(weakref.ref(hidden))
            try:
                return super().forward(x)
            except torch.OutOfMemoryError as error:
                raise RuntimeError("a layer of a compiled model failed") from error

    learner(model := Holds(2), AutoMicrobatch(), train=batches(8)).fit(1)
    assert model.alive[:3] == [[], [False], [False, False]] and not any(map(any, model.alive))


# --- sev ---------------------------------------------------------------------
def on_two_ranks(fit: Any) -> list[Any]:
    """[state of the model, losses, size, sizes of the forward passes] of what `fit` returns on each of two ranks; a
    hang ends after 40 s.
    """

    def one_rank() -> Any:
        init_process_group(timeout=20)
        learn, auto = fit()
        return [learn.model.state_dict(), learn.recorder.losses, auto.size, learn.model.seen]

    return launch(one_rank, 2, timeout=40, every_rank=True)


def together(
    model: nn.Module, *callbacks: Callback, train: Any, size: int | None = None, **options: Any
) -> tuple[Learner, AutoMicrobatch]:
    auto = AutoMicrobatch(size)
    return learner(model, auto, *callbacks, train=train).to_distributed(**options).fit(1), auto


def plain(model: nn.Module, *callbacks: Callback, train: Any, **options: Any) -> tuple[Learner, AutoMicrobatch]:
    return learner(model, *callbacks, train=train).to_distributed(**options).fit(1), AutoMicrobatch()


def assert_same_numbers(found: list[Any], expected: list[Any], *, exactly: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-5, "atol": 1e-6}
    for one in found:
        torch.testing.assert_close(one[0], expected[0][0], **tolerance)
    for one, other in zip(found, expected, strict=True):
        assert one[1] == pytest.approx(other[1], rel=0 if exactly else 1e-5)
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name


class Centered(nn.Module):
    """Takes off a mean that it has gathered in the passes before: what ranks share of it shows in their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.mean
        if self.training:
            self.mean = (self.mean + x.detach().mean(0)) / 2
        return y


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "delay_allreduce": {"delay_allreduce": True},
    "buckets": {"bucket_cap_mb": 0.0001},
    "no views": {"gradient_as_bucket_view": False},
    "unused": {"find_unused_parameters": True},
    "bf16": {"algorithm": "bf16"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_on_two_ranks_what_fits_is_trained_as_without_it_bit_for_bit(name, n):
    """With dropout, and statistics that rank 0 shares before each forward pass. The first two steps are trials."""

    def model() -> Limited:
        return Limited(99, Centered(), nn.BatchNorm1d(6), nn.Dropout(0.5))

    given = batches(*[8] * 10, 6, 6)
    found, expected = (
        on_two_ranks(lambda fit=fit: fit(model(), *([Accumulate(2)] if n == 2 else []), train=given, **OPTIONS[name]))
        for fit in (together, plain)
    )
    assert_same_numbers(found, expected, exactly=True)
    assert [one[2] for one in found] == [None, None]


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_where_one_rank_alone_runs_out_in_the_second_step_it_splits_its_batches(name, rank, late):
    class OnOne(Shrinks):
        def after_step(self, learn: Learner) -> None:
            if get_rank() == rank:
                super().after_step(learn)

    given = batches(*[8] * 8)  # four for each rank
    found = on_two_ranks(lambda: together(Limited(99, late=late), OnOne(3), train=given, **OPTIONS[name]))
    expected = on_two_ranks(lambda: plain(Limited(99), train=given, **OPTIONS[name]))
    if name == "bf16":
        torch.testing.assert_close(found[0][0], expected[0][0], rtol=1e-2, atol=1e-3)
    else:
        assert_same_numbers(found, expected)
    assert found[rank][2] == 2 and found[1 - rank][2] is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_runs_out_alone_leaves_the_statistics_of_batch_norm_to_rank_0(rank):
    """Found on one rank, or told to both: the other's are the same, and all are rank 0's in the end."""
    given = batches(*[8] * 8)
    found = on_two_ranks(lambda: together(Limited(7 if get_rank() == rank else 99, nn.BatchNorm1d(6)), train=given))
    told = on_two_ranks(
        lambda: together(Limited(99, nn.BatchNorm1d(6)), train=given, size=4 if get_rank() == rank else None)
    )
    assert_same_numbers(found, told, exactly=True)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_where_one_rank_alone_gets_a_longer_sequence_later_it_splits_that(n):
    """Each rank has batches of its own lengths, so that one's trial is nothing new to the other."""
    lengths = {0: (3, 3, 3, 2, 3, 3, 3), 1: (3, 3, 3, 2, 8, 3, 9)}

    def fit(limit: int) -> tuple[Learner, AutoMicrobatch]:
        given = Own(sequences(*((8, length) for length in lengths[get_rank()])))
        return together(LimitedNumbers(limit), *([Accumulate(n)] if n > 1 else []), train=given)

    found = on_two_ranks(lambda: fit(8 * 4 * 4 if get_rank() else 10**9))
    assert_same_numbers(found, on_two_ranks(lambda: fit(10**9)))
    assert [one[2] for one in found] == [None, 2] and (4, 8) in found[1][3] and (2, 9) in found[1][3]


class Own:
    """A loader of this rank's own batches."""

    is_sharded = True

    def __init__(self, given: list[Batch]) -> None:
        self.given = given

    def __iter__(self) -> Any:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def test_memory_that_one_rank_lacks_later_in_a_forward_pass_splits_its_batches():
    def fit() -> tuple[Learner, AutoMicrobatch]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = together(Limited(99), Shrinks(3 if get_rank() else 99, after=4), train=batches(*[8] * 12))
        assert [w.category for w in caught if "had fitted before" in str(w.message)] == [UserWarning] * get_rank()
        return made

    found = on_two_ranks(fit)
    assert_same_numbers(found, on_two_ranks(lambda: plain(Limited(99), train=batches(*[8] * 12))))
    assert [one[2] for one in found] == [None, 2]


class InLoss(Callback):
    """Where the loss is computed, DDP's forward pass being through."""

    def __init__(self, batch: int, rank: int) -> None:
        self.batch, self.rank = batch, rank

    def before_fit(self, learn: Learner) -> None:
        def loss(pred: Tensor, target: Tensor) -> Tensor:
            if (learn.batch_index, get_rank()) == (self.batch, self.rank):
                raise torch.OutOfMemoryError("another process took it")
            return nn.functional.mse_loss(pred, target)

        learn.loss_func = loss


class InBackward(RunsOutIn):
    before_forward = Callback.before_forward

    def before_backward(self, learn: Learner) -> None:
        RunsOutIn.before_forward(self, learn)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "kind, extra",
    [(InBackward, ()), (InLoss, ()), (RunsOutIn, (nn.BatchNorm1d(6),))],
    ids=["backward", "loss", "buffers"],
)
def test_memory_that_runs_out_later_on_one_rank_in_what_ranks_share_ends_both_with_the_reason(kind, extra, rank):
    start = time.monotonic()
    with pytest.raises(
        RankFailed, match=r"(?s)another process took it.*the other ranks may have begun to reduce gradients"
    ) as raised:
        on_two_ranks(lambda: together(Limited(99, *extra), kind(3, rank), train=batches(*[8] * 12)))
    assert raised.value.rank == rank and time.monotonic() - start < 15


def test_where_one_ranks_last_sample_does_not_fit_both_end_with_the_reason():
    with pytest.raises(RankFailed, match=r"OutOfMemoryError: 1 samples") as raised:
        on_two_ranks(lambda: together(Limited(0 if get_rank() else 99), train=batches(*[8] * 4)))
    assert raised.value.rank == 1


def test_a_fit_that_a_hook_stops_after_the_backward_pass_of_one_ranks_trial_leaves_no_rank_waiting():
    class Stop(Callback):
        def after_backward(self, learn: Learner) -> None:
            if learn.batch_index == 3:
                raise StopFit

    def fit() -> tuple[Learner, AutoMicrobatch]:
        return together(
            LimitedNumbers(10**9), Stop(), train=Own(sequences((8, 3), (8, 3), (8, 3), (8, 3 + get_rank())))
        )

    found = on_two_ranks(fit)
    assert len(found[0][1]) == len(found[1][1]) == 3
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name])
