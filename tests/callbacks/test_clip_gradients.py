"""ClipGradients: torch's own clipping, once a step, of whole and unscaled gradients; the norms are kept without a
read.
"""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Accumulate, Checkpoint, ClipGradients, MixedPrecision, Progress, TerminateOnNaN

Batch = tuple[Tensor, Tensor]


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), 3 * torch.randn(n, 2, generator=generator)) for n in sizes]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def learner(
    *callbacks: Callback, train: Any = None, valid: Any = None, model: nn.Module | None = None, **options: Any
) -> Learner:
    return Learner(
        (train or batches(4, 4, 3), valid),
        model or net(),
        callbacks=callbacks,
        **{"opt_func": torch.optim.SGD, "lr": 0.1, "wd": 0.0} | options,
    )


def by_hand(clip: Any, given: list[Batch]) -> tuple[list[Tensor], list[float]]:
    """A loop with clip(parameters), which returns the norm."""
    model, norms = net(), []
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in given:
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        norms.append(clip(list(model.parameters())))
        opt.step()
    return list(model.parameters()), norms


def adaptive(limit: float) -> Any:
    """A unit at a time, as the paper has it."""

    def clip(parameters: list[Tensor]) -> None:
        for p in parameters:
            for weights, gradient in zip(p.data, p.grad, strict=True) if p.ndim > 1 else [(p.data, p.grad)]:
                largest = limit * max(float(weights.norm()), 1e-3)
                if float(gradient.norm()) > largest:
                    gradient.mul_(largest / float(gradient.norm()))

    return clip


CLIPS: dict[str, tuple[dict[str, float], Any]] = {
    "max_norm": ({"max_norm": 0.3}, lambda ps: float(nn.utils.clip_grad_norm_(ps, 0.3))),
    "the default": ({}, lambda ps: float(nn.utils.clip_grad_norm_(ps, 1.0))),
    "norm 1": ({"max_norm": 0.3, "norm_type": 1.0}, lambda ps: float(nn.utils.clip_grad_norm_(ps, 0.3, 1.0))),
    "norm inf": (
        {"max_norm": 0.1, "norm_type": math.inf},
        lambda ps: float(nn.utils.clip_grad_norm_(ps, 0.1, math.inf)),
    ),
    "value": ({"value": 0.05}, lambda ps: nn.utils.clip_grad_value_(ps, 0.05)),
    "adaptive": ({"adaptive": 0.02}, adaptive(0.02)),
}


