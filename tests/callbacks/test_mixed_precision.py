"""MixedPrecision: the numbers of autocast and GradScaler by hand; a step that overflows moves nothing but the scale."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import EMA, Accumulate, Checkpoint, ClipGradients, Lookahead, MixedPrecision, Progress

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Batch = tuple[Tensor, Tensor]


def batches(*sizes: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *extra, nn.ReLU(), nn.Linear(8, 3))


def learner(
    *callbacks: Callback, train: Any = None, valid: Any = None, model: nn.Module | None = None, **options: Any
) -> Learner:
    options = {"opt_func": torch.optim.SGD, "lr": 0.1, "wd": 0.0} | options
    return Learner((train or batches(4, 4, 4, 3), valid), model or net(), callbacks=callbacks, **options)


def weights(learn: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in learn.model.parameters()]


def by_hand(
    dtype: torch.dtype, given: list[Batch], scale: float = 2.0**16, n_epochs: int = 1
) -> tuple[list[Tensor], list[float]]:
    model, losses = net(), []
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=dtype == torch.float16)  # type: ignore[reportPrivateImportUsage]
    for x, y in given * n_epochs:
        with torch.autocast("cpu", dtype):  # type: ignore[reportPrivateImportUsage]
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(loss.item())
    return [p.detach() for p in model.parameters()], losses


# --- it ----------------------------------------------------------------------
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_a_fit_has_the_numbers_of_autocast_and_a_scaler_by_hand(dtype):
    learn = learner(MixedPrecision(dtype, init_scale=256.0)).fit(3)
    expected, losses = by_hand(dtype, batches(4, 4, 4, 3), 256.0, n_epochs=3)
    torch.testing.assert_close(weights(learn), expected)
    assert learn.recorder.losses == pytest.approx(losses)


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_what_is_trained_stays_float32_and_comes_near_the_float32_fit(dtype, pure):
    plain = learner(valid=batches(8, seed=2), metrics=accuracy).fit(4)
    learn = learner(MixedPrecision(dtype, pure=pure, init_scale=256.0), valid=batches(8, seed=2), metrics=accuracy).fit(
        4
    )
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert {p.dtype for p in [v for s in learn.opt.state.values() for v in s.values() if isinstance(v, Tensor)]} <= {
        torch.float32
    }
    torch.testing.assert_close(weights(learn), weights(plain), rtol=0.0, atol=0.03 if dtype == torch.bfloat16 else 5e-3)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights(learn), weights(plain), strict=True)
    )  # it has been at work
    assert learn.recorder.losses == pytest.approx(plain.recorder.losses, rel=0.02)
    assert learn.validate()["valid_loss"] == pytest.approx(plain.validate()["valid_loss"], rel=0.02)


class Dtypes(nn.Module):
    """Notes what its layers are given and give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.seen: set[tuple[bool, torch.dtype, torch.dtype]] = set()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        x = self.head(x)
        self.seen.add((self.training, self.conv.weight.dtype, x.dtype))
        return x


def pictures() -> list[Batch]:
    return [(torch.randn(4, 3, 6, 6), torch.randint(2, (4,)))] * 2


@pytest.mark.parametrize(
    "word, weight, output",
    [({}, torch.float32, torch.float16), ({"pure": True}, torch.float16, torch.float16)],
    ids=["autocast", "pure"],
)
def test_pure_casts_the_weights_and_autocast_the_operations_in_training_validation_and_prediction(word, weight, output):
    learn = Learner((pictures(), pictures()), Dtypes()).to_fp16(**word, init_scale=4.0).fit(1)
    assert learn.model.seen == {(True, weight, output), (False, weight, output)}
    for name, value in learn.model.state_dict().items():
        assert value.dtype == (torch.int64 if "tracked" in name else torch.float32)
    learn.model.seen.clear()
    preds, _, losses = learn.get_preds(with_loss=True)
    assert preds.dtype == losses.dtype == learn.predict(pictures()[0][0]).dtype == torch.float32
    assert learn.model.seen == {(False, weight, output)}


def test_pure_leaves_batch_norm_in_float32_and_its_statistics_follow():
    learn = Learner((pictures(), None), Dtypes()).to_bf16(pure=True).fit(2)
    assert learn.model.norm.num_batches_tracked == 4 and learn.model.norm.running_var.dtype == torch.float32
    plain = Learner((pictures(), None), Dtypes())
    assert plain.model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("pure", [False, True])
def test_shared_weights_and_inputs_of_integers_are_right(pure):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(10, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.embed(x))

    train = [(torch.randint(10, (6,)), torch.randint(10, (6,))) for _ in range(3)]
    plain, half = (Learner((train, None), Tied(), opt_func=torch.optim.SGD, lr=0.5, wd=0.0) for _ in range(2))
    plain.fit(2), half.to_bf16(pure=pure).fit(2)
    torch.testing.assert_close(half.model.embed.weight, plain.model.embed.weight, rtol=0, atol=0.02)
    assert half.model.out.weight is half.model.embed.weight


