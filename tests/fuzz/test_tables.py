"""The tables have all that the library has; draws are what they say they are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import pytest
import torch
from torch.utils import data

import learnkit
import learnkit.callbacks
import learnkit.metrics
from learnkit import Callback, Learner
from learnkit.distributed import algorithms
from tests.fuzz import callbacks, fits, optimizers, sources
from tests.fuzz.between import BETWEEN
from tests.fuzz.callbacks import CALLBACKS
from tests.fuzz.checks import CHECKS
from tests.fuzz.command import until
from tests.fuzz.configuration import SIMPLEST, Configuration, Interruption
from tests.fuzz.draw import draw
from tests.fuzz.fits import FITS, METRICS
from tests.fuzz.interruptions import HOOKS, INTERRUPTIONS
from tests.fuzz.learner_source import compiled
from tests.fuzz.models import MODELS
from tests.fuzz.optimizers import OPTIMIZERS
from tests.fuzz.part import Part
from tests.fuzz.script import script
from tests.fuzz.shrink import simpler
from tests.fuzz.sources import SOURCES, VALID
from tests.fuzz.spreads import PRECISIONS, SPREADS

MANY = [draw(number) for number in range(3000)]


def codes(table: Mapping[str, Part]) -> str:
    return " ".join(part.code for part in table.values())


def exported(module: object, kind: type) -> set[str]:
    return {name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, kind)}


def test_every_callback_is_drawn_or_says_why_not():
    there = exported(learnkit.callbacks, Callback)
    assert there - CALLBACKS.keys() - callbacks.NOT_DRAWN.keys() == set(), (
        "a line in tests/fuzz/callbacks.py is missing"
    )
    assert callbacks.NOT_DRAWN.keys() - there == set()
    for name, forms in CALLBACKS.items():
        assert all(form.code.startswith(f"{name}(") for form in forms)


def test_every_algorithm_and_option_of_a_spread_is_drawn():
    for name in algorithms.NAMES:
        assert f"algorithm='{name}'" in codes(SPREADS), (
            f"algorithm={name!r}: a line in tests/fuzz/spreads.py is missing"
        )
    beside = {"self", "local_rank", "timeout", "hang_timeout", "ddp_options", "algorithm"}
    for method in (Learner.to_distributed, Learner.to_fsdp):
        for option in inspect.signature(method).parameters.keys() - beside:
            assert f"{option}=" in codes(SPREADS), (
                f"{method.__name__}({option}=…): a line in tests/fuzz/spreads.py is missing"
            )


def test_every_optimizer_of_torch_is_drawn_or_says_why_not():
    there = exported(torch.optim, torch.optim.Optimizer)
    drawn = {
        name
        for name in there
        if f"torch.optim.{name}" in codes(OPTIMIZERS).replace(",", " ").replace("(", " ").replace(")", " ").split()
    }
    assert there - drawn - optimizers.NOT_DRAWN.keys() == set(), "a line in tests/fuzz/optimizers.py is missing"


def test_every_kind_of_data_is_drawn_or_says_why_not():
    kinds = exported(data, data.Sampler) | {
        "DataBunch.create",
        "DataBunch.from_tensors",
        "TensorLoader",
        "DataLoader",
        "ShardedStream",
        "IterableDataset",
    }
    text = codes(SOURCES) + inspect.getsource(sources)
    assert {kind for kind in kinds if kind not in text and kind not in sources.NOT_DRAWN} == set(), (
        "a line in tests/fuzz/sources.py is missing"
    )


def test_every_metric_and_every_fit_method_is_drawn_or_says_why_not():
    there = {name for name in learnkit.__all__ if getattr(learnkit, name).__module__ == "learnkit.metrics"}
    assert "accuracy" in there
    assert {name for name in there if name not in codes(METRICS) and name not in fits.NOT_DRAWN} == set()
    methods = {name for name in vars(Learner) if name.startswith("fit") or name == "fine_tune"}
    assert {name for name in methods if f"learn.{name}(" not in codes(FITS)} == set(), (
        "a line in tests/fuzz/fits.py is missing"
    )


def test_every_public_method_of_a_learner_is_drawn_or_says_why_not():
    from tests.fuzz import between

    methods = {name for name, value in vars(Learner).items() if not name.startswith("_") and callable(value)}
    text = codes(BETWEEN) + codes(FITS) + codes(SPREADS) + codes(PRECISIONS)
    assert {name for name in methods if f".{name}(" not in text and name not in between.NOT_DRAWN} == set()


def test_every_stage_has_hooks_that_are_struck():
    from learnkit.hooks import STAGES

    assert {f"{when}_{stage}" for when in ("before", "after") for stage in STAGES} == set(HOOKS)


@pytest.mark.parametrize(
    "table, drawn",
    [
        (SOURCES, {c.source for c in MANY}),
        (VALID, {c.valid for c in MANY}),
        (MODELS, {c.model for c in MANY}),
        (SPREADS, {c.spread for c in MANY}),
        (PRECISIONS, {c.precision for c in MANY}),
        (OPTIMIZERS, {c.optimizer for c in MANY}),
        (METRICS, {c.metrics for c in MANY}),
        (FITS, {name for c in MANY for name in c.fits}),
        (BETWEEN, {name for c in MANY for name, _, _ in c.between}),
        (CHECKS, {c.check for c in MANY}),
        (INTERRUPTIONS, {i.kind for c in MANY for i in c.interruptions}),
        (
            {form.code: form for forms in CALLBACKS.values() for form in forms},
            {code for c in MANY for code in (*c.callbacks, *c.own_callbacks)},
        ),
    ],
    ids=[
        "sources",
        "validation",
        "models",
        "spreads",
        "precisions",
        "optimizers",
        "metrics",
        "fits",
        "between",
        "checks",
        "interruptions",
        "callbacks",
    ],
)
def test_whatever_is_in_a_table_is_drawn(table, drawn):
    assert table.keys() - drawn == set()


def test_a_draw_is_a_function_of_its_number_and_can_be_read_back():
    for number, c in until(0, 300, None):
        assert draw(number) == c == eval(repr(c), {"Configuration": Configuration, "Interruption": Interruption})
    assert len(set(MANY)) > 2900


def test_each_draw_is_a_script_that_python_reads():
    for c in MANY[:100]:
        compile(script(c), "script", "exec")
        assert callable(compiled(c).make)


def test_shrinking_ends_at_the_simplest():
    c = MANY[0].changed(check="resumed")
    while smaller := next((s for s in simpler(c)), None):
        c = smaller
    assert c.changed(interruptions=()) == SIMPLEST
