# pyright: reportPrivateImportUsage=false, reportArgumentType=false
"""Start ranks on this machine from a notebook or a plain script, and end them all together."""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from learnkit.devices.accelerator import has_driver
from learnkit.distributed.process import (
    ERROR_FILE,
    die_with_parent,
    is_lost_connection,
    note_failure,
    one_line,
    read_failure,
)
from learnkit.distributed.world import destroy_process_group, get_rank, get_world_size, has_group

# seconds in which the others may end by themselves after one has failed, longer than guards need to see it; then
# SIGTERM
END_GRACE = 1.0
KILL_AFTER = 2.0  # seconds from SIGTERM to SIGKILL
IN_USE = "{} is in use in this process already, or was started by a question such as torch.cuda.is_available()"


class RankFailed(RuntimeError):
    """Raised when a rank that `launch` started has failed. Its `rank` is the first one to fail; the message ends with
    that rank's traceback.

    Example:
        >>> try: raise RankFailed(1, 2, "ValueError: bad", "Traceback …")
        ... except RankFailed as failure: print(failure.rank)
        1
    """

    def __init__(self, rank: int, world_size: int, reason: str, stack: str = "") -> None:
        super().__init__(f"rank {rank} of {world_size} failed: {reason}" + (f"\n\n{stack}" if stack else ""))
        self.rank = rank


def launch(
    fn: Callable[..., Any],
    nprocs: int,
    *args: Any,
    timeout: float | None = None,
    every_rank: bool = False,
    start_method: str | None = None,
) -> Any:
    """Call `fn(*args)` in `nprocs` new processes, the ranks.

    In `fn`, `init_process_group()` or `Learner.to_distributed()` joins them; each rank has its share of the cores as
    threads. No rank outlives the call, or this process.

    Args:
        fn: the function. Ranks are forked, so it may be defined in a notebook. If the accelerator is in use here
            already, or `torch.cuda.is_available()` was called, they are spawned, and `fn` must be importable.
        nprocs: the number of ranks; 1: `fn` is called in this process.
        *args: the arguments of `fn`.
        timeout: seconds until TimeoutError; None: no limit.
        every_rank: whether to return what every rank has returned.
        start_method: "fork" or "spawn"; None: as described for `fn`.

    Returns:
        What rank 0 has returned, or with `every_rank=True` the list of what all ranks have; tensors on the CPU.

    Raises:
        RankFailed: when a rank fails, with the traceback of the first one.
        TimeoutError: after `timeout` seconds.
    """
    check_can_launch(fn, nprocs, start_method)
    if nprocs == 1:
        alone = fn(*args)
        return [alone] if every_rank else alone
    method = start_method or choose_start_method(fn)
    with tempfile.TemporaryDirectory(prefix="learnkit-") as folder:
        store = open_store()
        try:
            results = RankProcesses(fn, args, nprocs, store.port, Path(folder), method).run(timeout)
        finally:
            del store  # an error's traceback would keep its server running
    return results if every_rank else results[0]


def open_store() -> dist.TCPStore:
    """A store that this process serves to this machine alone (by default, TCPStore listens on all interfaces). Port 0
    is a free one.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())


def choose_start_method(fn: Callable[..., Any]) -> str:
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    lost = lost_by_fork()
    if can_fork and lost is None:
        return "fork"
    if not can_import(fn):
        why = IN_USE.format(lost) if can_fork else "this system does not fork processes"
        raise RuntimeError(
            f"launch cannot start {fn!r}: {why}, so ranks must import the function, and a function of a notebook, a "
            "lambda or a nested function cannot be imported. Restart the kernel and use the accelerator only inside "
            "the function, or move the function into a .py file."
        )
    return "spawn"


def can_import(fn: Callable[..., Any]) -> bool:
    """Whether a new process can import the function; a script is run there again, without its main guard's block."""
    if getattr(fn, "__module__", None) == "__main__" and getattr(sys.modules["__main__"], "__file__", None) is None:
        return False
    try:
        pickle.dumps(fn)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def lost_by_fork() -> torch.device | None:
    """The accelerator of this machine that a forked child of this process could not use; None: there is none.

    A question for a GPU may have started CUDA, `torch.cuda.is_available()` too, and `torch.cuda.is_initialized()` does
    not show it (torch 2.15). A forked child does: this takes about 15 ms, and no time where there is no driver or torch
    was built for the CPU alone. The accelerator is asked for only if that child could not use it, because the question
    may start CUDA.

    MPS is not checked: a machine has one such device, which ranks cannot share, so they use the CPU.
    """
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type == "mps" or not hasattr(os, "fork"):
        return None
    if kind.type == "cuda" and not has_driver():
        return None
    is_lost = getattr(torch.get_device_module(kind), "_is_in_bad_fork", None)
    if is_lost is None or not in_forked_child(is_lost):
        return None
    return kind if torch.accelerator.is_available() else None


