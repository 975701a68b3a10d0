"""Memory that really runs out, on a device with little of it: AutoMicrobatch, batch_size_find, and what an error
says.
"""

from __future__ import annotations

import copy
import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import EMA, Accumulate, AutoMicrobatch
from learnkit.devices.accelerator import _computes_float64, accelerator, can_float64, can_pin, has_streams, widest_float
from learnkit.distributed import RankFailed, get_rank
from learnkit.distributed.launch import choose_start_method, lost_by_fork
from tests.accelerator import twin

Batch = tuple[Tensor, Tensor]
WIDTH = 64


class Net(nn.Module):
    """Of samples (length, 8); activations of one number are 2 × 64 floats, the weights 5 k."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean(1)


def batches(*shapes: tuple[int, int]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(*shape, 8, generator=generator), torch.randn(shape[0], 1, generator=generator)) for shape in shapes
    ]


def learner(
    given: list[Batch], *callbacks: Callback, device: Any = "twin", model: nn.Module | None = None, **options: Any
) -> Learner:
    options = {"opt_func": torch.optim.AdamW, "lr": 1e-3} | options
    return Learner(DataBunch(given), Net() if model is None else model, callbacks=callbacks, device=device, **options)


class Peaks(Callback):
    """The most memory that each batch's passes take, in bytes, and each step."""

    order = 2000

    def before_fit(self, learn: Learner) -> None:
        self.passes, self.steps = [], []

    def before_batch(self, learn: Learner) -> None:
        torch.accelerator.reset_peak_memory_stats()

    def before_step(self, learn: Learner) -> None:
        self.passes.append(torch.accelerator.max_memory_allocated())
        torch.accelerator.reset_peak_memory_stats()

    def after_step(self, learn: Learner) -> None:
        self.steps.append(torch.accelerator.max_memory_allocated())


def peaks(given: list[Batch], *callbacks: Callback, **options: Any) -> Peaks:
    """Of a fit in which all fits."""
    seen = Peaks()
    learner(given, *callbacks, seen, **options).fit(1)
    gc.collect()  # a Learner is a cycle, and what it held would count in the next fit
    return seen


def assert_trains_as_on_the_cpu(split: Learner, given: list[Batch], *callbacks: Callback, **options: Any) -> None:
    whole = learner(given, *callbacks, device="cpu", **options).fit(1)
    for p, q in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-5)
    assert split.step == whole.step and split.recorder.losses == pytest.approx(whole.recorder.losses, rel=1e-4)


