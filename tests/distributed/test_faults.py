"""A Learner's training of which one rank fails, dies or hangs: all end within seconds, the culprit and its place are
named.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo  # by optimizers and DDP: here once, else by every rank, for seconds
from torch import nn

from learnkit import Callback, DataBunch, Learner
from learnkit.distributed import RankFailed, get_rank, launch
from learnkit.distributed.process import is_alive
from tests.distributed.processes import SCRIPT, TORCHRUN, Processes, changed

HANG_TIMEOUT = 4.0
PLACE = "epoch 1, training batch 7"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


# --- ranks of `launch --------------------------------------------------------
def fail() -> None:
    raise ValueError("sample 7 has no label")


class Fault(Callback):
    """On one rank something happens, in one hook, at one place; its clean-up takes `clean_up` seconds."""

    def __init__(
        self, happens, rank: int = 1, hook: str = "before_batch", place: str = PLACE, clean_up: float = 0
    ) -> None:
        self.happens, self.rank, self.hook, self.place, self.clean_up = happens, rank, hook, place, clean_up

    def at(self, learn: Learner, hook: str) -> None:
        if hook != self.hook or not learn.where().startswith(self.place):
            return
        if self.happens is not fail:
            time.sleep(1.2)  # so that the last sign of life, one in 0.5 s, is of this place
        if learn.rank == self.rank:
            self.happens()

    def around_fit(self, learn: Learner, run) -> None:
        try:
            run()
        finally:
            if learn.rank == self.rank:
                time.sleep(self.clean_up)

    def before_fit(self, learn):
        self.at(learn, "before_fit")

    def before_batch(self, learn):
        self.at(learn, "before_batch")

    def before_step(self, learn):
        self.at(learn, "before_step")


def train(fault: Fault, timeout: float, hang_timeout: float) -> None:
    Path(str(get_rank())).write_text(str(os.getpid()))
    x = torch.randn(80, 4)
    data = DataBunch.from_tensors((x, x), (x[:20], x[:20]), bs=4)
    learn = Learner(data, nn.Linear(4, 4), callbacks=fault).to_distributed(timeout=timeout, hang_timeout=hang_timeout)
    with learn.no_logging():
        learn.fit(2)


def ended(fault: Fault, capfd, *, timeout: float = 60, hang_timeout: float = HANG_TIMEOUT) -> tuple[str, str]:
    """(the error that launch raises, what stood on standard error) of a training that must end soon, on all ranks."""
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(train, 2, fault, timeout, hang_timeout, timeout=20)
    assert time.monotonic() - start < 10
    assert not any(is_alive(int(Path(str(rank)).read_text())) for rank in range(2))
    return str(caught.value), capfd.readouterr().err


GONE = r"is gone: its process \d+ was killed, or left by os._exit "


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "happens, error, told",
    [
        (fail, "ValueError: sample 7 has no label", "failed: ValueError: sample 7 has no label .*"),
        (lambda: sys.exit(0), "SystemExit: 0", "failed: SystemExit: 0 .*"),
        (lambda: os._exit(0), "it ended with exit code 0", GONE),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "it ended with signal SIGKILL", GONE),
    ],
    ids=["raises", "sys.exit(0)", "os._exit(0)", "kill -9"],
)
def test_the_rank_that_ends_is_named_with_its_place(rank, happens, error, told, capfd):
    raised, output = ended(Fault(happens, rank), capfd)
    assert raised.startswith(f"rank {rank} of 2 failed: {error}")
    assert re.search(rf"rank {1 - rank} of 2 ends: rank {rank} {told}\({PLACE}", output)


def test_a_frozen_rank_is_named_with_its_place(capfd):
    raised, output = ended(Fault(lambda: os.kill(os.getpid(), signal.SIGSTOP)), capfd)
    assert raised.startswith("rank 1 of 2 failed: it ended with signal SIGKILL")
    assert re.search(rf"rank 0 of 2 ends: rank 1 is frozen \({PLACE}, rank 1 of 2\): no sign of life for [34]", output)


def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it_in_backward(capfd):
    raised, output = ended(Fault(lambda: time.sleep(60)), capfd)
    told = (
        f"no rank has got on for {HANG_TIMEOUT:g} s; all others wait for rank 1\n"
        rf"  rank 0 \({PLACE}, rank 0 of 2\): _backward, .*\n  rank 1 \({PLACE}, rank 1 of 2\): <lambda>, "
        rf".*test_faults.py:\d+\n"
    )
    assert re.match(f"rank 1 of 2 failed: {told.rstrip()}", raised + "\n")
    assert re.search(f"rank 0 of 2 ends: {told}", output)


@pytest.mark.parametrize(
    "hook, place", [("before_fit", "epoch 0"), ("before_step", PLACE), ("before_batch", "epoch 1, validation batch 1")]
)
def test_an_errors_traceback_comes_last_and_ends_with_its_place(hook, place, capfd):
    raised, output = ended(Fault(fail, hook=hook, place=place), capfd)
    note = f"learnkit: raised in Fault.{hook}, {place}, rank 1 of 2"
    assert f"rank 0 of 2 ends: rank 1 failed: ValueError: sample 7 has no label {note}" in output
    assert re.search(rf"in fail\n.*\n( +\^+\n)?ValueError: sample 7 has no label\n{note}\n*$", raised)


def test_a_clean_up_that_does_not_end_is_ended(capfd):
    raised, output = ended(Fault(fail, clean_up=60), capfd)
    assert raised.startswith("rank 1 of 2 failed: ValueError: sample 7 has no label")
    assert "in around_fit" in output.partition(f"rank 1 ({PLACE}, rank 1 of 2) is here:")[2]
    last = output.partition("[learnkit] rank 1 failed, and its clean-up did not end\n")[2].rstrip()
    assert last.endswith(
        f"ValueError: sample 7 has no label\nlearnkit: raised in Fault.before_batch, {PLACE}, rank 1 of 2"
    )


def test_a_collective_waits_no_longer_than_the_timeout(capfd):
    raised, output = ended(Fault(lambda: time.sleep(30)), capfd, timeout=1, hang_timeout=30)
    assert raised.startswith("rank 0 of 2 failed: RuntimeError: ") and "Timed out waiting 1000ms" in raised
    assert re.search(r"rank 1 of 2 ends: rank 0 failed: RuntimeError: .* Timed out waiting 1000ms", output)


# --- ranks of torc -----------------------------------------------------------
FAULT = f"""
import os, signal, time
from pathlib import Path

