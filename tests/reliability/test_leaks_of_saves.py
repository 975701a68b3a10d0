"""Saving again and again leaves nothing behind: no open file, no thread, no memory, no folder."""

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from learnkit import Callback, Learner
from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots
from tests.reliability.conftest import litter, make_learner, times

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
N_STEPS = 12  # of an epoch


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watches(Callback):
    """Open files, threads and memory, after each save."""

    order = Checkpoint.order - 10

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            self.seen.append((len(os.listdir("/proc/self/fd")), threading.active_count(), resident_bytes()))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
def test_saving_leaves_nothing_behind(asynchronous):
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    n = times(50, 500)
    watch = Watches()
    learn = make_learner(Checkpoint("kept", every_n_steps=1, async_write=asynchronous), width=8_000)  # 0.7 MB each
    with learn.no_logging():
        learn.fit(-(-n // N_STEPS), 1e-3, callbacks=[watch])
    files, threads, memory = zip(*watch.seen, strict=True)
    assert (
        max(threads) - before[1] <= 7 * asynchronous
    )  # the writer, and for each of three files one that hashes and one that flushes
    assert max(files) - before[0] <= 7 * asynchronous  # each of them open for writing and for reading, and the folder
    assert max(memory[n // 2 :]) - memory[n // 5] < 20e6, [round(m / 1e6) for m in memory]
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert len(snapshots.all_in(Path("kept"))) == 2 and litter(Path("kept")) == []


def test_saves_and_resumes_that_fail_leave_nothing_behind():
    def fails(**options: Any) -> None:
        learn = make_learner(Checkpoint("kept", every_n_steps=3, **options))
        with learn.no_logging(), pytest.raises(OSError, match="could not write"):
            learn.fit(1)

    Path("kept").mkdir()
    (Path("kept") / "000007-step-3").mkdir()
    patch = pytest.MonkeyPatch()
    patch.setattr("learnkit.callbacks.checkpoint.next_name", lambda folder, step: "no/such/folder")
    try:
        for asynchronous in (False, True):
            fails(async_write=asynchronous)
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for i in range(times(20, 200)):
            fails(async_write=i % 2 == 1)
        gc.collect()
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    finally:
        patch.undo()
    assert litter(Path("kept")) == []