@pytest.mark.parametrize(
    "callbacks", [(), (partial(EMA, 0.9),), (partial(Accumulate, 2),)], ids=["", "EMA", "Accumulate"]
)
def test_the_second_batch_is_split_where_the_optimizers_state_has_taken_the_room(callbacks):
    given = batches(*[(64, 8)] * 6)
    seen = peaks(given, *(make() for make in callbacks))
    first = 2 if callbacks and isinstance(callbacks[0](), Accumulate) else 1  # batches before there is any state
    before, after = max(seen.passes[:first]), seen.passes[-1]
    assert after > before
    twin.limit((before + after) // 2)
    auto = AutoMicrobatch()
    split = learner(given, auto, *(make() for make in callbacks)).fit(1)
    twin.limit(None)
    assert auto.size == 32
    assert_trains_as_on_the_cpu(split, given, *(make() for make in callbacks))


def test_a_longer_sequence_that_does_not_fit_is_split_though_as_many_samples_had_fitted():
    given = batches((16, 4), (16, 4), (16, 4), (16, 40), (16, 4), (16, 30))
    seen = peaks(given)
    twin.limit((seen.passes[2] + 3 * seen.passes[3]) // 4)
    split = learner(given, auto := AutoMicrobatch()).fit(1)
    twin.limit(None)
    assert auto.size == 8
    assert_trains_as_on_the_cpu(split, given)


def test_attempts_that_failed_hold_no_memory_afterwards():
    given = batches(*[(64, 8)] * 3)
    seen = peaks(given)
    learn = learner(given, AutoMicrobatch())
    twin.limit(seen.passes[-1] // 3)
    learn.fit(1)
    own = sum(t.numel() * t.element_size() for t in learn.model.parameters())
    state = sum(
        t.numel() * t.element_size() for s in learn.opt.state.values() for t in s.values() if t.device.type == "twin"
    )
    batch = sum(t.numel() * t.element_size() for t in (*learn.inputs, learn.target))
    assert (
        torch.accelerator.memory_allocated() <= (own + state + batch) * 1.1 + 4096
    )  # blocks are rounded up; recorded losses


def test_memory_that_runs_out_in_the_optimizers_step_is_said_to_be_that():
    given, model = batches(*[(1, 1)] * 2), Net(512)
    seen = peaks(given, model=copy.deepcopy(model))
    assert seen.steps[0] > seen.passes[0]
    learn = learner(given, AutoMicrobatch(), model=model)
    twin.limit((seen.passes[0] + seen.steps[0]) // 2)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        learn.fit(1)
    notes = "\n".join(raised.value.__notes__)
    assert (
        "memory ran out on twin:0 (now " in notes and "MiB are in use" in notes and "in the optimizer's step" in notes
    )


def test_the_note_says_how_full_the_device_is_and_which_batch_came_last():
    given = batches((64, 8))
    learn = learner(given)
    twin.limit(peaks(given).passes[0] // 2)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        learn.fit(1)
    assert any(
        "twin:0 (now " in note and "The last batch: 64 samples, (float32 (64, 8, 8)). Take a smaller batch size" in note
        for note in raised.value.__notes__
    )


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_size_that_is_found_fits_and_twice_as_many_samples_do_not(share):
    given = batches((64, 8))
    learn = learner(given)
    limit = int(peaks(given * 2).passes[-1] * share)
    twin.limit(limit)
    found = learn.batch_size_find(64)
    assert 1 < found < 64 and torch.accelerator.memory_allocated() < limit / 2
    del learn
    learner(batches(*[(found, 8)] * 3)).fit(1)
    with pytest.raises(torch.OutOfMemoryError):
        learner(batches(*[(2 * found, 8)] * 3)).fit(1)


# --- two ---------------------------------------------------------------------
class Smaller(Callback):
    """From the first batch on, rank 1's device has so many bytes."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def before_train(self, learn: Learner) -> None:
        if get_rank() == 1:
            twin.limit(self.n_bytes, 1)


def test_a_rank_whose_device_is_smaller_splits_its_batches_by_itself(ranks):
    given = batches(*[(32, 8)] * 8)

    def fit(limit: int | None) -> list[Any]:
        auto, seen = AutoMicrobatch(), Peaks()
        others = [] if limit is None else [Smaller(limit)]
        learn = learner(given, auto, seen, *others, device=None).to_distributed().fit(1)
        return [[p.cpu() for p in learn.model.parameters()], learn.recorder.losses, auto.size, seen.passes[-1]]

    whole = ranks(2, fit, None)
    assert [one[2] for one in whole] == [None, None]
    found = ranks(2, fit, int(whole[1][3] * 0.8))
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
        assert one[1] == pytest.approx(other[1], rel=1e-4)
    assert found[0][2] is None and found[1][2] in (16, 8)
    for p, q in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(p, q)


def test_a_rank_on_whose_device_no_sample_fits_ends_both_with_its_reason(ranks):
    def fit() -> None:
        learner(batches(*[(8, 64)] * 4), AutoMicrobatch(), Smaller(2**14), device=None).to_distributed().fit(1)

    with pytest.raises(
        RankFailed, match=r"(?s)rank 1 of 2 failed: torch.OutOfMemoryError: twin out of memory.*training batch 0"
    ):
        ranks(2, fit)


# --- the ---------------------------------------------------------------------
def test_what_is_said_of_the_accelerator_is_what_it_does():
    device = accelerator()
    assert (
        device == torch.device("twin")
        and can_pin(device) == torch.ones(1).pin_memory().is_pinned()
        and not can_pin(torch.device("cuda"))
    )
    assert has_streams(device) == (torch.Stream("twin") != torch.Stream("twin"))
    assert can_float64(device) and widest_float(device) == torch.float64
    _computes_float64.cache_clear()
    with twin.without_float64():
        assert not can_float64(device) and widest_float(device) == torch.float32
    _computes_float64.cache_clear()


def test_ranks_are_forked_until_the_device_is_used_here():
    assert lost_by_fork() is None and choose_start_method(choose_start_method) == "fork"
    torch.zeros(1, device="twin")
    assert lost_by_fork() == torch.device("twin") and choose_start_method(choose_start_method) == "spawn"
    with pytest.raises(RuntimeError, match="twin is in use in this process already"):
        choose_start_method(lambda: 0)
