"""Finders, trackers, loggers and statistics on two ranks: what one process of the whole batch gives, and the same on
both.
"""

import copy
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
from torch import Tensor, nn
from torch.optim import SGD

from learnkit import Callback, DataBunch, Learner, accuracy, load_learner
from learnkit.callbacks import (
    ActivationStats,
    BnFreeze,
    Checkpoint,
    EarlyStopping,
    GradientStats,
    GradualUnfreezing,
    JSONLogger,
    Profile,
    ReduceLROnPlateau,
    StopAfter,
    Timer,
)
from learnkit.distributed import get_world_size
from learnkit.distributed.request import Request

N, GLOBAL = 44, 12  # three whole global batches and one of 8 samples


def tensors(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def learner(*callbacks: Any, lr: float = 0.05) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = DataBunch.from_tensors(
        tensors(), tensors(11, seed=2), bs=GLOBAL // get_world_size(), drop_last=False, seed=3
    )
    return Learner(data, model, metrics=accuracy, lr=lr, wd=0.0, callbacks=callbacks, opt_func=SGD).to_distributed()


def state(learn: Learner) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in learn.model.parameters()]).tolist()


# --- lr_find -----------------------------------------------------------------
def sweep() -> Any:
    learn = learner()
    before = state(learn)
    found = learn.lr_find(1e-3, 1e3, 40)
    assert state(learn) == before
    learn.fit(1, 0.1)
    return found.lrs, found.raw_losses, found.diverged, found.suggestion, state(learn)


def test_a_sweep_is_the_same_on_all_ranks_and_that_of_one_process(ranks):
    alone = sweep()
    first, second = ranks(2, sweep)
    assert first == second and alone[2] == first[2] is True
    assert first[0] == pytest.approx(alone[0]) and first[1] == pytest.approx(alone[1], rel=1e-3)
    assert first[3] == pytest.approx(alone[3]) and first[4] == pytest.approx(alone[4], abs=1e-5)


# --- trackers ----------------------------------------------------------------
class Sleeps(Callback):
    """One rank's clock is ahead."""

    def after_step(self, learn: Learner) -> None:
        time.sleep(0.02 * (learn.rank + 1))


def trackers() -> Any:
    learn = learner(
        ReduceLROnPlateau("val_loss", patience=1, min_delta=0.2), EarlyStopping("valid_accuracy", patience=4)
    )
    learn.fit(8)
    stopped = learner(Sleeps(), StopAfter(seconds=0.15))
    stopped.fit(50)
    return learn.recorder.lrs, learn.recorder.values, [stopped.step, len(stopped.recorder.values)], state(stopped)


def test_trackers_decide_alike_on_all_ranks_and_as_on_one_process(ranks):
    alone = trackers()
    first, second = ranks(2, trackers)
    assert first == second
    assert first[0] == pytest.approx(alone[0]) and len(set(first[0])) > 1
    for row, expected in zip(first[1], alone[1], strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


# --- loggers -----------------------------------------------------------------
def log(folder: str) -> Any:
    """A fit of 8 steps that is ended after 5 or so, and resumed: what rank 0 has written."""
    path = Path(folder) / f"world{get_world_size()}"
    with suppress(SystemExit):
        learner(
            JSONLogger(path / "log.jsonl", every_n_steps=3), Checkpoint(path / "kept", every_n_steps=2), Terminated()
        ).fit(2)
    learner(JSONLogger(path / "log.jsonl", every_n_steps=3), Checkpoint(path / "kept", every_n_steps=2)).fit(
        2, resume=True
    )
    rows = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [(row["step"], sorted(row)) for row in rows], [row.get("loss", row.get("valid_loss", 0.0)) for row in rows]


class Terminated(Callback):
    """The last rank gets a SIGTERM, as it were."""

    def after_step(self, learn: Learner) -> None:
        if learn.step == 5 and learn.rank == learn.world_size - 1:
            learn.wanted = Request("signal", 15)


def test_rank_0_logs_what_one_process_would_and_goes_on_after_a_resume(ranks, tmp_path):
    alone = log(str(tmp_path))
    first, second = ranks(2, log, str(tmp_path))
    assert first == second and first[0] == alone[0] and [step for step, _ in first[0]] == [0, 3, 4, 6, 8]
    assert first[1] == pytest.approx(alone[1], abs=1e-5)


# --- looking inside ----------------------------------------------------------
def look() -> Any:
    learn = learner(timer := Timer(), gradients := GradientStats(), ActivationStats(), profile := Profile())
    learn.fit(2)
    values = learn.fast_run()
    losses = learn.overfit_batches(1, 30, 0.5)
    n_samples = [round(row["samples_per_second"] * row["seconds"]) for row in timer.rows]
    return (
        n_samples,
        gradients.recorded.flatten().tolist(),
        values,
        len(losses),
        losses[-1] < losses[0],
        "Distributed" in profile.seconds,
    )


def test_statistics_and_quick_looks_are_those_of_one_process(ranks):
    alone = look()
    first, second = ranks(2, look)
    assert first[:5] == second[:5] and first[0] == alone[0] == [44, 44] and first[3:] == (30, True, True)
    assert first[1] == pytest.approx(alone[1], abs=1e-5) and first[2].keys() == alone[2].keys()


# --- freezing ----------------------------------------------------------------
def unfreeze() -> Any:
    learn = learner(GradualUnfreezing(), BnFreeze())
    learn.splitter = lambda model: [model[:2], model[2]]
    return state(learn.fit(2))


def test_groups_join_on_two_ranks_as_on_one(ranks):
    alone = unfreeze()
    first, second = ranks(2, unfreeze)
    assert first == second and first == pytest.approx(alone, abs=1e-6)


# --- export ------------------------------------------------------------------
def exported(folder: str) -> Any:
    learn = learner().fit(1)
    path = learn.export(Path(folder) / "m.safetensors")
    found = load_learner(path, model=copy.deepcopy(learn.model)).predict(tensors()[0])
    return torch.equal(found, learn.predict(tensors()[0])), sorted(p.name for p in Path(folder).iterdir())


def test_rank_0_exports_and_all_ranks_can_load_it(ranks, tmp_path):
    assert ranks(2, exported, str(tmp_path)) == [(True, ["m.safetensors"])] * 2