def test_the_words_replace_each_other_and_to_fp32_takes_all_back():
    learn = learner()
    names = [type(cb).__name__ for cb in learn.callbacks]
    for word in ("to_fp16", "to_bf16", "to_bf16"):
        getattr(learn, word)()
        assert [type(cb).__name__ for cb in learn.callbacks] == [*names, "MixedPrecision"]
    learn.to_fp32().fit(2)
    assert [type(cb).__name__ for cb in learn.callbacks] == names
    assert all(torch.equal(a, b) for a, b in zip(weights(learn), weights(learner().fit(2)), strict=True))


def test_tf32_is_left_alone_unless_it_is_asked_for():
    def now() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = now()
    try:
        assert learner().to_fp32() is not None and now() == before
        for wish in (True, False):
            learner().to_fp32(tf32=wish)
            assert now() == (wish, wish)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_built_optimizer_two_groups_and_frozen_parameters_are_unscaled_alike():
    def built(scaled: bool) -> Learner:
        model = net()
        opt = torch.optim.SGD(
            [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[2].parameters(), "lr": 0.2}]
        )
        model[0].bias.requires_grad_(False)
        learn = Learner((batches(4, 4, 3), None), model, opt_func=opt)
        return (learn.to_fp16(init_scale=256.0) if scaled else learn).fit(2)

    torch.testing.assert_close(weights(built(True)), weights(built(False)), rtol=0, atol=3e-3)


# --- ov ----------------------------------------------------------------------
class Overflow(Callback):
    """Makes some backward passes overflow, by their number."""

    order = 60

    def __init__(self, *at: int, value: float = math.inf) -> None:
        self.at, self.n, self.value = at, 0, value

    def after_backward(self, learn: Learner) -> None:
        if self.n in self.at:
            next(learn.model.parameters()).grad[0] = self.value
        self.n += 1


class StepsDone(Callback):
    def __init__(self) -> None:
        self.before, self.after, self.rates = 0, [], []

    def before_step(self, learn: Learner) -> None:
        self.before += 1

    def after_step(self, learn: Learner) -> None:
        self.after.append(learn.step)
        self.rates.append(learn.opt.param_groups[0]["lr"])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_step_that_overflows_moves_no_weight_schedule_counter_average_or_record(value):
    given = batches(4, 4, 4, 3)
    done, ema, ahead, clip, half = (
        StepsDone(),
        EMA(0.5),
        Lookahead(2),
        ClipGradients(0.5),
        MixedPrecision(torch.float16, init_scale=256.0),
    )
    learn = learner(Overflow(1, 2, value=value), done, ema, ahead, clip, half, train=given).fit_one_cycle(2, 0.1)
    # As if the two batches had not been there at all, but with the schedule of a fit of eight steps.
    assert learn.step == 6 and done.after == [1, 2, 3, 4, 5, 6] and learn.n_steps == 8
    assert half.skips == [1, 1] and half.scales == [256.0, 256.0, 128.0, 64.0, 64.0, 64.0, 64.0, 64.0]
    assert (
        len(learn.recorder.losses) == len(learn.recorder.lrs) == len(clip.norms) == 6
        and ema.n_updates == 6
        and ahead.n_steps == 6
    )
    plain = learner(train=given).fit_one_cycle(2, 0.1)
    assert learn.recorder.lrs == plain.recorder.lrs[:6] == done.rates and learn.recorder.moms == plain.recorder.moms[:6]

    class Leave(Callback):
        """Leaves batches out, by their number in the fit."""

        n = -1

        def before_batch(self, learn: Learner) -> None:
            from learnkit import SkipBatch

            self.n += 1
            if self.n in (1, 2):
                raise SkipBatch

    ema2, half2 = EMA(0.5), MixedPrecision(torch.float16, init_scale=256.0)
    without = learner(Leave(), ema2, Lookahead(2), ClipGradients(0.5), half2, train=given).fit_one_cycle(2, 0.1)
    torch.testing.assert_close(weights(learn), weights(without), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ema.average.state_dict(), ema2.average.state_dict(), rtol=1e-5, atol=1e-6)
    assert learn.recorder.losses == pytest.approx(without.recorder.losses, rel=1e-5)


@pytest.mark.parametrize("at", [1, 2], ids=["in the middle", "in the last batch"])
def test_an_overflow_within_a_window_leaves_that_window_out_and_the_next_is_whole(at):
    given = batches(4, 2, 3, 4, 1, 4)
    half = MixedPrecision(torch.float16, init_scale=64.0)
    learn = learner(Overflow(at), half, Accumulate(3), train=given).fit(1)
    expected = learner(MixedPrecision(torch.float16, init_scale=32.0), Accumulate(3), train=given[3:]).fit(1)
    assert half.skips == [0] and half.scales == [64.0, 32.0] and learn.step == 1 and learn.n_held == 0
    torch.testing.assert_close(weights(learn), weights(expected), rtol=1e-4, atol=1e-6)


