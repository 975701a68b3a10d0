"""Training processes that are killed at random times and started again end, bit for bit, as those that nobody
touched.
"""

import functools
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learnkit import Callback, Learner
from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots
from learnkit.checkpoint.files import clean
from learnkit.distributed import launch
from tests.reliability.conftest import FULL, Child, litter, make_learner, newest, outcome, times

EPOCHS = 4
full = pytest.mark.skipif(not FULL, reason="only in `make reliability`")


class Notes(Callback):
    """Writes, for each training batch, (epoch, step, rank, samples) to a file of this rank's."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def after_batch(self, learn: Learner) -> None:
        if not learn.training:
            return
        assert isinstance(learn.inputs, tuple)
        ids = [int(i) for i in learn.inputs[0][:, 0].tolist()]
        with self.file.open("a") as out:
            out.write(json.dumps([learn.epoch, learn.step, learn.rank, ids]) + "\n")


class Slowly(Callback):
    """So that there is time to be killed in, outside of saves too."""

    def after_step(self, learn: Learner) -> None:
        time.sleep(0.002)


class KilledAfter(Callback):
    """Rank 0 is, after the batch that did this step, when everything that is told of it was told."""

    order = Checkpoint.order - 10

    def __init__(self, step: int) -> None:
        self.step = step

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step == self.step and learn.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    folder: Path,
    seed: int = 3,
    *,
    n: int = 48,
    norm: Any = nn.BatchNorm1d,
    every_n_steps: int | None = 3,
    callbacks: tuple[Callback, ...] = (),
    **options: Any,
) -> None:
    """What a user's script does: the same at each start."""
    folder.mkdir(exist_ok=True)
    learn = make_learner(Checkpoint(folder / "kept", every_n_steps=every_n_steps, **options), n=n, norm=norm)
    torch.manual_seed(99 if snapshots.all_in(folder / "kept") else seed)  # a resume must bring its own
    if "RANK" in os.environ:
        learn.to_distributed(timeout=20)
    pid = folder / f"pid-{learn.rank}"
    pid.write_text(str(os.getpid()))
    notes = Notes(folder / f"notes-{learn.rank}.jsonl")
    with learn.no_logging():
        learn.fit_one_cycle(EPOCHS, 1e-2, resume=True, callbacks=[notes, Slowly(), *callbacks])
    if learn.rank == 0:
        (folder / "outcome.json").write_text(json.dumps(outcome(learn)))


def train_on_two(folder: Path, *args: Any, **options: Any) -> None:
    launch(functools.partial(train, folder, *args, **options), 2)


def notes_of(folder: Path) -> list[tuple[int, int, int, list[int]]]:
    return [
        tuple(json.loads(line)) for file in sorted(folder.glob("notes-*")) for line in file.read_text().splitlines()
    ]


def outcome_of(folder: Path) -> Any:
    return json.loads((folder / "outcome.json").read_text())


def newest_place(folder: Path) -> dict[str, Any]:
    return newest(folder / "kept")[1]["run"]["place"]


@pytest.mark.parametrize(
    "script, ranks, asynchronous",
    [
        (train, 1, True),
        (train_on_two, 2, False),
        pytest.param(train, 1, False, marks=full),
        pytest.param(train_on_two, 2, True, marks=full),
    ],
)
@pytest.mark.parametrize("part", range(times(1, 5)))
def test_a_training_that_is_killed_again_and_again_ends_as_one_that_is_not(start, script, ranks, asynchronous, part):
    script = functools.partial(script, every_n_steps=2)
    assert start(script, Path("alone")).end() == 0
    expected, draw = outcome_of(Path("alone")), random.Random(ranks + 10 * part)
    n_kills = n_resumed_amid_an_epoch = 0
    for run in range(times(1, 5)):
        folder = Path(f"killed-{run}")
        for attempt in range(100):
            child, n_done = start(functools.partial(script, async_write=asynchronous), folder), len(notes_of(folder))
            if attempt < times(2, 6):
                more = draw.randrange(4, 14)  # of 48 batches, on one rank or two together
                while child.is_running() and len(notes_of(folder)) < n_done + more:
                    time.sleep(0.002)
                time.sleep(draw.uniform(0, 0.01))
                victim = draw.choice([child.pid, *(int(file.read_text() or 0) for file in folder.glob("pid-*"))])
                n_kills += kill(victim if victim in family(child) else child.pid)
            child.end()
            if (folder / "outcome.json").exists():
                break
            n_resumed_amid_an_epoch += bool(snapshots.all_in(folder / "kept")) and newest_place(folder)["items"] > 0
        assert outcome_of(folder) == expected, f"run {run}"
        assert litter(folder / "kept") == []
    print(f"{n_kills} kills, {n_resumed_amid_an_epoch} resumed amid an epoch")
    assert n_kills >= times(1, 10) and n_resumed_amid_an_epoch >= times(0, 6)


