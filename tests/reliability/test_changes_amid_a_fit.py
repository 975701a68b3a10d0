"""What happens to a fit whose folder changes under it, or that is told to stop at the worst of moments."""

import errno
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from learnkit import Callback, Learner
from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots
from learnkit.checkpoint.files import clean, partial, started
from tests.reliability.conftest import litter, make_learner, newest, outcome
from tests.reliability.test_io_faults import small_disk
from tests.reliability.test_processes import full, outcome_of, start_ranks

EPOCHS = 2  # of 12 steps


class Does(Callback):
    """Something, after the batch that did this step, when everything that is told of it was told."""

    order = Checkpoint.order - 10

    def __init__(self, step: int, action: Callable[[], object], *, training: bool = True) -> None:
        self.step, self.action, self.training = step, action, training

    def after_batch(self, learn: Learner) -> None:
        if learn.training == self.training and learn.step == self.step and (self.training or learn.batch_index == 1):
            self.action()


def fit(folder: Path, *callbacks: Callback, resume: bool = False, **options: Any) -> Learner:
    learn = make_learner(Checkpoint(folder, **({"every_n_steps": 4} | options)))
    torch.manual_seed(99 if resume else 3)
    with learn.no_logging():
        return learn.fit_one_cycle(EPOCHS, 1e-2, callbacks=callbacks, resume=resume)


@pytest.fixture
def expected() -> tuple[Any, ...]:
    torch.manual_seed(3)
    return outcome(fit(Path("alone")))


# --- the folder --------------------------------------------------------------
@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
def test_a_disk_that_becomes_read_only_is_an_error_and_a_resume_is_exact(expected, asynchronous):
    with small_disk() as disk:

        def remount(how: str) -> None:
            while subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], stderr=subprocess.DEVNULL).returncode:
                time.sleep(0.01)  # busy

        def turn_read_only() -> None:
            while not list((disk / "kept").glob("*-step-8")):
                time.sleep(0.01)  # the thread that writes may not have begun
            remount("ro")

        with pytest.raises(
            OSError,
            match=rf"could not write {disk}/kept.*Read-only file system.*Check that the folder .*is writable",
        ) as error:
            fit(disk / "kept", Does(9, turn_read_only), async_write=asynchronous)
        assert error.value.errno == errno.EROFS
        remount("rw")
        assert newest(disk / "kept")[1]["run"]["place"]["step"] == 8
        assert outcome(fit(disk / "kept", resume=True)) == expected


def test_a_folder_that_is_deleted_amid_a_fit_is_made_again(expected):
    assert outcome(fit(Path("kept"), Does(9, lambda: shutil.rmtree("kept")))) == expected
    assert [path.name for path in snapshots.all_in(Path("kept"))] == ["000005-step-24", "000006-step-24"]  # from 1 on
    assert outcome(fit(Path("kept"), resume=True)) == expected


def test_a_checkpoint_that_somebody_deleted_is_not_missed(expected):
    learn = fit(Path("kept"), Does(9, lambda: shutil.rmtree(snapshots.all_in(Path("kept"))[0])))
    assert outcome(learn) == expected and len(snapshots.all_in(Path("kept"))) == 2


