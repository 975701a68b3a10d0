"""docs/callbacks.md shows nothing that is not run: blocks in order, what they print, and what each callback costs."""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import learnkit.callbacks
from learnkit import Callback, DataBunch, Learner, hooks
from learnkit.callbacks import (
    EMA,
    SAM,
    SWA,
    Accumulate,
    ActivationStats,
    AutoMicrobatch,
    BnFreeze,
    ChannelsLast,
    Checkpoint,
    ClipGradients,
    Communicate,
    Compiled,
    CSVLogger,
    CutMix,
    Distributed,
    EarlyStopping,
    FullyShard,
    GradientStats,
    GradualUnfreezing,
    JSONLogger,
    LabelSmoothing,
    Lookahead,
    MixedPrecision,
    MixUp,
    MLflowLogger,
    OptimizerModes,
    ParamScheduler,
    Profile,
    Progress,
    Recorder,
    ReduceAfterwards,
    ReduceLROnPlateau,
    SaveBest,
    StopAfter,
    TensorBoardLogger,
    TerminateOnNaN,
    Timer,
    WandbLogger,
)
from learnkit.schedule import constant
from tests.pages import Page
from tests.test_step_cost import BATCH, learner, per_step

PAGE = Page("docs/callbacks.md")


def test_every_block_runs_and_prints_what_the_page_shows():
    PAGE.run()
    assert list(Path().iterdir()) == []


def test_the_page_has_ten_examples_and_the_tree_of_stages():
    assert re.findall(r"^\*\*(\d+)\. ", PAGE.text, re.MULTILINE) == [str(i) for i in range(1, 11)]
    own = [line.strip() for line in (hooks.__doc__ or "").splitlines()]
    assert all(line.strip() in own for line in PAGE.blocks[0].code.splitlines())


# --- costs -------------------------------------------------------------------
def rows() -> dict[str, str]:
    table = PAGE.text[PAGE.text.index("| callback | calls a step") :].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("|")]
    return {name.strip("`"): cost for name, cost, *_ in cells}


def n_of_ours(counts: Counter[str]) -> float:
    """Without torch's, what a list's comprehension is in older Pythons, and the table that a schedule makes before the
    first step.
    """
    return sum(
        n
        for name, n in counts.items()
        if name not in ("others", "<listcomp>", "<genexpr>", "__call__", "_check_progress", "_linear")
    )


def pictures_of(n: int, make: Callable[[], Any] | None = None) -> Callable[[], Any]:
    """A fit of n batches of pictures, for those that need them."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    learn = Learner(
        DataBunch([(torch.zeros(8, 1, 4, 4), BATCH[1])] * n),
        model,
        loss_func=F.cross_entropy,
        wd=0.0,
        callbacks=[make()] if make else [],
    )
    learn.remove_callback(Progress)
    return lambda: learn.fit(1, 0.1)


def fit_of(
    n: int, make: Callable[[], Any] | None = None, without: tuple[type[Callback], ...] = (Progress,)
) -> Callable[[], Any]:
    learn = learner(n, callbacks=[make()] if make else [], splitter=lambda model: [model[0], model[2]])
    for cls in without:
        learn.remove_callback(cls)
    return lambda: learn.fit(1, 0.1)


@cache
def alone() -> float:
    return n_of_ours(per_step(fit_of))


def cost(make: Callable[[], Any]) -> float:
    """Calls of learnkit's functions a step more with the callback; beside a Recorder, which most need."""
    return round(n_of_ours(per_step(partial(fit_of, make=make))) - alone(), 6)


MADE: dict[str, Callable[[], Any]] = {
    "Accumulate": lambda: Accumulate(2),
    "AutoMicrobatch": AutoMicrobatch,
    "ChannelsLast": ChannelsLast,
    "ClipGradients": lambda: ClipGradients(1.0),
    "Compiled": Compiled,
    "EMA": EMA,
    "LabelSmoothing": LabelSmoothing,
    "Lookahead": Lookahead,
    "MixUp": MixUp,
    "MixedPrecision": MixedPrecision,
    "SAM": SAM,
    "SWA": SWA,
    "BnFreeze": BnFreeze,
    "CSVLogger": CSVLogger,
    "Checkpoint": lambda: Checkpoint("kept"),
    "EarlyStopping": lambda: EarlyStopping("train_loss"),
    "GradientStats": GradientStats,
    "GradualUnfreezing": GradualUnfreezing,
    "JSONLogger": JSONLogger,
    "ParamScheduler": lambda: ParamScheduler({"lr": constant(0.1)}),
    "Profile": Profile,
    "ReduceLROnPlateau": lambda: ReduceLROnPlateau("train_loss"),
    "SaveBest": lambda: SaveBest("train_loss"),
    "StopAfter": lambda: StopAfter(steps=100),
    "TerminateOnNaN": TerminateOnNaN,
    "Timer": Timer,
}


@pytest.mark.parametrize("name", MADE)
def test_a_callback_costs_as_many_calls_a_step_as_the_page_says(name: str):
    assert cost(MADE[name]) == float(rows()[name])


def test_so_do_those_that_are_there_by_default():
    both, neither = (n_of_ours(per_step(partial(fit_of, without=without))) for without in ((), (Progress, Recorder)))
    assert both - alone() == int(rows()["Progress"]) and alone() - neither == int(rows()["Recorder"])


def test_so_does_cutmix_on_pictures():
    assert n_of_ours(per_step(partial(pictures_of, make=CutMix))) - n_of_ours(per_step(pictures_of)) == float(
        rows()["CutMix"]
    )


def test_activations_cost_by_the_layer():
    base, each = map(int, re.findall(r"\d+", rows()["ActivationStats"]))
    for layers in (1, 2):
        chosen = ["0", "2"][:layers]
        assert (
            cost(lambda chosen=chosen: ActivationStats(select=lambda name, module: name in chosen))
            == base + each * layers
        )


def test_loggers_cost_alike_and_one_more_with_steps():
    for name in ("TensorBoardLogger", "MLflowLogger", "WandbLogger", "JSONLogger"):
        assert rows()[name] == rows()["CSVLogger"]
    for cls in (TensorBoardLogger, MLflowLogger, WandbLogger, JSONLogger):
        for hook in ("after_step", "after_epoch"):
            assert getattr(cls, hook).__code__.co_code == getattr(CSVLogger, hook).__code__.co_code
    assert cost(lambda: CSVLogger(every_n_steps=50)) == int(rows()["CSVLogger"]) + 1


def test_the_table_lists_every_callback_that_ships():
    there = {
        name for name, cls in vars(learnkit.callbacks).items() if isinstance(cls, type) and issubclass(cls, Callback)
    }
    assert set(rows()) == there
    assert [name for name, calls in rows().items() if calls == "0 alone"] == [
        cls.__name__ for cls in (Communicate, Distributed, FullyShard, ReduceAfterwards)
    ]
    assert rows()["OptimizerModes"] == "0" and not any(
        hooks.overridden(OptimizerModes(), f"{word}_{stage}")
        for word in hooks.WORDS
        for stage in ("batch", "forward", "backward", "step")
    )
