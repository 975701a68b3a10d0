"""Accumulation, precision, clipping, averages and splitting on two ranks: the numbers of one process with all the
samples.
"""

import math
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from learnkit import Callback, DataBunch, Learner, SkipBackward, StopTrain
from learnkit.callbacks import (
    EMA,
    SAM,
    SWA,
    Accumulate,
    AutoMicrobatch,
    Checkpoint,
    ClipGradients,
    Lookahead,
    MixedPrecision,
)
from learnkit.distributed import get_rank, get_world_size

N, GLOBAL = 41, 12  # an epoch: three whole global batches, and one of 5 samples, which two ranks share as 3 and 2
IGNORED = -100


def tensors(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *extra, nn.Tanh(), nn.Linear(8, 3))


def learner(
    *callbacks: Callback, model: nn.Module | None = None, train: Any = None, loss_func: Any = None, **options: Any
) -> Learner:
    data = DataBunch.from_tensors(
        train or tensors(), tensors(11, seed=2), bs=GLOBAL // get_world_size(), drop_last=False, seed=3
    )
    learn = Learner(data, model or net(), opt_func=SGD, lr=0.3, wd=0.0, callbacks=callbacks, loss_func=loss_func)
    return learn.to_distributed(**options)


def summary(learn: Learner) -> list[Any]:
    """Weights (and averages of them), losses, values and steps."""
    weights = [p.detach().flatten() for p in learn.model.parameters()]
    for callback in learn.callbacks:
        if isinstance(callback, EMA) and callback.average is not None:
            weights += [v.flatten() for k, v in callback.average.values.items() if "running" not in k]
        if isinstance(callback, ClipGradients):
            weights.append(torch.tensor(callback.norms))
    return [torch.cat([w.double() for w in weights]).tolist(), learn.recorder.losses, learn.recorder.values, learn.step]


def assert_close(found: list[Any], expected: list[Any], tolerance: float, name: str) -> None:
    assert found[3] == expected[3], name
    assert found[0] == pytest.approx(expected[0], abs=tolerance), name
    assert found[1] == pytest.approx(expected[1], abs=tolerance), name
    for row, other in zip(found[2], expected[2], strict=True):
        assert row == pytest.approx(other, abs=tolerance, nan_ok=True), name


def assert_as_alone(ranks: Any, cases: dict[str, Callable[[], list[Any]]], tolerance: float = 1e-5) -> None:
    """Two ranks have the numbers of this process alone, and both the same weights to the last bit."""
    expected = {name: case() for name, case in cases.items()}
    first, second = ranks(2, lambda: {name: case() for name, case in cases.items()}, timeout=100)
    for name in cases:
        assert_close(first[name], expected[name], tolerance, name)
        assert repr(first[name]) == repr(second[name]), name  # NaN too


def fitted(*make: Callable[[], Callback], **options: Any) -> Callable[[], list[Any]]:
    return lambda: summary(learner(*(one() for one in make), **options).fit(2))


# --- equal to one pro --------------------------------------------------------
def test_windows_of_any_size_with_an_uneven_last_batch_are_those_of_one_process(ranks):
    cases = {
        f"Accumulate({n}), delay_allreduce={late}": fitted(lambda n=n: Accumulate(n), delay_allreduce=late)
        for n in (1, 2, 3, 9)
        for late in (False, True)
    }
    assert_as_alone(ranks, cases)


def test_what_goes_with_them_has_the_numbers_of_one_process(ranks):
    cases = {
        "clipping": fitted(lambda: ClipGradients(0.3), lambda: Accumulate(3)),
        "clipping by value, delayed": fitted(
            lambda: ClipGradients(value=0.02), lambda: Accumulate(2), delay_allreduce=True
        ),
        "adaptive clipping": fitted(lambda: ClipGradients(adaptive=0.02)),
        "clipping, delayed": fitted(lambda: ClipGradients(0.3), delay_allreduce=True),
        "EMA": fitted(lambda: EMA(0.8), lambda: Accumulate(2)),
        "SWA": fitted(lambda: SWA(0.0)),
        "Lookahead": fitted(lambda: Lookahead(2), lambda: Accumulate(2)),
        "SAM": fitted(lambda: SAM(0.3)),
        "SAM and clipping": fitted(lambda: SAM(0.3), lambda: ClipGradients(0.2)),
        "split": fitted(lambda: AutoMicrobatch(2)),
        "split, in windows": fitted(lambda: AutoMicrobatch(4), lambda: Accumulate(3)),
        "split, delayed": fitted(lambda: AutoMicrobatch(2), delay_allreduce=True),
    }
    assert_as_alone(ranks, cases)


