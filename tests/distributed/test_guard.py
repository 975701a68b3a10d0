"""The guard: whatever happens to one rank, all end within ten seconds, the culprit is named, and no process is left."""

import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from learnkit.distributed import RankFailed, all_sum, destroy_process_group, get_rank, guard, init_process_group, launch
from learnkit.distributed.process import is_alive

HANG_TIMEOUT = 1.5


def freeze(g) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill(g) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(g) -> None:
    os._exit(0)


def finish(g) -> None:
    sys.exit(0)


def fail(g) -> None:
    raise ValueError("sample 7 has no label")


def hang(g) -> None:
    time.sleep(60)


def fail_and_hang(g) -> None:
    try:
        fail(g)
    except ValueError as error:
        g.report(error)
        time.sleep(60)


def fail_and_fail(g) -> None:
    try:
        fail(g)
    finally:
        raise OSError("the clean-up failed too")


def train(happens, to: int, pids: Path, store_at: int | None = None) -> None:
    """Steps with a collective each; at one, something happens to one rank. The others wait for it in the collective."""
    if store_at is not None:  # as under SLURM or mpirun: rank 0 serves the store
        os.environ.update(MASTER_PORT=str(store_at), TORCHELASTIC_USE_AGENT_STORE="False")
    (pids / str(get_rank())).write_text(str(os.getpid()))
    init_process_group(timeout=60)
    with guard(hang_timeout=HANG_TIMEOUT, describe=lambda: f"batch {g.beat}") as g:
        for step in range(1000):
            if step == 40 and get_rank() == to:
                happens(g)
            dist.all_reduce(torch.ones(1))
            g.beat += 1
            time.sleep(0.01)


def ended(tmp_path: Path, *args, n: int = 2, capfd) -> tuple[str, str]:
    """(the error that the launcher raises, what stood on standard error) of a training that must end, and all of it."""
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(train, n, *args, timeout=20)
    seconds = time.monotonic() - start
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert len(pids) == n and not any(map(is_alive, pids))
    assert seconds < 10
    return str(caught.value), capfd.readouterr().err


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize(
    "happens, reason, told",
    [
        (fail, "ValueError: sample 7 has no label", "failed: ValueError: sample 7 has no label (batch 40)"),
        (fail_and_fail, "OSError: the clean-up failed too", "failed: OSError: the clean-up failed too (batch 40)"),
        (finish, "SystemExit: 0", "failed: SystemExit: 0 (batch 40)"),
        (kill, "it ended with signal SIGKILL", "is gone: its process"),
        (leave, "it ended with exit code 0", "is gone: its process"),
        (freeze, "it ended with signal SIGKILL", "is frozen (batch "),
    ],
    ids=["raises", "raises in clean-up", "sys.exit", "killed", "os._exit", "frozen"],
)
def test_one_rank_ends_all_and_is_named(tmp_path, capfd, culprit, happens, reason, told):
    error, output = ended(tmp_path, happens, culprit, tmp_path, capfd=capfd)
    assert error.startswith(f"rank {culprit} of 2 failed: {reason}")
    assert f"[learnkit] rank {1 - culprit} of 2 ends: rank {culprit} {told}" in output


def test_of_three_ranks_both_others_end(tmp_path, capfd):
    error, output = ended(tmp_path, fail, 1, tmp_path, n=3, capfd=capfd)
    assert "rank 1 of 3 failed: ValueError" in error
    assert "rank 0 of 3 ends: rank 1 failed" in output and "rank 2 of 3 ends: rank 1 failed" in output


def test_a_clean_up_that_hangs_is_ended_and_the_traceback_comes_last(tmp_path, capfd):
    error, output = ended(tmp_path, fail_and_hang, 1, tmp_path, capfd=capfd)
    assert "rank 1 of 2 failed: ValueError: sample 7 has no label" in error and "in fail\n" in error
    assert "in fail_and_hang" in output
    assert output.rstrip().endswith("ValueError: sample 7 has no label")