def in_forked_child(ask: Callable[[], bool]) -> bool:
    with forking():
        child = os.fork()
    if child == 0:
        answer = 1
        try:
            answer = int(ask())
        finally:
            os._exit(answer)  # flushes nothing, and runs no handler of the parent's
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def check_can_launch(fn: Callable[..., Any], nprocs: int, method: str | None) -> None:
    if not callable(fn):
        raise TypeError(f"launch(fn, nprocs): fn is {fn!r}, expected a function.")
    if isinstance(nprocs, bool) or not isinstance(nprocs, int) or nprocs < 1:
        raise ValueError(f"launch(fn, nprocs): nprocs={nprocs!r}, expected a whole number of 1 or more.")
    if nprocs > 1 and (has_group() or get_world_size() > 1):
        raise RuntimeError(
            f"launch would start {nprocs} ranks inside rank {get_rank()} of {get_world_size()}: this "
            "process is in a group already. Call the function itself, or start the script without a "
            "launcher."
        )
    if nprocs > 1 and method == "fork" and (lost := lost_by_fork()) is not None:
        raise RuntimeError(
            f"launch cannot fork: {IN_USE.format(lost)}. Leave start_method out, or use the accelerator only "
            "inside the function."
        )


class RankProcesses:
    """The processes of one `launch`: started, watched and ended by one thread.

    It is a new thread because of OpenMP: a forked copy of a thread that has run an OpenMP loop hangs in its next one
    (torch 2.15 with GNU's libgomp: a matmul with two threads before and after, always), the copy of a new thread does
    not. It lives as long as the ranks, because the kernel kills them when the thread that started them ends.
    """

    def __init__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], nprocs: int, port: int, folder: Path, method: str
    ) -> None:
        self.fn, self.args, self.nprocs, self.port, self.folder = fn, args, nprocs, port, folder
        self.context: Any = multiprocessing.get_context(method)
        self.n_threads = max(1, min(torch.get_num_threads(), n_cores() // nprocs))
        self.all_started = self.context.Event()  # see run_rank
        self.processes: list[Any] = []
        self.receivers: list[Any] = []
        self.answers: dict[int, bytes] = {}
        self.error: BaseException | None = None
        self.cancelled, self.finished = threading.Event(), threading.Event()

    def run(self, timeout: float | None) -> list[Any]:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # else each rank prints again what is buffered
        thread = threading.Thread(target=self.supervise, args=(timeout,), name="launch")
        thread.start()
        try:
            self.finished.wait()
        finally:  # for example after Ctrl-C
            self.cancelled.set()
            thread.join()
        if self.error is not None:
            raise self.error
        return [pickle.loads(self.answers[rank]) for rank in range(self.nprocs)]  # pickled by our own child processes

    def supervise(self, timeout: float | None) -> None:
        try:
            for rank in range(self.nprocs):
                self.start(rank)
            self.all_started.set()
            self.watch(None if timeout is None else time.monotonic() + timeout, timeout)
        except BaseException as error:
            self.error = error
        finally:
            self.end()
            self.finished.set()

    def start(self, rank: int) -> None:
        receiver, sender = self.context.Pipe(duplex=False)
        arguments = (
            self.environment(rank),
            os.getpid(),
            gc.isenabled(),
            self.n_threads,
            self.all_started,
            sender,
            self.fn,
            self.args,
        )
        process = self.context.Process(target=run_rank, args=arguments, name=f"rank {rank}")
        with forking():
            process.start()
        sender.close()
        self.processes.append(process)
        self.receivers.append(receiver)

    def environment(self, rank: int) -> dict[str, str]:
        """The variables that torchrun sets; this process serves the store, as torchrun's agent does."""
        n = str(self.nprocs)
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": n,
            "LOCAL_WORLD_SIZE": n,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": loopback(),
            ERROR_FILE: str(self.note(rank)),
        }

    def note(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"

    def watch(self, deadline: float | None, timeout: float | None) -> None:
        while len(self.answers) < self.nprocs and not self.cancelled.is_set():
            waiting = [r for rank, r in enumerate(self.receivers) if rank not in self.answers]
            connection.wait(waiting, 0.05)
            # Exit codes are read first: what a rank has sent before it ended can then be received.
            codes = [process.exitcode for process in self.processes]
            for rank in range(self.nprocs):
                self.receive(rank)
            ended = [rank for rank, code in enumerate(codes) if code is not None and rank not in self.answers]
            if ended:
                raise self.failure()
            if deadline is not None and time.monotonic() > deadline:
                raise self.too_late(timeout)

    def receive(self, rank: int) -> None:
        if rank in self.answers or not self.receivers[rank].poll():
            return
        with suppress(EOFError):  # it ended without an answer
            self.answers[rank] = self.receivers[rank].recv_bytes()

    def failure(self) -> RankFailed:
        """The error that names the first rank to fail. Others fail because of it, and may be noticed earlier; a killed
        rank leaves no note.
        """
        deadline = time.monotonic() + 0.5
        while not (culprits := self.culprits()) and time.monotonic() < deadline:
            time.sleep(0.02)
        notes = culprits or self.notes()
        rank = min(notes, key=lambda r: notes[r]["time"])
        return RankFailed(rank, self.nprocs, notes[rank]["message"], notes[rank]["stack"])

    def notes(self) -> dict[int, dict[str, Any]]:
        """What is known of each failed rank: its note, else how it ended."""
        notes = {rank: read_failure(str(self.note(rank))) for rank in range(self.nprocs)}
        for rank, process in enumerate(self.processes):
            if notes[rank] is not None or process.exitcode is None:
                continue
            self.receive(rank)
            if rank not in self.answers:
                told = [
                    f" ({note['message']})" for note in notes.values() if note is not None and note["dragged_along"]
                ]
                ended = f"it ended with {exit_reason(process.exitcode)}{''.join(told[:1])}"
                notes[rank] = {"message": ended, "stack": "", "time": time.time(), "dragged_along": False}
        return {rank: note for rank, note in notes.items() if note is not None}

    def culprits(self) -> dict[int, dict[str, Any]]:
        return {rank: note for rank, note in self.notes().items() if not note["dragged_along"]}

    def too_late(self, timeout: float | None) -> TimeoutError:
        late = [rank for rank in range(self.nprocs) if rank not in self.answers]
        for rank in late:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)  # shows where it is, on standard error
            time.sleep(0.2)  # written in pieces: those of two ranks would mix
        return TimeoutError(
            f"launch: ranks {late} of {self.nprocs} were still running after {timeout:g} s; "
            "standard error shows where they were."
        )

    def end(self) -> None:
        if isinstance(self.error, RankFailed):
            wait_for_processes(self.processes, END_GRACE)
        for process in self.processes:
            process.terminate()
        wait_for_processes(self.processes, KILL_AFTER)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for receiver in self.receivers:
            receiver.close()


@contextmanager
def forking() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()  # see run_rank
    try:
        with warnings.catch_warnings():  # Python 3.12 warns of a fork with other threads; ours only waits
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if collecting:
            gc.enable()


def run_rank(
    environment: dict[str, str],
    parent: int,
    collecting: bool,
    n_threads: int,
    all_started: Any,
    sender: Any,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The main function of each new process."""
    die_with_parent(parent)
    # The store's thread looks up the name of each rank that connects; a process that is forked during this has the
    # resolver's lock held for ever, and hangs in its own TCPStore (glibc, torch 2.15: 1 of 700 launches of 3 ranks).
    all_started.wait()
    # The parent's objects are never collected here: those with a thread there, such as a store of an earlier group in a
    # cycle of garbage, have none here, and their destructors crash (torch 2.15: segmentation fault).
    gc.freeze()
    if collecting:
        gc.enable()
    os.environ.update(environment)
    os.environ.pop("TORCHELASTIC_RESTART_COUNT", None)
    torch.set_num_threads(n_threads)
    if "SIGUSR1" in signal.Signals.__members__:
        faulthandler.register(signal.SIGUSR1, file=2)
    try:
        sender.send_bytes(as_answer(result_of(fn, args)))
        destroy_process_group()
    except BaseException as error:
        note_failure(error, dragged_along=is_lost_connection(error))
        sys.exit(1)


def result_of(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return what the function returns; None if it ends with sys.exit(0), as a script may."""
    try:
        return fn(*args)
    except SystemExit as leave:
        if leave.code:
            raise
        return None


def as_answer(result: Any) -> bytes:
    answer = io.BytesIO()
    try:
        Answer(answer, pickle.HIGHEST_PROTOCOL).dump(result)
    except Exception as error:
        raise TypeError(
            f"rank {get_rank()} returned a {type(result).__name__} that cannot be sent back: "
            f"{one_line(error)}. Return numbers, tensors, or a state_dict."
        ) from error
    return answer.getvalue()


class Answer(pickle.Pickler):
    """Pickle what a rank returns with its device's tensors on the CPU: else the parent would use each rank's device,
    and could then not fork ranks that use it.
    """

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or obj.device.type in ("cpu", "meta") or type(obj) not in (Tensor, Parameter):
            return NotImplemented
        here = obj.detach().cpu()
        if isinstance(obj, Parameter):
            return Parameter, (here, obj.requires_grad)
        return here.requires_grad_(obj.requires_grad).__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def wait_for_processes(processes: list[Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def exit_reason(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def loopback() -> str:
    """The interface for ranks of one machine: that of the host's name may be slow, or blocked by a firewall."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def n_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