def test_the_scale_grows_after_enough_steps_without_an_overflow():
    half = MixedPrecision(torch.float16, init_scale=8.0, growth_interval=3)
    learner(half, train=batches(*[4] * 8)).fit(1)
    assert half.scales == [8.0] * 3 + [16.0] * 3 + [32.0] * 2 and half.skips == []


def test_a_scale_that_is_much_too_large_is_found_by_halving():
    half = MixedPrecision(torch.float16, init_scale=2.0**40)
    learn = learner(half, train=batches(*[4] * 30)).fit(1)
    assert learn.step + len(half.skips) == 30 and learn.step > 0 and half.skips[:20] == [0] * 20
    assert half.scales[:3] == [2.0**40, 2.0**39, 2.0**38] and all(p.isfinite().all() for p in learn.model.parameters())


def test_gradients_that_are_never_finite_end_the_fit_with_what_to_do():
    learn = learner(Overflow(*range(1000)), MixedPrecision(torch.float16, init_scale=1.0), train=batches(*[4] * 40))
    before = weights(learn)
    with pytest.raises(
        FloatingPointError, match=r"gradients are not finite.*epoch 0, training batch \d+.*use to_bf16\(\)"
    ):
        learn.fit(1)
    assert learn.step == 0 and all(map(torch.equal, weights(learn), before))


def test_a_second_fit_goes_on_with_the_scale_of_the_first():
    half = MixedPrecision(torch.float16, init_scale=8.0, growth_interval=4)
    learn = learner(half).fit(1)
    assert half.scales == [8.0] * 4
    learn.fit(1)
    assert half.scales == [16.0] * 4


