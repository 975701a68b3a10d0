"""benchmarks/scaling.md says what benchmarks/scaling.py computes, from formulae whose values are known at some
points.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch) -> tuple[Any, Any]:
    """The scripts scaling and wire, which import each other by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("scaling"), import_module("wire")


def test_the_tables_of_the_page_are_what_the_script_computes(modules):
    page = (FOLDER / "scaling.md").read_text()
    for section in modules[0].sections():
        assert section in page


def test_the_measured_bytes_on_the_page_are_within_5_percent_of_the_formula(modules):
    _, wire = modules
    found = re.findall(
        r"^\| (\w+) \| (\d(?: × \d)?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", (FOLDER / "scaling.md").read_text(), re.M
    )
    rows = [row for row in found if row[0] in wire.WORDS]
    assert {word for word, *_ in rows} == set(wire.WORDS) and len(rows) == 4 * len(wire.WORDS)
    shapes = [(1024, 1024), (1024,), (1024, 1024), (1024,), (10, 1024), (10,)]
    for word, ranks, measured, formula, ratio in rows:
        w, m = (4, 2) if "×" in ranks else (int(ranks), int(ranks))
        expected = sum(
            wire.sent(part, w, m, wire.GLOO_ROUNDS)
            for part in wire.collectives(word, shapes, w, m, wire.Settings(4, 32))
        )
        assert float(formula) == pytest.approx(expected / 1e6, abs=0.006), (word, ranks)
        assert abs(float(measured) / float(formula) - 1) < 0.05 and float(ratio) == pytest.approx(
            float(measured) / float(formula), abs=0.01
        )


def test_the_models_have_as_many_weights_as_theirs(modules):
    torchvision = pytest.importorskip("torchvision")
    scaling = modules[0]
    with torch.device("meta"):
        theirs = torchvision.models.resnet50()
    assert sorted(scaling.resnet50()) == sorted(tuple(p.shape) for p in theirs.parameters())
    assert scaling.GPT.n == 50257 * 2048 + 2048 * 2048 + 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048


def test_bytegrad_sends_what_allreduce_does_on_8_ranks_and_what_fp16_does_on_4(modules):
    _, wire = modules

    def total(word, w):
        return sum(wire.sent(part, w, w) for part in wire.collectives(word, [(1000, 1000)], w, w))

    assert total("bytegrad", 8) == total("allreduce", 8) and total("bytegrad", 4) == total("fp16", 4)
    assert total("bytegrad", 7) < total("allreduce", 7) and total("bytegrad", 9) > total("allreduce", 9)


def test_bytes_have_their_closed_forms(modules):
    _, wire = modules
    n, shapes = 10_000, [(100, 100)]

    def total(word, w, m, **settings):
        return sum(wire.sent(part, w, m) for part in wire.collectives(word, shapes, w, m, wire.Settings(**settings)))

    assert total("allreduce", 2, 2) == 2 * 4 * n
    assert total("powersgd", 3, 3, rank=2) == 2 * 2 * 4 * 2 * (100 + 100)
    assert total("powersgd", 3, 3, rank=50) == total(
        "allreduce", 3, 3
    )  # two matrices of rank 50 are as large: not compressed
    assert total("to_fsdp", 4, 4) == 3 * 3 * 4 * n and total("to_fsdp", 4, 4, in_blocks=False) == 2 * 3 * 4 * n
    assert total("to_fsdp", 200, 200) == 3 * 199 * 4 * 2 * n  # half of the ranks have a row of nothing
    assert total("local_sgd", 8, 4, period=2) == 2 * (2 * 3 * 4 * n) + 2 * 7 * 4 * n / 2
    assert total("hierarchical", 8, 4, period=2) == pytest.approx(
        2 * (2 * 3 * 4 * n) * (1 / 2 - 1 / 8) + 2 * 7 * 4 * n / 8
    )
    between = [wire.crossing(part, 8, 4) for part in wire.collectives("allreduce", shapes, 8, 4)]
    assert sum(between) == 2 * (2 * 7 / 8 * 4 * n)  # two edges of a ring of eight


def test_times_have_their_closed_forms(modules):
    scaling, _ = modules
    link = scaling.Link("a link", 1e-6, 1e9)
    cluster = scaling.Cluster("machines", 4, link, link._replace(alpha=1e-5, beta=1e8))
    base, n = scaling.BASE, 1e9
    assert scaling.travelled("all_gather", n, 4, cluster, 1.0) == pytest.approx(base + 3e-6 + 3 / 4 * n / 1e9)
    assert scaling.travelled("all_reduce", n, 8, cluster, 1.0) == pytest.approx(
        base + 2 * (6e-6 + 1e-5 + 7 / 8 * n / 1e8)
    )
    assert scaling.travelled("all_reduce", n, 1, cluster, 1.0) == 0
    assert scaling.reduced(16, 4096, cluster, 1.0)[1] == "tree"  # few bytes: the fewest messages
    assert scaling.reduced(n, 4, cluster, 1.0) == (pytest.approx(base + 2 * (3e-6 + 3 / 4)), "ring")
    within, between = 2 * (3e-6 + 3 / 4), 2 * (1e-5 + 1 / 2 * 10)
    assert scaling.reduced(n, 8, cluster, 1.0) == (pytest.approx(base + within + between), "rings in rings")


def test_without_a_network_worth_the_name_nothing_scales_and_with_an_endless_one_everything_but_compression(modules):
    scaling, _ = modules
    for beta, worst, best in ((1e20, 0.99, 1.0), (1e3, 0.0, 0.01)):
        link = scaling.Link("a link", 0.0, beta)
        cluster = scaling.Cluster("machines", 8, link, link)
        for row in scaling.ROWS:
            if row.touched:
                continue
            assert worst <= scaling.step(row, scaling.RESNET, 64, cluster, 0.8, 1.0)[1] <= best, row.name