def test_a_disk_that_is_full_at_the_end_is_an_error_also_where_a_signal_ends_the_fit():
    with small_disk() as disk:

        def fill() -> None:
            with (disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass

        def fill_and_stop() -> None:
            fill()
            signal.raise_signal(signal.SIGTERM)

        for kept, action in (("a", fill), ("b", fill_and_stop)):
            with pytest.raises(OSError, match="No space left") as full:
                fit(disk / kept, Does(22, action), every_n_epochs=None, async_write=True)
            assert full.value.errno == errno.ENOSPC and str(disk / kept) in str(full.value)
            assert newest(disk / kept)[1]["run"]["place"]["step"] in (16, 20) and litter(disk / kept) == []
            (disk / "ballast").unlink()
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
        assert handlers == (signal.SIG_DFL, signal.SIG_DFL)


# --- names, links and what lies about ----------------------------------------
def test_two_writers_that_take_the_same_number_both_keep_their_checkpoint():
    for run in ("a", "b", "c"):
        path = snapshots.write_snapshot(Path("kept"), "000001-step-7", {"model": {}}, {"run": run})
    assert path.name == "000003-step-7"
    assert [snapshots.read_snapshot(path)[1]["run"] for path in snapshots.all_in(Path("kept"))] == [
        "a",
        "b",
        "c",
    ] and litter(Path("kept")) == []


def test_of_a_checkpoint_that_is_a_link_only_the_link_is_removed():
    path = snapshots.write_snapshot(Path("archive"), "000001-step-1", {"model": {}}, {"run": "a"})
    Path("kept").mkdir()
    (link := Path("kept") / path.name).symlink_to(path.absolute())
    assert snapshots.read_snapshot(link) == snapshots.read_snapshot(path)
    snapshots.remove_snapshot(link)
    assert os.listdir("kept") == [] and snapshots.read_snapshot(path)[1] == {"run": "a"}


def test_litter_of_a_process_whose_number_another_one_has_now_is_removed():
    pid = os.getppid()
    assert started(pid) is not None
    kept, dead = Path("kept"), f".000001-step-1.{pid}-{(started(pid) or 0) - 1}.part"
    living, theirs = f".000001-step-1.{pid}-{started(pid)}.part", ".000001-step-1.notes"
    for name in (dead, living, theirs):
        (kept / name).mkdir(parents=True)
    clean(kept)
    assert litter(kept) == sorted([living, theirs])


def test_what_a_killed_learn_save_left_is_removed_by_the_next_one_of_that_name(start):
    def dies() -> None:
        models = Path("models")
        models.mkdir()
        partial(models / "a.pt").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    start(dies).end()
    assert len(litter(Path("models"))) == 1
    make_learner().save("a")
    assert os.listdir("models") == ["a.pt"]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_of_this_fit_go_first_when_a_newer_one_is_durable(keep):
    """Else the one that is left to go on from might be the damaged one."""
    with pytest.raises(ConnectionAbortedError):
        fit(Path("kept"), Does(9, abort), keep=3)
    whole, *damaged = snapshots.all_in(Path("kept"))
    for path in damaged:
        os.truncate(path / "model.pt", 100)
    with pytest.warns(UserWarning, match="skipped a damaged"), pytest.raises(ConnectionAbortedError):
        fit(Path("kept"), Does(9, abort), resume=True, keep=keep)  # from step 4, to the checkpoint of step 8
    left = snapshots.all_in(Path("kept"))
    assert left[-1].name.endswith("-step-8") and left[:-1] == [whole][: keep - 1]


def abort() -> None:
    raise ConnectionAbortedError


# --- a checkpoint of something else ------------------------------------------
class Counts(Callback):
    """Has a state."""

    def __init__(self) -> None:
        self.n = 0

    def after_step(self, learn: Learner) -> None:
        self.n += 1

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: Any) -> None:
        self.n = state["n"]


@pytest.mark.parametrize(
    "options, told",
    [
        (
            {"width": 9},
            r"the file is of another model; 3 differences, nothing was loaded:(?s:.*)1.weight: the file has \(8, 4\), "
            r"the model \(9, 4\)",
        ),
        ({"norm": nn.LayerNorm}, r"another model; 3 differences(?s:.*)0.running_mean: only the file has it"),
        (
            {"opt_func": lambda ps, lr: SGD(ps, lr=lr, momentum=0.9)},
            "optimizer state does not fit this SGD .*same opt_func and splitter",
        ),
        ({"splitter": lambda net: [net[:2], net[2:]]}, "optimizer state does not fit this AdamW and its parameters"),
    ],
    ids=["width", "layers", "optimizer", "groups"],
)
def test_a_checkpoint_of_another_model_or_optimizer_is_refused_and_nothing_of_it_is_loaded(options, told):
    with pytest.raises(ConnectionAbortedError):
        fit(Path("kept"), Does(9, abort))
    learn = make_learner(Checkpoint("kept"), **options)
    before = [value.clone() for value in learn.model.state_dict().values()]
    with learn.no_logging(), pytest.raises(ValueError, match=told):
        learn.fit_one_cycle(EPOCHS, 1e-2, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.state_dict().values(), strict=True))
    assert not learn.opt.state_dict()["state"]


