"""Faults, and processes to put them into: forked from this warm one, about 0.1 s each, where a new one takes two
seconds.
"""

import gc
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learnkit import DataBunch, Learner, accuracy
from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots
from learnkit.distributed import destroy_process_group
from learnkit.distributed.process import die_with_parent

os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:10")  # as for tests/distributed
FULL = os.environ.get("RELIABILITY") == "full"  # `make reliability`


def times(quick: int, full: int) -> int:
    return full if FULL else quick


def make_learner(
    *callbacks: Any, n: int = 48, bs: int = 4, width: int = 8, norm: Any = nn.BatchNorm1d, **options: Any
) -> Learner:
    """A tiny fit in which everything that a resume can lose matters: dropout, batch norm, Adam, a shuffled order."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)
    x[:, 0] = torch.arange(float(n))  # each sample's number
    net = nn.Sequential(norm(4), nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3))
    return Learner(
        DataBunch.from_tensors((x, y), (x, y), bs=bs, drop_last=False),
        net,
        metrics=accuracy,
        callbacks=list(callbacks),
        **options,
    )


def fit_and_keep(folder: Path, epochs: int = 1, **options: Any) -> Learner:
    learn = make_learner(Checkpoint(folder, **options))
    with learn.no_logging():
        return learn.fit_one_cycle(epochs, 1e-2)


def outcome(learn: Learner) -> tuple[Any, ...]:
    """What must be equal, as plain numbers."""
    moments = [v.tolist() for s in learn.opt.state_dict()["state"].values() for v in s.values()]
    return (
        [p.tolist() for p in learn.model.state_dict().values()],
        moments,
        learn.recorder.losses,
        learn.recorder.lrs,
        learn.step,
    )


def newest(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    found = snapshots.newest_snapshot(folder)
    assert found is not None
    return found


def litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


class Child:
    """`fn(*args)` in a process of its own, whose output goes to a file; `environment` is added to its own."""

    n_started = 0

    def __init__(self, fn: Callable[..., Any], *args: Any, **environment: Any) -> None:
        Child.n_started += 1
        self.output, self.code = Path(f"child-{Child.n_started}.txt").absolute(), None
        parent, collecting = os.getpid(), gc.isenabled()
        gc.disable()
        with warnings.catch_warnings():  # of forking beside other threads
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            self.be(parent, fn, args, environment)
        if collecting:
            gc.enable()

    def be(self, parent: int, fn: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, Any]) -> None:
        code: Any = 1
        try:
            gc.freeze()  # objects that own a thread in the parent have none here
            die_with_parent(parent)
            os.environ.update({name: str(value) for name, value in environment.items()})
            signal.signal(signal.SIGINT, signal.default_int_handler)
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in (1, 2):
                os.dup2(file, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
            fn(*args)
            destroy_process_group()
            code = 0
        except SystemExit as leave:
            code = leave.code
        except BaseException:
            traceback.print_exc()
        finally:
            if environment.get("RANK") == 0:
                time.sleep(0.3)  # it serves the store; an interpreter takes as long to end
            os._exit(code if isinstance(code, int) else 1)

    def said(self) -> list[str]:
        """Whole lines of output so far."""
        text = self.output.read_text() if self.output.exists() else ""
        return text.split("\n")[:-1]

    def wait_for(self, condition: Callable[[], Any], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.is_running():
                raise AssertionError(f"it ended with {self.code}:\n" + "\n".join(self.said()))
            if time.monotonic() > deadline:
                raise AssertionError(f"it waited in vain for {timeout} s:\n" + "\n".join(self.said()))
            time.sleep(0.004)

    def is_running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def send(self, number: int) -> None:
        if self.is_running():
            os.kill(self.pid, number)

    def end(self, timeout: float = 60) -> int:
        """Its exit code; -9 if it was killed with signal 9."""
        deadline = time.monotonic() + timeout
        while self.is_running():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"it still ran after {timeout} s:\n" + "\n".join(self.said()))
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        with suppress(AssertionError):
            self.end(10)


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    """start(fn, *args, **environment): a Child; none outlives the test."""
    children: list[Child] = []

    def begin(fn: Callable[..., Any], *args: Any, **environment: Any) -> Child:
        children.append(Child(fn, *args, **environment))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