class Reads(TorchDispatchMode):
    """Counts the numbers that are fetched from tensors, one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts the tensors that are fetched whole, which the dispatcher does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += getattr(func, "__name__", "") in ("tolist", "numpy", "cpu")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make, expected",
    [
        (list, 0),
        (lambda: [MixedPrecision()], 0),
        (lambda: [MixedPrecision(torch.float16, init_scale=64.0)], 1),
        (lambda: [MixedPrecision(torch.float16, init_scale=64.0), ClipGradients(0.3), EMA(0.9), Lookahead(2)], 1),
    ],
    ids=["float32", "bfloat16", "float16", "float16 beside others"],
)
def test_only_float16_reads_the_device_and_once_a_step(make, expected):
    counts = []
    for n in (4, 14):
        learn = learner(*make(), train=batches(*[4] * n)).remove_callback(Progress)
        with Reads() as numbers, Lists() as lists:
            learn.fit(1)
        counts.append(numbers.n + lists.n)
    assert counts[1] - counts[0] == 10 * expected


def test_bfloat16_has_no_scale_and_skips_nothing():
    half = MixedPrecision()
    learn = learner(half).fit(1)
    assert half.scaler is None and half.scales == [] and half.skips == [] and learn.step == 4


# --- beside Accum ------------------------------------------------------------
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_a_window_has_the_step_of_one_batch(dtype, pure, clip):
    given = batches(4, 2, 3, 4, 1)
    joined = [tuple(map(torch.cat, zip(*window, strict=True))) for window in (given[:3], given[3:])]
    results = []
    for train, more in ((given, [Accumulate(3)]), (joined, [])):
        if clip:
            more.append(ClipGradients(clip))
        results.append(learner(MixedPrecision(dtype, pure=pure, init_scale=64.0), *more, train=train).fit(3))
    torch.testing.assert_close(
        weights(results[0]), weights(results[1]), rtol=0, atol=2e-3 if dtype == torch.float16 else 1e-2
    )
    assert results[0].recorder.losses == pytest.approx(results[1].recorder.losses, rel=0.02)


# --- cl ----------------------------------------------------------------------
class RaiseAt(Callback):
    order = 70

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def meet(self, hook: str) -> None:
        if hook == self.hook:
            raise ConnectionAbortedError

    def before_forward(self, learn: Learner) -> None:
        self.meet("before_forward")

    def after_forward(self, learn: Learner) -> None:
        self.meet("after_forward" if learn.training else "validating")

    def after_backward(self, learn: Learner) -> None:
        self.meet("after_backward")

    def before_step(self, learn: Learner) -> None:
        self.meet("before_step")

    def after_step(self, learn: Learner) -> None:
        self.meet("after_step")


@pytest.mark.parametrize(
    "hook", ["before_forward", "after_forward", "validating", "after_backward", "before_step", "after_step"]
)
@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_after_an_error_autocast_is_off_and_everything_is_as_it_was(dtype, pure, hook):
    learn = learner(MixedPrecision(dtype, pure=pure, init_scale=64.0), valid=batches(4))
    names = ("differentiate", "training_model", "evaluated_model", "count", "whole", "zero_grad")
    learn.fit(1)
    before = {name: getattr(learn, name) for name in names}
    with pytest.raises(ConnectionAbortedError):
        learn.fit(1, callbacks=[RaiseAt(hook)])
    assert not torch.is_autocast_enabled("cpu")
    after = {name: getattr(learn, name) for name in names}
    assert after.pop("evaluated_model") is learn.model and before.pop("evaluated_model") is learn.model
    before.pop("zero_grad"), after.pop("zero_grad")
    assert after == before and not any(isinstance(p.grad, Tensor) and p.grad.any() for p in learn.model.parameters())
    learn.fit(1)  # and the next fit, with the scaler where it was, works
    assert learn.step == 4


# --- -------------------------------------------------------------------------
def resumable(precision: str) -> Learner:
    torch.manual_seed(4)
    x, y = torch.randn(30, 4), torch.randint(3, (30,))
    data = DataBunch.from_tensors((x, y), (x[:6], y[:6]), bs=4, drop_last=False)
    learn = Learner(
        data,
        net(nn.BatchNorm1d(8), nn.Dropout(0.2)),
        lr=0.01,
        callbacks=[Accumulate(2), Checkpoint("kept", every_n_steps=1)],
    )
    return (
        learn.to_fp16(init_scale=2.0**10, growth_interval=2)
        if precision == "fp16"
        else learn.to_bf16(pure=precision == "pure bf16")
    )


def state(learn: Learner, half: MixedPrecision) -> Any:
    scaler = None if half.scaler is None else half.scaler.state_dict()
    return (
        [v.tolist() for v in learn.model.state_dict().values()],
        learn.recorder.losses,
        learn.recorder.values,
        scaler,
        half.scales,
        half.skips,
        learn.step,
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure bf16"])
def test_a_fit_resumed_at_any_step_has_the_same_scale_skips_and_weights(precision, monkeypatch, tmp_path):
    class Die(Callback):
        order = Checkpoint.order - 10

        def __init__(self, at: int) -> None:
            self.at = at

        def after_batch(self, learn: Learner) -> None:
            if learn.training and 8 * learn.epoch + learn.batch_index + 1 == self.at:
                raise ConnectionAbortedError

    def half(learn: Learner) -> MixedPrecision:
        return next(cb for cb in learn.callbacks if isinstance(cb, MixedPrecision))

    class OverflowAt(Callback):
        """The same overflow in every run: by its place in the fit."""

        order = 60

        def after_backward(self, learn: Learner) -> None:
            if precision == "fp16" and (learn.epoch, learn.batch_index) in ((0, 2), (1, 4)):
                learn.model[0].weight.grad[0] = math.inf

    learn = resumable(precision)
    expected = state(learn.fit_one_cycle(2, 0.05, callbacks=[OverflowAt()]), half(learn))
    assert expected[5] == ([1, 5] if precision == "fp16" else [])
    for at in (2, 3, 4, 6, 8, 10, 11, 14):  # a checkpoint is taken after each step, of two batches
        folder = tmp_path / str(at)
        folder.mkdir()
        monkeypatch.chdir(folder)
        learn = resumable(precision)
        with pytest.raises(ConnectionAbortedError):
            learn.fit_one_cycle(2, 0.05, callbacks=[OverflowAt(), Die(at)])
        learn = resumable(precision)
        torch.manual_seed(99)
        assert state(learn.fit_one_cycle(2, 0.05, callbacks=[OverflowAt()], resume=True), half(learn)) == expected, (
            f"killed after {at} batches"
        )


def test_a_checkpoint_of_another_precision_is_refused():
    class Die(Callback):
        def after_epoch(self, learn: Learner) -> None:
            raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        resumable("fp16").fit(2, callbacks=[Die()])
    with pytest.raises(
        ValueError, match="a fit with a scaled loss, but this fit uses bfloat16: resume it in the same precision"
    ):
        resumable("bf16").fit(2, resume=True)


# --- w -----------------------------------------------------------------------
def test_what_is_no_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"dtype=torch.float64: expected torch.bfloat16 or torch.float16"):
        MixedPrecision(torch.float64)
    with pytest.raises(ValueError, match="init_scale=0: expected a number above 0"):
        learner().to_fp16(init_scale=0)


def test_a_word_in_the_middle_of_a_fit_is_refused():
    class Change(Callback):
        def after_step(self, learn: Learner) -> None:
            learn.to_bf16()

    with pytest.raises(RuntimeError, match="called while this Learner runs"):
        learner(Change()).fit(1)
