"""batch_size_find: the largest power of two that fits, and a Learner that does not know of it."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import EMA, Accumulate, AutoMicrobatch, Checkpoint, MixedPrecision, SaveBest


class Limited(nn.Module):
    """Holds so many samples in training and no more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        self.limit, self.seen = limit, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(len(x))
        if self.training and len(x) > self.limit:
            raise torch.OutOfMemoryError(f"{len(x)} samples")
        return self.net(x)


def learner(limit: int, *callbacks: Callback, n: int = 40, **options: Any) -> Learner:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)
    return Learner(
        DataBunch.from_tensors((x, y), (x[:9], y[:9]), bs=8),
        Limited(limit),
        metrics=accuracy,
        callbacks=callbacks,
        **options,
    )


@pytest.mark.parametrize("limit, expected", [(2, 2), (7, 4), (8, 8), (31, 16), (10**9, 32)])
def test_it_is_the_largest_power_of_two_that_fits_up_to_the_limit(limit, expected):
    learn = learner(limit)
    assert learn.batch_size_find(max_bs=32) == expected
    tried = learn.model.seen
    assert max(tried) <= 32 and tried == sorted(tried) and tried.count(2) == 2  # two steps each, none above what failed


def test_what_fits_at_the_limit_is_found_where_the_limit_is_no_power_of_two():
    assert learner(10**9).batch_size_find(max_bs=100) == 64


def test_of_one_sample_it_says_so_and_of_none_what_to_do():
    class NoNorm(Limited):
        def __init__(self, limit: int) -> None:
            super().__init__(limit)
            self.net = nn.Sequential(nn.Linear(4, 3))

    for limit in (1, 0):
        learn = Learner(learner(9).data, NoNorm(limit))
        if limit:
            assert learn.batch_size_find() == 1
        else:
            with pytest.raises(
                RuntimeError, match=r"not even one sample fits into memory: use a smaller model, or to_bf16\(\)"
            ):
                learn.batch_size_find()


def everything(learn: Learner) -> tuple[dict[str, Tensor], list[Any]]:
    tensors = {f"model {k}": v for k, v in learn.model.state_dict().items()} | {"rng": torch.get_rng_state()}
    tensors |= {f"gradient {k}": p.grad for k, p in learn.model.named_parameters() if p.grad is not None}
    plain: list[Any] = []
    if learn.opt is not None:
        tensors |= {f"opt {i} {k}": v for i, state in learn.opt.state_dict()["state"].items() for k, v in state.items()}
        plain.append([{k: v for k, v in group.items() if k != "params"} for group in learn.opt.param_groups])
    for callback in learn.callbacks:
        if isinstance(callback, EMA) and callback.average is not None:
            tensors |= {f"average {k}": v for k, v in callback.average.state_dict().items()}
        if isinstance(callback, MixedPrecision):
            plain.append((callback.scales, callback.skips, callback.scaler and callback.scaler.state_dict()))
    plain += [
        random.getstate(),
        learn.epochs_trained,
        learn.n_fits,
        learn.step,
        learn.values,
        learn.recorder.losses,
        learn.recorder.values,
        learn.data.train_dl.sampler.epoch,
        [type(cb).__name__ for cb in learn.callbacks],
        learn.world_size,
        [m.training for m in learn.model.modules()],
        [p.requires_grad for p in learn.model.parameters()],
    ]
    return {k: v.clone() for k, v in tensors.items()}, plain


