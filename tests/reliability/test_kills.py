"""kill -9 at any moment costs no finished checkpoint, leaves none half-written, and no litter after the next start."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from learnkit import Callback, Learner
from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots
from learnkit.checkpoint.files import clean
from tests.reliability.conftest import litter, make_learner, newest, times


class Acknowledges(Callback):
    """Says, when a save has returned and is durable, which step it was of."""

    order = Checkpoint.order - 10

    def __init__(self, folder: Path, *, behind: int) -> None:
        self.folder, self.behind, self.begun = (
            folder,
            behind,
            False,
        )  # an asynchronous one is durable when the next begins

    def before_epoch(self, learn: Learner) -> None:
        """The first one of this process begins."""
        if not self.begun:
            print("litter", *litter(self.folder))
        self.begun = True

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step > self.behind:
            print("saved", learn.step - self.behind)


def saves_for_ever(asynchronous: bool) -> None:
    folder = Path("kept")
    checkpoint = Checkpoint(folder, every_n_steps=1, async_write=asynchronous)
    learn = make_learner(checkpoint, width=3_000)  # 0.3 MB a checkpoint
    with learn.no_logging():
        learn.fit(10**6, 1e-3, resume=True, callbacks=[Acknowledges(folder, behind=int(asynchronous))])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
@pytest.mark.parametrize("part", range(times(1, 5)))
def test_a_killed_process_loses_no_acknowledged_checkpoint(start, asynchronous, part):
    draw, folder = random.Random(part), Path("kept")
    acknowledged, n_amid_a_save, n_saves = 0, 0, 0
    for kill in range(n_kills := times(15, 40)):
        child = start(saves_for_ever, asynchronous)
        child.wait_for(lambda child=child: any(line.startswith("saved") for line in child.said()))
        time.sleep(draw.uniform(0, 0.1))
        child.kill()
        said = child.said()
        assert said[0] == "litter", f"start {kill} left {said[0]}"
        steps = [int(line.split()[1]) for line in said if line.startswith("saved")]
        assert steps[0] <= acknowledged + 2 and steps == list(
            range(steps[0], steps[-1] + 1)
        )  # it went on from the newest
        acknowledged, n_saves = steps[-1], n_saves + len(steps)
        path, parts, _ = newest(folder)
        assert parts["run"]["place"]["step"] >= acknowledged, (
            f"kill {kill}: {path}, but {acknowledged} was acknowledged"
        )
        for path in snapshots.all_in(folder):
            snapshots.read_snapshot(path)
        n_amid_a_save += bool(litter(folder))
    print(f"{n_kills} kills, {n_amid_a_save} amid a save, {n_saves} saves acknowledged, 0 lost")
    assert n_amid_a_save > n_kills / 10  # else the kills came when nothing was at stake


def writes_again_and_again(folder: Path, first: int) -> None:
    state = {"model": {"w": torch.ones(50_000)}, "run": {}}
    old: list[Path] = []
    for step in range(first, 10**6):
        old.append(
            snapshots.write_snapshot(folder, snapshots.next_name(folder, step), state, {"run": str(os.getpid())})
        )
        if len(old) > 1:
            snapshots.remove_snapshot(old.pop(0))
        print("saved", step)


def test_two_processes_that_write_into_one_folder_do_not_harm_each_other(start):
    """As where a job was restarted before the old one was gone: each one's newest is whole, whichever is killed."""
    folder, draw = Path("kept"), random.Random(1)
    for _ in range(times(2, 20)):
        children = [start(writes_again_and_again, folder, 0) for _ in range(2)]
        for child in children:
            child.wait_for(lambda child=child: len(child.said()) > 2)
        time.sleep(draw.uniform(0, 0.1))
        for child in children:
            child.kill()
        for path in snapshots.all_in(folder):
            snapshots.read_snapshot(path)
        runs = {snapshots.read_manifest(path)["about"]["run"] for path in snapshots.all_in(folder)}
        assert {str(child.pid) for child in children} <= runs
        clean(folder)
        assert litter(folder) == []


def test_what_a_living_process_is_writing_is_left_alone(start):
    folder = Path("kept")
    child = start(writes_again_and_again, folder, 0)
    child.wait_for(lambda: len(child.said()) > 2)
    for _ in range(200):
        clean(folder)
    n = len(child.said())
    child.wait_for(lambda: len(child.said()) > n + 5)
    child.kill()
    assert all(line.startswith("saved") for line in child.said())
    assert child.code == -signal.SIGKILL
