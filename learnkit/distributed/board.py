# pyright: reportPrivateImportUsage=false
"""What the guards of all ranks write for each other into the store that the ranks share, and read from it."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from learnkit.distributed.reduce import wait_for_key

_clones: tuple[weakref.ref[Any], dist.Store, dist.Store] | None = None  # of the group's store: one for each thread


@dataclass(frozen=True)
class Life:
    """A rank's sign of life. `tick` changes while its guard's thread runs, `progress` while its main thread gets on."""

    tick: int
    progress: int
    stage: str
    at: str
    in_collective: bool
    pid: int
    machine: str

    def in_stage(self) -> str:
        return f" ({self.stage})" if self.stage else ""


@dataclass(frozen=True)
class Culprit:
    """The rank because of which all end. `pid` and `machine` are None for a rank that never came."""

    rank: int
    reason: str
    frozen: bool = False
    show_stacks: bool = False
    pid: int | None = None
    machine: str | None = None


class Board:
    """One thread's view of the keys of one guard. Each method costs one request to the store, unless it says more."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    # --- signs of life -------------------------------------------------------
    def show_life(self, life: Life) -> None:
        self.store.set(f"life/{self.rank}", json.dumps(asdict(life)))

    def lives_of(self, ranks: Iterable[int]) -> dict[int, Life]:
        """The last signs of life of ranks that have come."""
        keys = keys_of_lives(asked := sorted(ranks))
        texts = self.store.multi_get(keys) if keys else []
        return {rank: Life(**json.loads(text)) for rank, text in zip(asked, texts, strict=True)}

    def have_come(self, ranks: Iterable[int]) -> bool:
        return self.store.check(keys_of_lives(ranks))

    def missing_ranks(self) -> list[int]:
        """The ranks that have not come, by one request for each rank."""
        return [rank for rank in range(self.world_size) if not self.have_come([rank])]

    def join_machine(self, machine: str) -> None:
        self.store.append(f"machine/{machine}", f"{self.rank} ")  # pyright: ignore[reportAttributeAccessIssue]

    def ranks_of_machine(self, machine: str) -> list[int]:
        return [int(rank) for rank in self.store.get(f"machine/{machine}").split()]

    def set_all_met(self) -> None:
        self.store.set("met", "")

    def all_met(self) -> bool:
        """Whether rank 0 has seen all ranks."""
        return self.store.check(["met"])

    # --- the end -------------------------------------------------------------
    def accuse(self, culprit: Culprit) -> None:
        """Name the culprit; the first one named counts."""
        self.store.compare_set("culprit", "", json.dumps(asdict(culprit)))

    def has_culprit(self) -> bool:
        return self.store.check(["culprit"])

    def culprit(self) -> Culprit:
        return Culprit(**json.loads(self.store.get("culprit")))

    def note_lost_connection(self) -> None:
        self.store.set("lost", "")

    def connection_is_lost(self) -> bool:
        """Whether any rank has lost its connection to another one."""
        return self.store.check(["lost"])

    def count_failure(self) -> None:
        self.store.add("n_failed", 1)

    def all_failed(self) -> bool:
        with suppress(dist.DistError, RuntimeError):
            return self.store.add("n_failed", 0) == self.world_size
        return False

    def note_seen(self) -> None:
        """Confirm that this rank knows the culprit."""
        self.store.add("n_seen", 1)

    def others_have_seen(self) -> bool:
        return self.store.add("n_seen", 0) == self.world_size - 1

    def count_done(self) -> None:
        """Note that this rank has left the guarded block; one more request by the last one."""
        if self.store.add("n_done", 1) == self.world_size:
            self.store.set("all_done", "")

    def all_done(self) -> bool:
        return self.store.check(["all_done"])

    def wait_until_all_done(self) -> None:
        """Wait until all ranks have left the guarded block; several requests."""
        pause = 1e-3
        while not self.store.check(["all_done"]):
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)

    # --- places --------------------------------------------------------------
    def first_at(self, number: int, place: str) -> tuple[str, str]:
        """(rank, place) of the rank that was the first to come to its place of this number; this rank's, if none."""
        found = self.store.compare_set(f"place/{number}", "", f"{self.rank} {place}").decode()
        rank, _, first = found.partition(" ")
        return rank, first

    def count_at(self, number: int) -> None:
        """Note that this rank is at this place; one more request by the last one."""
        if self.store.add(f"place/{number}/n", 1) == self.world_size:
            self.store.set(f"place/{number}/all", "")

    def wait_for_all_at(self, number: int) -> None:
        """Wait until all ranks are at this place; several requests."""
        wait_for_key(self.store, f"place/{number}/all")


def keys_of_lives(ranks: Iterable[int]) -> list[str]:
    return [f"life/{rank}" for rank in ranks]


def cloned_stores() -> tuple[dist.Store, dist.Store]:
    """Two connections to the group's store, one for each of two threads, opened once for each group."""
    global _clones
    group: Any = dist.group.WORLD
    if _clones is None or _clones[0]() is not group:
        store = dist.distributed_c10d._get_default_store()
        _clones = weakref.ref(group), store.clone(), store.clone()
    return _clones[1:]