class Fault(Callback):
    def before_batch(self, learn):
        if not learn.where().startswith("{PLACE}"): return
        time.sleep(1.2)
        Path(f"rank{{learn.rank}}").write_text(str(os.getpid()))
        if learn.rank == 1: exec(sys.argv[1])

"""
FAULTY = changed(
    SCRIPT,
    ("local_rank = ", FAULT + "local_rank = "),
    ("metrics=accuracy", "metrics=accuracy, callbacks=Fault()"),
    ("to_distributed(local_rank)", f"to_distributed(local_rank, hang_timeout={HANG_TIMEOUT})"),
)
ERROR = "raise ValueError('sample 7 has no label')"
TRACEBACK = rf"ValueError: sample 7 has no label\s+learnkit: raised in Fault.before_batch, {PLACE}, rank 1 of 2\s+"


@pytest.mark.parametrize(
    "happens, seconds, told, root, summary",
    [
        (ERROR, 10, "failed: ValueError: sample 7 has no label .*", 1, TRACEBACK),
        # torchrun takes an exit with code 0 for a success, so it is the other rank's failure that it shows
        ("os._exit(0)", 10, GONE, 0, "rank 1 is gone: .*"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            10,
            None,
            1,
            "Signal 9 .SIGKILL. received by PID .*",
        ),  # torchrun sees it first
        (
            "os.kill(os.getpid(), signal.SIGSTOP)",
            HANG_TIMEOUT + 5,
            "is frozen ",
            1,
            "Signal 9 .SIGKILL. received by PID .*",
        ),
    ],
    ids=["raises", "os._exit(0)", "kill -9", "SIGSTOP"],
)
def test_under_torchrun_all_end_and_the_summary_names_the_culprit(happens, seconds, told, root, summary, processes):
    Path("faulty.py").write_text(FAULTY)
    ended = processes.run(*TORCHRUN, "--standalone", "--nproc-per-node=2", "faulty.py", happens, "4")
    assert ended.at - Path("rank1").stat().st_mtime < seconds
    assert processes.left_after(0) == []
    assert ended.code == 1 and len(ended.out.splitlines()) == 1  # epoch 0's line
    if told:
        assert re.search(rf"rank 0 of 2 ends: rank 1 {told}\({PLACE}", ended.err)
    cause = ended.err.rpartition("Root Cause (first observed failure):")[2]
    assert re.search(rf"rank +: {root} .local_rank: {root}.[^$]*traceback : ([^$]*\n +)?{summary}\n=+\s*$", cause)


LOADERS = (
    """DataBunch.from_tensors((x, (x[:, 0] > 0).long()), (x[:15], (x[:15, 1] > 0).long()), bs=int(sys.argv[-1]))""",
    """DataBunch.create(torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long()), bs=4, num_workers=2)""",
)


def test_a_killed_torchrun_leaves_no_rank_and_no_loader_worker(processes):
    Path("faulty.py").write_text(changed(FAULTY, LOADERS))
    torchrun = processes.start(*TORCHRUN, "--standalone", "--nproc-per-node=2", "faulty.py", "time.sleep(60)", "4")
    deadline = time.monotonic() + 60
    while not Path("rank1").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    assert len(processes.alive()) >= 1 + 2 + 4  # torchrun, its ranks and their workers
    torchrun.process.kill()
    start = time.monotonic()
    torchrun.process.wait()
    ranks = [int(Path(f"rank{rank}").read_text()) for rank in range(2)]
    while any(map(is_alive, ranks)) and time.monotonic() - start < 2:
        time.sleep(0.05)
    assert not any(map(is_alive, ranks))
    assert processes.left_after(6 - (time.monotonic() - start)) == []
