# pyright: reportPrivateImportUsage=false
"""One rank stops in the middle of an epoch: all stop after the same step, without a collective per step."""

from __future__ import annotations

import itertools
import threading
import time

import torch.distributed as dist

_numbers = itertools.count()  # of all StopTogether objects, the same on every rank
LOOK = 0.005  # seconds between two looks into the store, while this rank waits for the others' answers
STOP_PATIENCE = 4.0  # seconds that a rank waits for the others to stop where it did


class StoppedAlone(Exception):
    """Raised when a rank has left a step in which others wait for it."""


class StopTogether:
    """Agree on the step after which all ranks stop, through the store that they share.

    The rank that wants to stop writes this under one key, and waits where it is. Each other rank promises not to pass
    its next step; its guard's thread promises for it, because its main thread may wait in a collective for the rank
    that has stopped. All stop after the latest step that was promised. Ranks that want to stop at the same step have
    promised that step themselves, so they stop exactly there; else it is a step later, within two of the guard's looks.

    Steps are counted by `passed`, which costs a lock and a comparison.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.number = next(_numbers)  # several fits may run in one guard, which has one store
        self.lock = threading.Lock()
        self.n_done = 0  # steps, the same on all ranks when they stop
        self.round = 0  # stops agreed so far, the same on all ranks
        self.promised: int | None = None  # this rank passes no further before all have promised

    @property
    def under_way(self) -> bool:
        """Whether this rank knows that somebody wants to stop."""
        return self.promised is not None

    def passed(self, wish: str | None, *, complete: bool = True) -> str | None:
        """Call it after each step, with what this rank wants, if anything; returns what all ranks now do, or None, to
        continue.

        `complete` is False on a rank that has left its step before the others received what they wait for: then all
        must want to stop there. Raises StoppedAlone if they do not within STOP_PATIENCE seconds.
        """
        with self.lock:
            self.n_done += 1
            if wish is None and self.promised is None:
                return None
            if wish is not None:
                self.store.compare_set(self.key("wish"), "", wish)
                self.store.set(self.key(f"wished/{self.rank}"), "")
            self.promise(self.store, self.n_done)
        if not complete:
            self.wait_for_all_wishes()
        if self.n_done < self.common_step():
            return None
        agreed = self.store.get(self.key("wish")).decode()
        self.end()
        return agreed

    def look(self, store: dist.Store) -> None:
        """Answer for the main thread; the guard's thread calls it again and again, with its own connection."""
        wish = self.key("wish")
        if self.promised is not None or not store.check([wish]):
            return
        with self.lock:
            if wish == self.key("wish"):
                self.promise(store, self.n_done + 1)  # else that stop has already happened

    def promise(self, store: dist.Store, step: int) -> None:
        if self.promised is not None:
            return
        self.promised = step
        store.set(self.key(f"promise/{self.rank}"), str(step))

    def wait_for_all_wishes(self) -> None:
        keys, deadline = (
            [self.key(f"wished/{rank}") for rank in range(self.world_size)],
            time.monotonic() + STOP_PATIENCE,
        )
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                raise StoppedAlone
            time.sleep(LOOK)

    def common_step(self) -> int:
        keys = [self.key(f"promise/{rank}") for rank in range(self.world_size)]
        while not self.store.check(keys):
            time.sleep(LOOK)
        return max(int(value) for value in self.store.multi_get(keys))

    def end(self) -> None:
        """Call it when the stop has happened, or is no longer wanted; on all ranks at the same step."""
        with self.lock:
            self.round, self.promised = self.round + 1, None

    def key(self, name: str) -> str:
        return f"stop/{self.number}/{self.round}/{name}"