@pytest.mark.parametrize("options, clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("n", [1, 2])
def test_it_is_clipping_by_hand_of_the_gradient_of_the_whole_step(options, clip, n):
    given, callback = batches(4, 2, 5, 3), ClipGradients(**options)
    joined = [tuple(map(torch.cat, zip(*given[i : i + n], strict=True))) for i in range(0, 4, n)]
    learn = learner(callback, Accumulate(n), train=given).fit(2)
    expected, norms = by_hand(clip, joined * 2)  # type: ignore[arg-type]
    torch.testing.assert_close(list(learn.model.parameters()), expected)
    assert callback.norms == (pytest.approx(norms) if norms[0] is not None else [])
    unclipped = learner(Accumulate(n), train=given).fit(2)
    assert not torch.allclose(next(learn.model.parameters()), next(unclipped.model.parameters()), atol=1e-5)


def test_gradients_below_the_limit_are_not_touched():
    clipped, plain = learner(ClipGradients(1e6)).fit(3), learner().fit(3)
    for p, q in zip(clipped.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", [{"max_norm": 0.3}, {"value": 0.05}, {"adaptive": 0.02}])
@pytest.mark.parametrize("n", [1, 3])
def test_it_clips_what_the_scale_of_float16_was_taken_out_of(options, n):
    results = []
    for scale in (4.0, 512.0):
        callback = ClipGradients(**options)
        learn = learner(
            callback, Accumulate(n), MixedPrecision(torch.float16, init_scale=scale), train=batches(4, 2, 5, 3)
        ).fit(2)
        results.append(([*learn.model.parameters()], callback.norms))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=5e-3)
    assert results[0][1] == pytest.approx(results[1][1], rel=0.02)
    assert not results[0][1] or max(results[0][1]) < 20


def test_a_step_that_overflowed_is_not_clipped_and_has_no_norm():
    class Overflow(Callback):
        order = 60

        def after_backward(self, learn: Learner) -> None:
            if learn.batch_index == 1:
                next(learn.model.parameters()).grad[0, 0] = math.inf  # type: ignore[index]

    callback = ClipGradients(0.3)
    learn = learner(callback, Overflow(), MixedPrecision(torch.float16, init_scale=64.0), train=batches(*[4] * 5)).fit(
        1
    )
    assert len(callback.norms) == learn.step == 4 and all(map(math.isfinite, callback.norms))


def test_frozen_and_unused_parameters_are_left_out():
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.frozen, self.unused = (
                nn.Linear(4, 2),
                nn.Linear(4, 4).requires_grad_(False),
                nn.Linear(4, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.frozen(x))

    for options in ({"max_norm": 0.1}, {"value": 0.1}, {"adaptive": 0.1}):
        callback = ClipGradients(**options)
        learn = learner(callback, model=Partly()).fit(1)
        assert torch.equal(learn.model.frozen.weight, Partly().frozen.weight) and len(callback.norms) == (
            3 if "max_norm" in options else 0
        )


# --- without a ---------------------------------------------------------------
class Reads(TorchDispatchMode):
    """Counts the numbers that are fetched from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.n: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n[func.name()] += 1
        return func(*args, **(kwargs or {}))


def reads_of_a_step(*callbacks: Any) -> float:
    counts = []
    for n in (4, 14):
        learn = learner(*[make() for make in callbacks], train=batches(*[4] * n)).remove_callback(Progress)
        with Reads() as reads:
            learn.fit(1)
        counts.append(reads.n["aten::_local_scalar_dense"])
    return (counts[1] - counts[0]) / 10


def n_positive(inputs: Any, target: Tensor) -> Tensor:
    return (target > 0).sum()


@pytest.mark.parametrize("options", [{"max_norm": 0.3}, {"value": 0.1}, {"adaptive": 0.1}])
def test_neither_clipping_nor_accumulating_reads_the_device(options):
    plain = reads_of_a_step()
    assert plain == reads_of_a_step(lambda: ClipGradients(**options))
    assert plain == reads_of_a_step(lambda: ClipGradients(**options), lambda: Accumulate(1))
    assert plain == reads_of_a_step(lambda: ClipGradients(**options), lambda: Accumulate(1, count=n_positive))
    assert plain == reads_of_a_step(lambda: ClipGradients(**options), lambda: MixedPrecision(torch.bfloat16))


def test_the_control_reads_once_a_step():
    class ReadsOnce(Callback):
        def after_step(self, learn: Learner) -> None:
            learn.loss.item()

    assert reads_of_a_step(ReadsOnce) == reads_of_a_step() + 1


# --- clean-up, r -------------------------------------------------------------
def test_after_an_error_the_next_fit_has_its_own_norms():
    class Raise(Callback):
        def after_step(self, learn: Learner) -> None:
            raise ConnectionAbortedError

    callback = ClipGradients(0.3)
    learn = learner(callback)
    with pytest.raises(ConnectionAbortedError):
        learn.fit(1, callbacks=[Raise()])
    learn.fit(1)
    assert len(callback.norms) == 3


def test_norms_and_weights_of_a_resumed_fit_are_those_of_one_that_was_not_interrupted():
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.batch_index) == (1, 2):
                raise ConnectionAbortedError

    def make(folder: str) -> tuple[Learner, ClipGradients]:
        callback = ClipGradients(0.3)
        torch.manual_seed(1)
        data = DataBunch.from_tensors((torch.randn(20, 4), torch.randn(20, 2)), bs=4)
        return Learner(data, net(), callbacks=[callback, Accumulate(2), Checkpoint(folder, every_n_steps=1)]), callback

    plain, expected = make("a")
    plain.fit(2)
    with pytest.raises(ConnectionAbortedError):
        make("b")[0].fit(2, callbacks=[Die()])
    learn, callback = make("b")
    learn.fit(2, resume=True)
    assert callback.norms == expected.norms and len(callback.norms) == 6
    for p, q in zip(learn.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_norm_that_is_not_finite_is_left_to_terminate_on_nan():
    class Spoil(Callback):
        order = -20

        def after_backward(self, learn: Learner) -> None:
            if learn.step == 1:
                next(learn.model.parameters()).grad[0, 0] = math.nan  # type: ignore[index]

    learn = learner(ClipGradients(0.3), Spoil(), TerminateOnNaN())
    with pytest.warns(UserWarning, match="stopped before step 1"):
        learn.fit(1)
    assert all(bool(p.isfinite().all()) for p in learn.model.parameters())


# --- w -----------------------------------------------------------------------
def test_one_limit_at_a_time_and_above_zero():
    with pytest.raises(
        ValueError, match="clipping by max_norm and value at once: choose one of max_norm, value, adaptive"
    ):
        ClipGradients(1.0, value=0.1)
    for name in ("max_norm", "value", "adaptive"):
        with pytest.raises(ValueError, match=f"{name}=-1: expected a number above 0"):
            ClipGradients(**{name: -1})
