# pyright: reportPrivateImportUsage=false
"""Nodes that come and go: ranks of one round find each other, and a fit goes on with what is left of its epoch, on however many there are."""
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from learnkit.distributed import all_sum, get_rank, guard, init_process_group
from tests.distributed.processes import free_port
from tests.reliability.conftest import Child


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Callable[..., Child]]:
    """start(fn, *args, **environment): a forked process; none outlives the test."""
    monkeypatch.chdir(tmp_path)
    children: list[Child] = []

    def begin(fn: Callable[..., Any], *args: Any, **environment: Any) -> Child:
        children.append(Child(fn, *args, **environment))
        return children[-1]

    yield begin
    for child in children: child.kill()


# ---------------------------------------------------------------------- ranks of one round find each other
def meet(timeout: float) -> None:
    init_process_group(timeout=timeout)
    with guard(): print(all_sum(10 ** get_rank()), flush=True)


def start_round(start: Callable[..., Child], store: dist.TCPStore, n_restarts: list[int], timeout: float = 20, ranks: Any = None) -> list[Child]:
    """The workers of one round, as torchrun's agents start them over the agent's store: each agent counts its own restarts."""
    shared = {"WORLD_SIZE": len(n_restarts), "LOCAL_WORLD_SIZE": len(n_restarts), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
              "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    return [start(meet, timeout, RANK=rank, LOCAL_RANK=rank, TORCHELASTIC_RESTART_COUNT=n_restarts[rank], **shared)
            for rank in ranks or range(len(n_restarts))]


@pytest.fixture
def store() -> dist.TCPStore: return dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False, multi_tenant=True)


def test_ranks_of_each_round_meet_over_one_store_however_often_each_agent_has_restarted(start, store):
    """After a failure a node that has joined meanwhile has counted none; after a change of membership nobody has counted it."""
    for n_restarts in ([0, 0], [1, 0], [1, 0], [1, 0, 2], [0, 1]):
        round = start_round(start, store, n_restarts)
        assert [child.end(20) for child in round] == [0] * len(n_restarts), [child.said() for child in round]
        assert [child.said()[-1] for child in round] == ["1" * len(n_restarts)] * len(n_restarts)


def test_ranks_of_a_round_that_was_broken_off_while_they_met_are_not_waited_for(start, store):
    for ranks in ([0], [1], [0]):
        broken_off = start_round(start, store, [0, 0], ranks=ranks)
        broken_off[0].wait_for(lambda: store.num_keys() > 1)
        for child in broken_off: child.kill()
    round = start_round(start, store, [0, 0])
    assert [child.end(20) for child in round] == [0, 0], [child.said() for child in round]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_never_come_says_so(rank, start, store):
    [child] = start_round(start, store, [0, 0], timeout=1, ranks=[rank])
    assert child.end(20) == 1
    assert f"rank {rank} of 2 could not join the group at 127.0.0.1:{store.port} within 1 s: see that all 2 ranks were started" in child.said()[-1]