def test_an_error_on_its_way_out_is_heard_before_the_clean_up_ends(tmp_path, capfd):
    """As the Learner has it: `failure` tells of the error while its hooks clean up."""

    def fn():
        failures = []
        (tmp_path / str(get_rank())).write_text(str(os.getpid()))
        init_process_group(timeout=60)
        with guard(failure=lambda: failures[0] if failures else None):
            try:
                if get_rank() == 1:
                    raise ValueError("bad loss")
                dist.all_reduce(torch.ones(1))
            except ValueError as error:
                failures.append(error)
                time.sleep(2)
                raise

    with pytest.raises(RankFailed, match="rank 1 of 2 failed: ValueError: bad loss"):
        launch(fn, 2, timeout=20)
    assert "rank 0 of 2 ends: rank 1 failed: ValueError: bad loss" in capfd.readouterr().err


def test_a_hang_ends_with_everybodys_place_and_stack(tmp_path, capfd):
    error, output = ended(tmp_path, hang, 1, tmp_path, capfd=capfd)
    place = r"\n  rank 0 \(batch 40\): train, .*test_guard.py:\d+\n  rank 1 \(batch 40\): hang, .*test_guard.py:\d+"
    told = f"no rank has got on for {HANG_TIMEOUT} s; all others wait for rank 1{place}"
    assert re.search("rank 1 of 2 failed: " + told, error)
    for rank in range(2):
        assert re.search(f"rank {rank} of 2 ends: {told}", output)
    assert "all_reduce" in output.partition("rank 0 (batch 40) is here:")[2]
    assert "in hang" in output.partition("rank 1 (batch 40) is here:")[2]


@pytest.mark.parametrize("happens", [freeze, kill])
def test_rank_0_may_take_the_store_with_it(tmp_path, capfd, happens):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error, output = ended(tmp_path, happens, 0, tmp_path, port, capfd=capfd)
    assert "rank 0 of 2 failed: it ended with signal SIGKILL" in error
    assert re.search(r"rank 1 of 2 ends: (rank 0 is gone|the store that the ranks share .* held by rank 0)", output)


# --- what may go on ----------------------------------------------------------
def test_ranks_that_all_fail_may_catch_it_and_go_on(ranks):
    def fn():
        sums = []
        for _ in range(2):
            try:
                with guard():
                    raise ValueError("the same everywhere")
            except ValueError:
                sums.append(all_sum(1))
        time.sleep(0.5)
        return sums, [thread.name for thread in threading.enumerate() if "guard" in thread.name]

    assert ranks(2, fn) == [([2, 2], [])] * 2


def test_a_rank_that_is_waited_for_is_no_hang(ranks):
    """Rank 0 gets on alone for longer than the timeout, the other one waits for it."""

    def fn():
        with guard(hang_timeout=1.0) as g:
            for _ in range(25 if get_rank() == 0 else 0):
                time.sleep(0.1)
                g.beat += 1
            all_sum(1)
        return g.beat

    assert ranks(2, fn) == [25, 0]


def test_a_changing_description_is_progress_too(ranks):
    def fn():
        steps = []
        with guard(hang_timeout=1.0, describe=lambda: str(len(steps))):
            while len(steps) < 25:
                time.sleep(0.1)
                steps.append(1)
        return len(steps)

    assert ranks(2, fn) == [25, 25]


def test_guards_follow_each_other_and_stand_within_each_other(ranks):
    def fn():
        with guard() as outer, guard() as inner:
            inner.beat += 1
        for _ in range(5):
            with guard() as g:
                g.beat += 1
        return outer is inner, outer.beat, g.beat

    assert ranks(2, fn) == [(True, 1, 1)] * 2


def test_no_thread_and_no_file_is_left(ranks):
    def fn():
        with guard():
            pass
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            with guard():
                pass
        after = threading.active_count(), len(os.listdir("/proc/self/fd"))
        return after[0] <= before[0] and after[1] <= before[1]  # a socket of the first one may have closed late

    assert ranks(2, fn) == [True, True]


def test_a_new_group_is_guarded_as_well():
    def fn():
        for _ in range(2):
            init_process_group(timeout=20)
            with guard() as g:
                g.beat += 1
            destroy_process_group()
        return g.beat

    assert launch(fn, 2, timeout=20) == 1


def test_alone_nothing_is_guarded():
    def fn():
        with guard(hang_timeout=0.1) as g:
            g.beat += 1
            g.report(KeyError("unheard"))
            raise ValueError("as it was")

    with pytest.raises(ValueError, match="as it was"):
        fn()