def test_a_callback_that_the_checkpoint_has_and_the_fit_has_not_is_named_before_anything_is_loaded():
    with pytest.raises(ConnectionAbortedError):
        fit(Path("kept"), Does(9, abort), Counts())
    learn = make_learner(Checkpoint("kept"))
    before = [value.clone() for value in learn.model.state_dict().values()]
    with learn.no_logging(), pytest.raises(ValueError, match="has the state of Counts, which this fit does not have"):
        learn.fit_one_cycle(EPOCHS, 1e-2, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.state_dict().values(), strict=True))


# --- signals -----------------------------------------------------------------
def stop() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("step", [12, 24])
def test_a_stop_amid_a_write_or_in_validation_is_durable_and_a_resume_exact(
    expected, step, training, asynchronous, capsys
):
    """With async_write the checkpoint of that step has just been handed to the writer."""
    with pytest.raises(SystemExit) as left:
        fit(Path("kept"), Does(step, stop, training=training), async_write=asynchronous)
    assert left.value.code == 143 and "from which resume=True continues" in capsys.readouterr().err
    assert newest(Path("kept"))[1]["run"]["place"]["step"] in (step, step + 1) and litter(Path("kept")) == []
    assert outcome(fit(Path("kept"), resume=True)) == expected


def test_a_signal_that_comes_when_the_last_epoch_is_over_is_heard(expected):
    class Late(Callback):
        def after_fit(self, learn: Learner) -> None:
            stop()

    with pytest.raises(SystemExit) as left:
        fit(Path("kept"), Late(), async_write=True)
    assert left.value.code == 143
    assert outcome(fit(Path("kept"), resume=True)) == expected


def test_sigusr1_after_a_stop_signal_does_not_take_it_back():
    def both() -> None:
        stop()
        signal.raise_signal(signal.SIGUSR1)

    class InForward(Callback):
        def after_forward(self, learn: Learner) -> None:
            if learn.training and learn.step == 5:
                both()

    with pytest.raises(SystemExit):
        fit(Path("kept"), InForward())


def test_sigusr1_in_validation_saves_and_goes_on(expected):
    save = functools.partial(signal.raise_signal, signal.SIGUSR1)
    assert (
        outcome(fit(Path("kept"), Does(12, save, training=False), every_n_steps=None, every_n_epochs=None, keep=9))
        == expected
    )
    assert [path.name.split("-")[-1] for path in snapshots.all_in(Path("kept"))] == ["12", "24"]


class Signals(Callback):
    """One rank sends itself a signal in the second batch of an epoch's validation."""

    def __init__(self, rank: int, number: int, epoch: int) -> None:
        self.rank, self.number, self.epoch = rank, number, epoch

    def after_batch(self, learn: Learner) -> None:
        if not learn.training and (learn.rank, learn.epoch, learn.batch_index) == (self.rank, self.epoch, 1):
            signal.raise_signal(self.number)


@pytest.mark.parametrize(
    "rank, number, codes, epoch",
    [
        (1, signal.SIGTERM, [143, 143], 1),
        pytest.param(0, signal.SIGINT, [130, 130], 0, marks=full),
        pytest.param(1, signal.SIGUSR1, [0, 0], 1, marks=full),
        pytest.param(0, signal.SIGTERM, [143, 143], 3, marks=full),
    ],
)
def test_a_signal_to_one_of_two_ranks_in_validation_is_heard_by_both(start, rank, number, codes, epoch):
    children = start_ranks(
        start, 2, Path("signalled"), every_n_steps=None, every_n_epochs=None, callbacks=(Signals(rank, number, epoch),)
    )
    assert [child.end() for child in children] == codes, [child.said() for child in children]
    steps = [snapshots.read_snapshot(path)[1]["step"] for path in snapshots.all_in(Path("signalled/kept"))]
    assert steps == ([6 * (epoch + 1)] if codes[0] else [12, 24])
    if codes[0]:
        for child in start_ranks(start, 2, Path("signalled")):
            assert child.end() == 0, child.said()
    for child in start_ranks(start, 2, Path("alone")):
        assert child.end() == 0, child.said()
    assert outcome_of(Path("signalled")) == outcome_of(Path("alone"))
