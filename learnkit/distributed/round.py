# pyright: reportPrivateImportUsage=false
"""One round of ranks, from a start to the next restart: a name that its ranks agree on, and no others have.

Over torchelastic's own store many rounds meet, one after the other, and what dead ranks have written stays in it.
Nothing that torchelastic says tells rounds apart: each agent counts its own restarts, a node that joins later begins at
0, and a change of membership is counted by none.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist


def name_of_round(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all ranks return, once all have come. Raises TimeoutError, which says who has not.

    Rank 0 thinks of it and waits for the others' answers, random too, which it publishes: who finds its own among them
    was meant.
    """
    own = secrets.token_hex(8)
    if rank != 0:
        return heard_name(store, rank, own, timeout)
    answers = [f"{own}/{other}" for other in range(1, world_size)]
    store.set("name", own)
    if not wait_until(lambda: store.check(answers), timeout):
        absent = [other for other, answer in enumerate(answers, 1) if not store.check([answer])]
        raise TimeoutError(f"Not there: ranks {', '.join(map(str, absent))}")
    store.set(f"{own}/meant", b" ".join(store.multi_get(answers)).decode())
    return own


def heard_name(store: dist.Store, rank: int, own: str, timeout: timedelta) -> str:
    """The name of the round that rank 0 begins now. One that an earlier rank 0 has left lies there until then."""
    answered = ""

    def is_meant() -> bool:
        nonlocal answered
        if not store.check(["name"]):
            return False
        if (name := store.get("name").decode()) != answered:
            store.set(f"{name}/{rank}", own)
        answered = name
        return store.check([f"{name}/meant"]) and own in store.get(f"{name}/meant").decode().split()

    if not wait_until(is_meant, timeout):
        raise TimeoutError("Not there: rank 0, or one that it waits for")
    return answered


def wait_until(condition: Callable[[], bool], timeout: timedelta) -> bool:
    """Asked seldom after a while: a thousand ranks may ask one store."""
    deadline, pause = time.monotonic() + timeout.total_seconds(), 1e-3
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
    return True
