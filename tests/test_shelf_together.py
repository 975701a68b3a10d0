"""Finders, loggers and statistics beside accumulation and mixed precision: they count optimizer steps, and see what
these see.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import (
    EMA,
    SAM,
    Accumulate,
    ActivationStats,
    ClipGradients,
    GradientStats,
    GradualUnfreezing,
    JSONLogger,
    Profile,
    Timer,
)


def learner(*callbacks: Callback, bs: int = 8, **options: Any) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    data = DataBunch.from_tensors((x, (x[:, 0] > 0).long()), (x[:8], (x[:8, 0] > 0).long()), bs=bs, seed=1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return Learner(
        data, model, metrics=accuracy, opt_func=partial(SGD, momentum=0.9), wd=0.0, callbacks=callbacks, **options
    )


def test_a_sweep_of_accumulated_batches_equals_that_of_whole_ones():
    whole, parts = learner(bs=8).lr_find(1e-3, 1.0, 20), learner(Accumulate(2), bs=4).lr_find(1e-3, 1.0, 20)
    assert parts.lrs == whole.lrs and parts.raw_losses == pytest.approx(whole.raw_losses, rel=1e-5)
    assert parts.suggestion == whole.suggestion


def rows(path: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, Path(path).read_text().splitlines()) if "config" not in row]


def test_a_log_of_accumulated_batches_equals_that_of_whole_ones():
    learner(JSONLogger("whole.jsonl", every_n_steps=3), bs=8).fit(2)
    learner(Accumulate(2), JSONLogger("parts.jsonl", every_n_steps=3), bs=4).fit(2)
    for a, b in zip(rows("whole.jsonl"), rows("parts.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_norms_of_accumulated_and_clipped_gradients_are_those_of_the_whole():
    learner(whole := GradientStats(), ClipGradients(0.1), bs=8).fit(1)
    learner(parts := GradientStats(), ClipGradients(0.1), Accumulate(2), bs=4).fit(1)
    assert torch.allclose(whole.recorded, parts.recorded, rtol=1e-4) and whole.steps == parts.steps == [0, 1, 2, 3]
    assert whole.gradients.norm(dim=1).tolist() == pytest.approx([0.1] * 4, rel=1e-3)


@pytest.mark.parametrize("to", ["to_bf16", "to_fp16"])
def test_beside_mixed_precision_they_see_unscaled_gradients_and_nothing_changes(to: str):
    def make(*callbacks: Callback) -> Learner:
        return getattr(learner(*callbacks), to)()

    plain, seen = (
        make().fit(2),
        make(stats := GradientStats(), ActivationStats(), Profile(), Timer(), GradualUnfreezing(plan={0: 0})),
    )
    seen.splitter = lambda model: [model[0], model[2]]
    seen.fit(2)
    assert plain.recorder.losses == seen.recorder.losses
    learner(exact := GradientStats()).fit(2)
    assert torch.allclose(stats.gradients, exact.gradients, rtol=0.1, atol=0.02)
    assert len(make().lr_find(1e-4, 1.0, 15).lrs) == 15 and make().fast_run().keys() == {
        "train_loss",
        "valid_loss",
        "accuracy",
    }


@pytest.mark.parametrize("beside", [SAM, lambda: Accumulate(2), lambda: ClipGradients(0.1), lambda: EMA(0.5)])
def test_groups_that_wait_do_not_move_beside_others_that_own_the_step(beside: Any):
    learn = learner(beside(), GradualUnfreezing(plan={0: 1}), bs=4)
    learn.splitter = lambda model: [model[0], model[2]]
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(2)
    assert [torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True)] == [
        True,
        True,
        False,
        False,
    ]


def test_what_is_exported_are_the_averaged_weights_where_these_are_saved():
    learn = learner(EMA(0.9, saves=True)).fit(2)
    learn.export("m.safetensors")
    from learnkit import load_learner

    averaged = learner(EMA(0.9, saves=True)).fit(2)
    averaged.save("averaged")
    state = torch.load("models/averaged.pt", weights_only=True)["model"]
    found = load_learner("m.safetensors", model=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    expected = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    expected.load_state_dict(state)
    assert torch.allclose(found.predict(x), expected(x))
