"""What the Learner adds to an algorithm grows with the world by the laws of benchmarks/growth.py."""

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from learnkit.distributed import barrier, get_rank, guard, watcher


@pytest.fixture
def growth(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return import_module("growth")


def test_counts_on_3_ranks_are_those_of_the_laws(growth, monkeypatch):
    monkeypatch.setattr(growth, "WATCHED", 1.8)
    found = growth.measured(3)
    rates = {name: found.pop(name) for name in ("guard of rank 0", "guard of another", "signs")}
    rates["join"] = found.pop("join")
    assert found.keys() | rates.keys() == growth.LAWS.keys()
    assert growth.differences(3, {**found, **{name: growth.LAWS[name].value(3) for name in rates}}) == {}
    # Where others keep the cores guards look less often, and ranks that wait for each other ask more often.
    for name, rate in rates.items():
        assert 0 < rate < (1.5 if name != "join" else 6) * growth.LAWS[name].value(3), name


def test_a_store_of_1024_ranks_is_asked_no_more_often_by_their_guards_than_one_of_256(growth):
    assert [watcher.pause_between_looks(w) for w in (2, 256, 512, 1024, 4096)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.8, 0.8]
    )
    assert (
        watcher.pause_between_looks(4096) < watcher.MISSED * watcher.LIFE / 2
    )  # two signs of life before one is taken for gone
    assert [1 / watcher.pause_between_looks(w) for w in (2, 512, 4096)] == pytest.approx(
        [growth.looks(w) for w in (2, 512, 4096)]
    )


def test_a_guard_reads_the_signs_of_life_of_rank_0_and_its_own_machine_alone_and_rank_0_all(ranks, monkeypatch):
    monkeypatch.setattr(watcher, "machine_id", lambda: f"machine {get_rank() // 2}")

    def fn():
        with guard() as watch:
            while not watch.watcher.met:
                time.sleep(0.01)
            barrier()
            return sorted(watch.watcher.peers)

    assert ranks(4, fn) == [[1, 2, 3], [0], [0, 3], [0, 2]]
