# pyright: reportPrivateImportUsage=false
"""One round of ranks, from a start to the next restart: a name that its ranks agree on, and no other ranks have.

Many rounds use torchelastic's store, one after the other, and what dead ranks have written stays in it. Nothing in
torchelastic distinguishes rounds: each agent counts its own restarts, a node that joins later begins at 0, and none
counts a change of membership.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist


def name_of_round(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return the same name on all ranks, once all have come. Raises TimeoutError, which names the missing ranks.

    Rank 0 chooses a random name, and waits for the others' answers, which are random too. It publishes the answers: a
    rank that finds its own among them belongs to this round.
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
    """The name of the round that rank 0 begins now. Until then the store may have the name of an earlier round."""
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
    """Whether the condition became true in time. Checked less and less often: a thousand ranks may use one store."""
    deadline, pause = time.monotonic() + timeout.total_seconds(), 1e-3
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
    return True
