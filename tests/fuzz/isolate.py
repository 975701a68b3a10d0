"""A function in a process of its own, with a time limit: whatever it does to itself is a result, and nothing of it is
left.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from learnkit.distributed.process import die_with_parent


class Crashed(Exception):
    """The process ended without a result."""


class Process:
    """Forked at once; the caller must have no other threads that matter. `poll()` until `over`, then `result()`."""

    def __init__(self, fn: Callable[..., Any], *args: Any, seconds: float) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.answer, self.output = Path(self.folder.name, "answer"), Path(self.folder.name, "output")
        self.deadline, self.code, self.late = time.monotonic() + seconds, None, False
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of forking beside a test runner's threads, from Python 3.12 on
            self.pid = os.fork()
        if self.pid == 0:
            self.be(parent, fn, args)

    def be(self, parent: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        code = 1
        try:
            gc.freeze()
            die_with_parent(parent)
            os.setsid()
            warnings.resetwarnings()  # a test runner makes errors of them
            out = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number in (1, 2):
                os.dup2(out, number)
            sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            faulthandler.enable(2)
            faulthandler.register(signal.SIGUSR2, file=2)  # no watchdog thread: a fork would wait for it for ever
            result = fn(*args)
            part = self.answer.with_suffix(".part")
            part.write_bytes(pickle.dumps(result))
            part.rename(self.answer)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            os._exit(code)

    def poll(self) -> bool:
        """Whether it is over; one that is late is ended, with all of its group."""
        if self.code is not None:
            return True
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and time.monotonic() > self.deadline:
            self.late = True
            os.kill(self.pid, signal.SIGUSR2)  # shows where it is
            time.sleep(0.3)
            self.end()
            pid, status = os.waitpid(self.pid, 0)
        if pid:
            self.code = os.waitstatus_to_exitcode(status)
            self.end()
        return pid != 0

    def end(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def result(self) -> Any:
        try:
            if self.late:
                raise TimeoutError(f"still running after its time:\n{self.said()[-4000:]}")
            if not self.answer.exists():
                raise Crashed(f"ended with {self.code}:\n{self.said()[-4000:]}")
            return pickle.loads(self.answer.read_bytes())  # from our own child
        finally:
            self.folder.cleanup()


def isolated(fn: Callable[..., Any], *args: Any, seconds: float = 60) -> Any:
    """What fn(*args) returns in a forked process. Raises Crashed, or TimeoutError."""
    process = Process(fn, *args, seconds=seconds)
    while not process.poll():
        time.sleep(0.005)
    return process.result()