def test_in_half_precision_they_come_near_one_process(ranks):
    def half(dtype: torch.dtype, pure: bool) -> Callable[[], Callback]:
        return lambda: MixedPrecision(dtype, pure=pure, init_scale=64.0)

    cases = {
        f"{dtype}, pure={pure}, delay_allreduce={late}": fitted(
            half(dtype, pure), lambda: Accumulate(3), lambda: ClipGradients(0.3), delay_allreduce=late
        )
        for dtype in (torch.bfloat16, torch.float16)
        for pure in (False, True)
        for late in (False, True)
    }
    assert_as_alone(ranks, cases, tolerance=0.03)


# --- to ----------------------------------------------------------------------
def rare() -> tuple[Tensor, Tensor]:
    """Samples of which few count, and very unevenly."""
    x, y = tensors()
    return x, torch.where(torch.arange(N) % 7 < 3, y, IGNORED)


def n_tokens(inputs: Any, target: Tensor) -> Tensor:
    return (target != IGNORED).sum()


def token_loss(pred: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(pred, target, ignore_index=IGNORED)


def of_tokens(n: int, *more: Callable[[], Callback], **options: Any) -> Callable[[], list[Any]]:
    def fit() -> list[Any]:
        learn = learner(
            Accumulate(n, count=n_tokens), *(make() for make in more), train=rare(), loss_func=token_loss, **options
        )
        learn.data.valid_dl = None  # a loss of a validation is a mean over samples
        return summary(learn.fit(2))

    return fit


def test_tokens_of_all_ranks_weigh_alike_however_they_lie(ranks):
    cases = {
        f"{n}, delay_allreduce={late}": of_tokens(n, delay_allreduce=late) for n in (1, 2, 3) for late in (False, True)
    }
    cases["clipped"] = of_tokens(2, lambda: ClipGradients(0.2))
    cases["split"] = of_tokens(2, lambda: AutoMicrobatch(3))
    assert_as_alone(ranks, cases)


def test_a_rank_without_any_token_adds_nothing_and_spoils_nothing(ranks):
    """Its own loss is a mean over nothing, NaN."""

    def fit() -> list[Any]:
        class Mask(Callback):
            """Nothing counts in the second half of each global batch, which is rank 1's."""

            def before_batch(self, learn: Learner) -> None:
                own = torch.arange(len(learn.target)) + get_rank() * GLOBAL
                learn.target = torch.where(own < (6 if get_world_size() == 1 else GLOBAL), learn.target, IGNORED)

        learn = learner(
            Accumulate(2, count=n_tokens), Mask(), train=tuple(t[:36] for t in tensors()), loss_func=token_loss
        )
        learn.data.valid_dl = None
        return summary(learn.fit(2))

    assert_as_alone(ranks, {"half": fit})


# --- collec ------------------------------------------------------------------
def n_collectives() -> int:
    return dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[union-attr]


class Collectives(Callback):
    """Of each training batch."""

    order = -200

    def __init__(self) -> None:
        self.n: list[int] = []

    def before_batch(self, learn: Learner) -> None:
        self.start = n_collectives()

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            self.n.append(n_collectives() - self.start)


def test_gradients_are_reduced_once_a_step_and_nothing_else_is_sent(ranks):
    def count(*make: Callable[[], Callback], **options: Any) -> list[int]:
        counts = Collectives()
        learner(counts, *(one() for one in make), train=tensors(48), **options).fit(2)
        return counts.n[4:]  # the first of all builds buckets

    def fn() -> list[list[int]]:
        three, clip, ema = lambda: Accumulate(3), lambda: ClipGradients(0.3), lambda: EMA(0.9)
        return [
            count(),
            count(delay_allreduce=True),
            count(delay_allreduce=True, bucket_cap_mb=0.0001),
            count(three),
            count(three, clip, ema),
            count(three, clip, delay_allreduce=True),
            count(lambda: MixedPrecision(torch.float16, init_scale=8.0), three, clip),
            count(lambda: AutoMicrobatch(2)),
            count(lambda: Accumulate(3, count=n_tokens)),
        ]

    plain, windows = [1, 1, 1, 1], [0, 0, 1, 1]  # the last window is short
    assert ranks(2, fn) == [[plain, plain, plain, windows, windows, windows, windows, plain, [0, 0, 2, 2]]] * 2


# --- an overflow on on -------------------------------------------------------
def test_an_overflow_on_one_rank_is_everybodys_and_moves_nothing(ranks):
    class Overflow(Callback):
        """On rank 1, in one batch; in a window of two also in its first one."""

        order = 60

        def __init__(self, batch: int) -> None:
            self.batch = batch

        def after_forward(self, learn: Learner) -> None:
            if learn.training and get_rank() == 1 and (learn.epoch, learn.batch_index) == (0, self.batch):
                learn.loss = learn.loss * math.inf

    def fn() -> list[Any]:
        found = []
        for n, batch, late in ((1, 1, False), (1, 1, True), (2, 0, False), (2, 1, False), (2, 2, True)):
            half, ema = MixedPrecision(torch.float16, init_scale=64.0), EMA(0.5)
            learn = learner(half, ema, Overflow(batch), Accumulate(n), delay_allreduce=late).fit_one_cycle(2, 0.1)
            finite = all(bool(p.isfinite().all()) for p in learn.model.parameters())
            found.append(
                [half.skips, half.scales, learn.step, ema.n_updates, len(learn.recorder.lrs), finite, summary(learn)[0]]
            )
        return found

    first, second = ranks(2, fn)
    # Recorded losses may differ from rank to rank only until the epoch's end; weights never.
    assert first == second
    one, two = [64.0] * 2 + [32.0] * 6, [64.0] + [32.0] * 3
    assert [case[:6] for case in first] == [[[1], one, 7, 7, 7, True]] * 2 + [[[0], two, 3, 3, 3, True]] * 2 + [
        [[1], [64.0, 64.0, 32.0, 32.0], 3, 3, 3, True]
    ]


# --- within a w --------------------------------------------------------------
class At(Callback):
    """Raises in one batch of the first epoch, on all ranks."""

    def __init__(self, error: Any, batch: int) -> None:
        self.error, self.batch = error, batch

    def met(self, learn: Learner) -> bool:
        return learn.training and (learn.epoch, learn.batch_index) == (0, self.batch)

    def before_backward(self, learn: Learner) -> None:
        if self.error is SkipBackward and self.met(learn):
            raise SkipBackward

    def after_batch(self, learn: Learner) -> None:
        if self.error is StopTrain and self.met(learn):
            raise StopTrain


def test_what_is_skipped_or_stopped_within_a_window_is_so_on_two_ranks_as_alone(ranks):
    cases = {
        f"{error.__name__} at {batch}, {late}": fitted(
            lambda e=error, b=batch: At(e, b), lambda: Accumulate(2), delay_allreduce=late
        )
        for error in (SkipBackward, StopTrain)
        for batch in (0, 1, 2, 3)
        for late in (False, True)
    }
    assert_as_alone(ranks, cases)


def test_a_window_that_ends_with_data_of_unknown_length_is_reduced_all_the_same(ranks):
    class Stream(torch.utils.data.IterableDataset[Any]):
        """Its own share of seven global batches."""

        is_sharded = True

        def __iter__(self) -> Any:
            for x, y in zip(*(t[: 7 * 4].split(4) for t in tensors()), strict=True):
                yield x[get_rank() :: get_world_size()], y[get_rank() :: get_world_size()]

    def fit(n: int, late: bool) -> list[Any]:
        loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
        learn = Learner(
            (loader, None), net(), opt_func=SGD, lr=0.3, wd=0.0, callbacks=[Accumulate(n), ClipGradients(0.5)]
        )
        return summary(learn.to_distributed(delay_allreduce=late).fit(2))

    assert_as_alone(
        ranks, {f"{n}, {late}": lambda n=n, late=late: fit(n, late) for n in (1, 2, 3, 9) for late in (False, True)}
    )


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(self.body(x).tanh()), self.b(self.body(x).relu())


class OneAfterTheOther(Callback):
    """Differentiates two losses that share a part of the model by themselves."""

    order = 50

    def around_backward(self, learn: Learner, run: Any) -> None:
        whole = learn.loss
        try:
            for pred in learn.pred:
                learn.loss = F.cross_entropy(pred, learn.target)
                run()
        finally:
            learn.loss = whole


def test_two_losses_of_a_shared_body_one_after_the_other_are_their_sum_where_reduction_is_delayed(ranks):
    def sum_of_two(pred: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(pred[0], target) + F.cross_entropy(pred[1], target)

    def fit(n: int, apart: bool) -> list[Any]:
        return summary(
            learner(
                *([OneAfterTheOther()] if apart else []),
                Accumulate(n),
                model=TwoHeads(),
                loss_func=sum_of_two,
                delay_allreduce=True,
            ).fit(2)
        )

    expected = {n: fit(n, False) for n in (1, 3)}
    first, second = ranks(2, lambda: [fit(n, True) for n in (1, 3)])
    for n, found in zip((1, 3), first, strict=True):
        assert_close(found, expected[n], 1e-5, str(n))
    assert first == second


# --- batch -------------------------------------------------------------------
def test_the_average_of_batch_norms_statistics_is_one_on_all_ranks(ranks):
    def fn() -> list[Any]:
        found = []
        for make in (lambda: EMA(0.5), lambda: SWA(0.0), lambda: SWA(0.0, update_bn=True)):
            callback = make()
            learn = learner(callback, Accumulate(2), model=net(nn.BatchNorm1d(8))).fit(2)
            with callback.swapped(learn):
                values = [v.tolist() for v in learn.model.state_dict().values()]
            found.append([values, learn.recorder.values, learn.validate()])
            assert found[-1][2]["valid_loss"] == pytest.approx(learn.recorder.values[-1][1])
        return found

    first, second = ranks(2, fn)
    assert first == second


# --- m -----------------------------------------------------------------------
class Limited(nn.Module):
    """Holds so many samples in training and no more, on one rank."""

    def __init__(self, limit: int, rank: int) -> None:
        super().__init__()
        self.net, self.limit, self.rank, self.seen = net(), limit, rank, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(len(x))
        if self.training and get_world_size() == 2 and get_rank() == self.rank and len(x) > self.limit:
            raise torch.OutOfMemoryError("too many")
        return self.net(x)


def test_where_memory_runs_out_on_one_rank_that_one_splits_its_batches(ranks):
    def fit(rank: int, n: int, late: bool) -> list[Any]:
        model = Limited(2, rank)
        learn = learner(AutoMicrobatch(), Accumulate(n), model=model, delay_allreduce=late).fit(2)
        if get_world_size() == 2 and get_rank() == rank:
            assert model.seen[:2] == [6, 3] and max(model.seen[3:]) <= 2
        elif (
            get_world_size() == 2
        ):  # whole, the last one is short; two samples to join the other rank, whose gradients come later with DDP
            assert set(model.seen) == {6, 3 - get_rank()} | (set() if late else {2})
        return summary(learn)

    assert_as_alone(
        ranks,
        {
            f"{rank}, {n}, {late}": lambda r=rank, n=n, late=late: fit(r, n, late)
            for rank in (0, 1)
            for n in (1, 2)
            for late in (False, True)
        },
    )


def test_the_batch_size_that_is_found_fits_on_all_ranks_and_nothing_is_changed(ranks):
    def fn() -> list[Any]:
        learn = learner(Accumulate(2), model=Limited(9 if get_rank() else 100, get_rank()))
        before = [p.tolist() for p in learn.model.parameters()], torch.get_rng_state().tolist(), learn.world_size
        found = learn.batch_size_find(max_bs=64)
        assert (
            [p.tolist() for p in learn.model.parameters()],
            torch.get_rng_state().tolist(),
            learn.world_size,
        ) == before
        return [found, summary(learn.fit(2))]

    expected = summary(learner(Accumulate(2), model=Limited(100, 0)).fit(2))
    first, second = ranks(2, fn)
    assert first == second and first[0] == 8
    assert_close(first[1], expected, 1e-5, "the fit afterwards")


# --- co ----------------------------------------------------------------------
def test_a_compiled_model_is_compiled_twice_on_each_rank(ranks):
    def fn() -> list[Any]:
        graphs: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(1)
            return graph.forward

        learn = learner(Accumulate(2), EMA(0.8)).compile(backend=backend).fit(2)
        learn.validate()
        return [len(graphs), summary(learn)]

    expected = fitted(lambda: Accumulate(2), lambda: EMA(0.8))()
    for found in ranks(2, fn, timeout=100):
        assert found[0] == 2
        assert_close(found[1], expected, 1e-5, "compiled")


# --- r -----------------------------------------------------------------------
class Terminate(Callback):
    """SIGTERM to all ranks in a batch, by its number in the fit, after which they stop."""

    def __init__(self, at: int) -> None:
        self.at, self.n = at, 0

    def after_backward(self, learn: Learner) -> None:
        if self.n == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.n += 1


def resumable(folder: str, *more: Callback, **options: Any) -> Learner:
    callbacks = [Accumulate(4), EMA(0.8), ClipGradients(0.5), Checkpoint(folder), *more]
    options = {"train": tensors(12 * 9 + 5)} | options  # ten batches, in windows of four, four and two
    return learner(
        *callbacks,
        MixedPrecision(torch.float16, init_scale=64.0, growth_interval=2),
        model=net(nn.Dropout(0.2)),
        **options,
    )


def half_of(learn: Learner) -> list[Any]:
    return next(
        [cb.scales, cb.skips, cb.scaler.state_dict()]
        for cb in learn.callbacks
        if isinstance(cb, MixedPrecision) and cb.scaler is not None
    )


def test_a_fit_stopped_within_a_window_goes_on_as_if_it_had_not_been(ranks):
    """Each rank with its own part of the window's gradients, and with its own random numbers."""

    def fn() -> list[Any]:
        torch.manual_seed(5)
        found = [[summary(learn := resumable("whole").fit(2)), half_of(learn)]]
        for at in (0, 2, 4, 9, 12):
            torch.manual_seed(5)
            stop = Terminate(at)
            with pytest.raises(SystemExit):
                resumable(f"at {at}").fit(2, callbacks=[stop])
            assert stop.n == at + 1
            torch.manual_seed(99)
            found.append([summary(learn := resumable(f"at {at}").fit(2, resume=True)), half_of(learn)])
        return found

    for found in ranks(2, fn, timeout=100):
        for i, other in enumerate(found[1:]):
            assert other == found[0], i


def test_a_window_that_was_begun_on_two_ranks_is_begun_anew_on_one(ranks):
    class Batches(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def before_batch(self, learn: Learner) -> None:
            if learn.training:
                self.seen.append((learn.epoch, learn.batch_index))

    def make(*more: Callback) -> Learner:
        return learner(Accumulate(10), EMA(0.8), *more, train=tensors(12 * 9 + 5))

    def fn() -> None:
        with pytest.raises(SystemExit):
            make(Checkpoint("kept")).fit(2, callbacks=[Terminate(14)])

    expected, seen = summary(make().fit(2)), Batches()
    ranks(2, fn)
    found = summary(make(Checkpoint("kept")).fit(2, resume=True, callbacks=[seen]))
    assert seen.seen == [(1, k) for k in range(10)]
    assert_close(found, expected, 1e-5, "on one rank")


# --- ref ---------------------------------------------------------------------
REFUSED: list[tuple[Callable[[], Learner], type[Exception], str]] = [
    (
        lambda: learner(SAM(), delay_allreduce=True),
        ValueError,
        "SAM cannot be combined with ReduceAfterwards: its second pass needs",
    ),
    (
        lambda: learner(AutoMicrobatch(), sync_bn=True),
        ValueError,
        "AutoMicrobatch cannot be combined with sync_bn=True: a rank whose memory runs out would leave",
    ),
    (
        lambda: learner(Accumulate(2), static_graph=True),
        ValueError,
        "static_graph=True, with which .* cannot be combined .*: Accumulate, AutoMicrobatch or",
    ),
    (
        lambda: learner(static_graph=True, delay_allreduce=True),
        ValueError,
        "static_graph=True, with which .* Leave static_graph out",
    ),
]


@pytest.mark.parametrize(
    "make, error, message", REFUSED, ids=["SAM", "AutoMicrobatch", "Accumulate", "delay_allreduce"]
)
def test_what_does_not_go_together_is_refused_before_the_first_step_on_all_ranks(ranks, make, error, message):
    def fn() -> bool:
        learn = make()
        with pytest.raises(error, match=message):
            learn.fit(1)
        return (
            all(torch.equal(p, q) for p, q in zip(learn.model.parameters(), net().parameters(), strict=True))
            and learn.step == 0
        )

    assert ranks(2, fn) == [True, True]


def test_several_backward_passes_through_the_same_weights_without_a_delay_say_what_to_do(ranks):
    def sum_of_two(pred: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(pred[0], target) + F.cross_entropy(pred[1], target)

    def fn() -> str:
        with pytest.raises(RuntimeError, match="ready only once") as raised:
            learner(OneAfterTheOther(), model=TwoHeads(), loss_func=sum_of_two).fit(1)
        return " ".join(raised.value.__notes__)

    for notes in ranks(2, fn):
        assert "For several, such as one for each loss, use learn.to_distributed(delay_allreduce=True)." in notes