CASES: dict[str, Any] = {
    "plain": list,
    "accumulate": lambda: [Accumulate(3)],
    "ema": lambda: [EMA(0.9, saves=True)],
    "fp16": lambda: [MixedPrecision(torch.float16, init_scale=64.0)],
    "auto": lambda: [AutoMicrobatch(), Accumulate(2), MixedPrecision()],
    "writing": lambda: [Checkpoint("kept"), SaveBest()],
}


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_the_learner_is_left_bit_identical_and_trains_as_if_it_had_not_been(make, fitted, tmp_path):
    learn, twin = learner(8, *make()), learner(8, *make())
    for one in (learn, twin):
        torch.manual_seed(5)
        if fitted:
            one.fit_one_cycle(1)
    before, data, files = (
        everything(learn),
        (learn.data, learn.data.train_dl, learn.data.valid_dl),
        sorted(tmp_path.rglob("*")),
    )
    assert learn.batch_size_find() == 8
    after = everything(learn)
    assert after[1] == before[1] and after[0].keys() == before[0].keys()
    for name, value in after[0].items():
        assert torch.equal(value, before[0][name]), name
    assert data == (learn.data, learn.data.train_dl, learn.data.valid_dl) and sorted(tmp_path.rglob("*")) == files
    assert (learn.opt is not None) == fitted
    for one in (learn, twin):
        torch.manual_seed(6)
        one.fit_one_cycle(2)
    for a, b in zip(learn.model.state_dict().values(), twin.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert learn.recorder.losses == twin.recorder.losses


def test_a_callback_that_splits_batches_takes_no_part():
    assert learner(30, AutoMicrobatch()).batch_size_find() == 16


def test_windows_are_tried_whole_so_that_what_is_held_counts():
    learn = learner(50, Accumulate(3))
    learn.batch_size_find(max_bs=2, n_steps=2)
    assert learn.model.seen == [2] * 6


def test_an_error_of_another_kind_comes_up_and_the_learner_is_as_it_was():
    class Fails(Callback):
        def after_step(self, learn: Learner) -> None:
            if len(learn.target) == 8:
                raise ConnectionAbortedError

    learn = learner(50, Fails())
    before = everything(learn)
    with pytest.raises(ConnectionAbortedError):
        learn.batch_size_find()
    after = everything(learn)
    assert after[1] == before[1]
    for name, value in after[0].items():
        assert torch.equal(value, before[0][name]), name


def test_arguments_that_are_none_and_a_learner_that_runs_are_refused():
    class Within(Callback):
        def after_step(self, learn: Learner) -> None:
            learn.batch_size_find()

    for name in ("max_bs", "n_steps"):
        with pytest.raises(ValueError, match=f"{name}=0: expected 1 or more"):
            learner(9).batch_size_find(**{name: 0})
    with pytest.raises(RuntimeError, match="while this Learner runs"):
        learner(50, Within()).fit(1)


def test_data_of_workers_and_of_pairs_of_loaders_are_found_for():
    learn = learner(20)
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    pairs: list[Any] = [
        ([(x, y)], None),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True), None),
    ]
    for pair in pairs:
        assert Learner(pair, Limited(20), opt_func=partial(torch.optim.SGD, momentum=0.9)).batch_size_find() == 16
    assert learn.batch_size_find() == 16


# --- wha ---------------------------------------------------------------------
class State(Callback):
    """The optimizer's state takes memory from the end of the first step on; notes the steps of each fit."""

    def __init__(self, before: int, after: int) -> None:
        self.before, self.after, self.n_steps = before, after, NOTED

    def before_fit(self, learn: Learner) -> None:
        learn.model.limit = self.before
        self.n_steps.append(0)

    def after_step(self, learn: Learner) -> None:
        learn.model.limit = self.after
        self.n_steps[-1] += 1


NOTED: list[int] = []


def test_a_size_fits_where_it_does_with_the_optimizers_state():
    assert learner(10**9, State(16, 5)).batch_size_find() == 4
    assert learner(10**9, State(16, 99)).batch_size_find() == 16
    assert learner(10**9, State(16, 5)).batch_size_find(n_steps=1) == 16


def test_steps_that_float16_skips_are_not_counted():
    NOTED.clear()
    learner(10**9, State(4, 4), MixedPrecision(torch.float16, init_scale=2.0**40)).batch_size_find()
    assert NOTED == [2, 2, 0]  # with 2, 4 and 8 samples


class NoRoom(torch.optim.AdamW):
    def step(self, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("no room for the state")


def test_where_the_optimizers_step_does_not_fit_no_other_size_is_tried():
    learn = learner(10**9, opt_func=NoRoom)
    with pytest.raises(RuntimeError, match="not even one sample fits") as raised:
        learn.batch_size_find()
    assert learn.model.seen == [2] and any(
        "in the optimizer's step" in note for note in raised.value.__cause__.__notes__
    )


def test_a_batch_that_cannot_even_be_made_does_not_fit():
    x, y = torch.zeros(1).expand(2, 2**42), torch.zeros(2, dtype=torch.long)
    learn = Learner(DataBunch([(x, y)]), Limited(9), device="cpu")
    with pytest.raises(RuntimeError, match="not even one sample fits into memory"):
        learn.batch_size_find()


def test_an_error_that_no_smaller_size_cures_is_raised_as_it_is():
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("GET was unable to find an engine to execute this computation")

    with pytest.raises(RuntimeError, match="GET was unable to find an engine"):
        Learner(learner(9).data, Fails(4, 3)).batch_size_find()
