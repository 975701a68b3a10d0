"""Processes of this machine: whether they run, how they end with their parent, and the note of a failed one."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOST = re.compile(r"gloo|nccl|TCPStore|connection (was )?(closed|reset|refused|aborted)|broken pipe", re.IGNORECASE)
_noted: BaseException | None = None
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # the variable in which torchrun names the file that a failed rank writes


@functools.cache
def machine_id() -> str:
    """The same text for two processes that share a machine and see each other: boot, process namespace, host name."""
    seen = [platform.node()]
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            seen.append(file.read().strip())
        seen.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass  # not Linux: the name alone
    return " ".join(seen)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a process that has ended but was not yet reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        if os.path.exists("/proc/self/stat"):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def die_with_parent(parent: int) -> bool:
    """Make the kernel kill this process when the thread that started it ends; returns whether it will (Linux only)."""
    if sys.platform != "linux":
        return False
    done = ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)  # the parent ended before this call
    return done


def parent_is_torchrun() -> bool:
    """Whether torchrun (or torch.distributed.launch) is the direct parent: only there is the variable absent."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            return b"TORCHELASTIC_RUN_ID=" not in file.read()
    except OSError:
        return False


def parent_arguments() -> list[str]:
    """The command line of this process's parent; [] where it cannot be read."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            return file.read().decode(errors="replace").split("\0")
    except OSError:
        return []


def record_failure(message: str, stack: str, *, dragged_along: bool = False, delay: float = 0.0) -> None:
    """Write the note that a launcher reads, as torchrun's `record` does. Of several, torchrun shows the earliest.

    `delay` dates it later, in seconds, for a rank that ends only because another one has failed.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    when = time.time() + delay
    shown = stack or message  # torchrun shows this alone, and nothing where it is empty
    extra = {"py_callstack": shown, "timestamp": str(int(when)), "time": when, "dragged_along": dragged_along}
    partial = f"{path}.{os.getpid()}"
    with open(partial, "w") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)
    os.replace(partial, path)  # a launcher that looks now must not see half a note


def note_failure(error: BaseException, *, dragged_along: bool = False) -> None:
    """Write the note of an error that is being raised, unless there is one of an error that it was raised from."""
    global _noted
    seen: BaseException | None = error
    while seen is not None:
        if seen is _noted:
            return
        seen = seen.__cause__ or seen.__context__
    _noted = error
    record_failure(one_line(error), full_traceback(error), dragged_along=dragged_along)


def discard_failure() -> None:
    """Remove the note."""
    with suppress(OSError):
        os.unlink(os.environ.get(ERROR_FILE, ""))


def read_failure(path: str) -> dict[str, Any] | None:
    """{"message": …, "stack": …, "time": …, "dragged_along": …} of a note, or None where there is none."""
    try:
        with open(path) as file:
            note = json.load(file)["message"]
    except FileNotFoundError:
        return None
    extra = note["extraInfo"]
    stack = "" if extra["py_callstack"] == note["message"] else extra["py_callstack"]
    return {
        "message": note["message"],
        "stack": stack,
        "time": extra.get("time", int(extra["timestamp"])),
        "dragged_along": extra.get("dragged_along", False),
    }


def is_lost_connection(error: BaseException) -> bool:
    """Whether this error only shows that another rank, or the connection to it, is gone."""
    return isinstance(error, (RuntimeError, ConnectionError)) and LOST.search(str(error)) is not None


def stack_of(thread: threading.Thread) -> str:
    """A thread's stack, innermost frame last, without the frames of `launch` and `multiprocessing`; "" if it has
    ended.
    """
    frame = sys._current_frames().get(thread.ident or -1)
    lines = [] if frame is None else traceback.format_stack(frame)
    outer = max((i for i, line in enumerate(lines) if "in result_of" in line and "launch.py" in line), default=-1)
    return "".join(lines[outer + 1 :])


def one_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip().replace("\n", " ")


def full_traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))