class KilledInValidation(Callback):
    """Rank 0 is, after one of an epoch's batches of the validation set."""

    order = Checkpoint.order - 10

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def after_batch(self, learn: Learner) -> None:
        if not learn.training and (learn.epoch, learn.batch_index, learn.rank) == (self.epoch, self.batch, 0):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("script", [train, pytest.param(train_on_two, marks=full)])
@pytest.mark.parametrize("every_n_steps", [5, pytest.param(1, marks=full), pytest.param(None, marks=full)])
def test_a_training_that_is_killed_within_validation_ends_as_one_that_is_not(start, script, every_n_steps):
    assert start(script, Path("alone")).end() == 0
    for epoch, batch in (
        [(0, 0), (EPOCHS - 1, 3)] if not FULL else [(epoch, batch) for epoch in range(EPOCHS) for batch in (0, 3)]
    ):
        folder = Path(f"killed-{epoch}-{batch}")
        killed = functools.partial(script, every_n_steps=every_n_steps, callbacks=(KilledInValidation(epoch, batch),))
        assert start(killed, folder).end() != 0
        assert not (folder / "outcome.json").exists()
        child = start(functools.partial(script, every_n_steps=every_n_steps), folder)
        assert child.end() == 0, child.said()
        assert outcome_of(folder) == outcome_of(Path("alone"))


def family(child: Child) -> list[int]:
    """It and its children that run."""
    children = Path(f"/proc/{child.pid}/task").glob("*/children")
    try:
        return [child.pid, *(int(pid) for file in children for pid in file.read_text().split())]
    except OSError:
        return [child.pid]


def kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def test_a_control_that_must_differ_does(start):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert start(train, Path(folder), seed).end() == 0
    assert outcome_of(Path("a")) == outcome_of(Path("b")) != outcome_of(Path("c"))


# --- another world size ------------------------------------------------------
@pytest.mark.parametrize("n", [48, 45] if FULL else [45])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)], ids=["2 to 1", "1 to 2"])
@pytest.mark.parametrize("step", range(1, 11) if FULL else [4])
def test_on_another_number_of_ranks_each_remaining_sample_of_the_epoch_is_trained_on_once(
    start, before, after, n, step
):
    scripts: dict[int, Callable[..., Any]] = {1: train, 2: train_on_two}
    folder = Path("changed")
    assert (
        start(
            functools.partial(scripts[before], n=n, norm=nn.LayerNorm, every_n_steps=1, callbacks=(KilledAfter(step),)),
            folder,
        ).end()
        != 0
    )
    place = newest_place(folder)
    assert place["step"] == step and place["items"] > 0
    done = notes_of(folder)
    for file in folder.glob("notes-*"):
        file.unlink()
    child = start(functools.partial(scripts[after], n=n, norm=nn.LayerNorm), folder)
    assert child.end() == 0, child.said()
    rest = notes_of(folder)
    begun = place["epoch"]
    counts = Counter(i for epoch, _, _, ids in done + rest if epoch == begun for i in ids)
    assert set(counts.values()) == {1}, f"repeated: {[i for i, count in counts.items() if count > 1]}"
    left = n - place["items"]
    last = left % (4 * after)  # samples of the epoch's last global batch, which fewer than one a rank leave no step
    n_left_out = last if last < after else 0
    assert len(set(range(n)) - set(counts)) == n_left_out
    for epoch in range(begun + 1, EPOCHS):
        assert max(Counter(i for e, _, _, ids in rest if e == epoch for i in ids).values()) == 1
    assert {epoch for epoch, *_ in rest} == set(range(begun if left > n_left_out else begun + 1, EPOCHS))


# --- signals -----------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(start: Callable[..., Child], n: int, *args: Any, **options: Any) -> list[Child]:
    """As a scheduler does it, without a launcher, so that each one's exit code is seen."""
    if n == 1:
        return [start(functools.partial(train, **options), *args)]
    place = {
        "WORLD_SIZE": n,
        "LOCAL_WORLD_SIZE": n,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [start(functools.partial(train, **options), *args, RANK=rank, LOCAL_RANK=rank, **place) for rank in range(n)]


def trained(folder: Path, n: int, steps: int) -> bool:
    return len(notes_of(folder)) >= n * steps


@pytest.mark.parametrize(
    "ranks, to, number, code",
    [
        (1, [0], signal.SIGTERM, 143),
        (2, [1], signal.SIGTERM, 143),
        (2, [0, 1], signal.SIGINT, 130),
        *(
            pytest.param(*case, marks=full)
            for case in (
                (1, [0], signal.SIGINT, 130),
                (2, [0], signal.SIGTERM, 143),
                (2, [0], signal.SIGINT, 130),
                (2, [1], signal.SIGINT, 130),
                (2, [0, 1], signal.SIGTERM, 143),
            )
        ),
    ],
)
def test_a_stop_signal_ends_all_ranks_after_the_same_step_with_its_code_and_a_resume_is_exact(
    start, ranks, to, number, code
):
    for child in start_ranks(start, ranks, Path("alone")):
        assert child.end() == 0, child.said()
    expected, draw = outcome_of(Path("alone")), random.Random(number * 10 + ranks + sum(to))
    for run in range(times(1, 12)):
        folder = Path(f"stopped-{run}")
        children = start_ranks(start, ranks, folder, every_n_steps=None, every_n_epochs=None)
        children[0].wait_for(
            functools.partial(trained, folder, ranks, draw.randrange(1, 36 // ranks))
        )  # of 48 steps, or 24
        time.sleep(draw.uniform(0, 0.01))
        begun = time.monotonic()
        for rank in to:
            children[rank].send(number)
            time.sleep(draw.choice([0, 0, 0.005]))
        codes = [child.end(30) for child in children]
        assert codes == [code] * ranks, [child.said()[-5:] for child in children]
        assert time.monotonic() - begun < 20
        last = {rank: max(step for _, step, r, _ in notes_of(folder) if r == rank) for rank in range(ranks)}
        place = newest_place(folder)
        assert set(last.values()) == {place["step"]}
        assert any("saved" in line and "from which resume=True goes on" in line for line in children[0].said())
        for child in start_ranks(start, ranks, folder):
            assert child.end() == 0, child.said()
        assert outcome_of(folder) == expected


@pytest.mark.parametrize("ranks, to", [(2, 1), pytest.param(1, 0, marks=full), pytest.param(2, 0, marks=full)])
def test_sigusr1_saves_and_goes_on(start, ranks, to):
    folder = Path("saved")
    for child in start_ranks(start, ranks, Path("alone")):
        assert child.end() == 0, child.said()
    children = start_ranks(start, ranks, folder, every_n_steps=None, every_n_epochs=None, keep=9)
    children[0].wait_for(lambda: trained(folder, ranks, 5))
    children[to].send(signal.SIGUSR1)
    for child in children:
        assert child.end() == 0, child.said()
    steps = [snapshots.read_snapshot(path)[0]["run"]["place"]["step"] for path in snapshots.all_in(folder / "kept")]
    assert len(steps) == 2 and 5 <= steps[0] < steps[1]
    assert outcome_of(folder) == outcome_of(Path("alone"))


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=full)], ids=["", "asynchronous"])
def test_a_second_signal_ends_at_once_and_leaves_no_half_written_checkpoint(start, asynchronous):
    draw = random.Random(5)
    n_at_once = 0
    for run in range(times(3, 60)):
        folder = Path(f"twice-{run}")
        child = start(functools.partial(train, every_n_steps=1, async_write=asynchronous), folder)
        child.wait_for(functools.partial(trained, folder, 1, 3))
        child.send(signal.SIGTERM)
        time.sleep(draw.uniform(0, 0.008))
        child.send(signal.SIGTERM)
        n_at_once += (code := child.end(5)) == -signal.SIGTERM
        assert code in (-signal.SIGTERM, 143)
        for path in snapshots.all_in(folder / "kept"):
            snapshots.read_snapshot(path)
        assert snapshots.newest_snapshot(folder / "kept") is not None
        clean(folder / "kept")
        assert litter(folder / "kept") == []
    print(f"{n_at_once} ended by the second signal")
    assert n_at_once
