# pyright: reportPrivateImportUsage=false
"""When one rank fails, dies or hangs, all ranks end within seconds, and the error names the culprit.

A rank in a collective cannot be reached: torch does not interrupt it, and does not notice, for up to half an hour, that
another rank has raised an error and will never come. So each rank has a thread that looks into the store that the ranks
share:

    a rank raises         it writes the reason under one key, which the first writer wins, and waits until the others
                          have seen it; then its error ends it, and its traceback comes last
    the others            print in one line why they end, and end a little later, so that launchers see the culprit
                          first
    stuck clean-up        a rank that has failed and still runs after CLEAN_UP_GRACE seconds is ended by its own thread
    killed, os._exit      noticed by the threads on the same machine; on another one by a lost connection and missing
                          signs of life
    frozen                each thread writes a sign of life; the rank whose sign does not change for hang_timeout is
                          frozen
    hanging               no rank has got on for hang_timeout: every thread shows where its process is

This file has what the main thread does, `watcher` what the other thread does, and `board` what they write and read.
Measured with 2 ranks on 2 cores (torch 2.15, gloo): see tests/distributed/test_guard.py, which holds each under 10 s.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from learnkit.distributed.board import Board, Culprit, cloned_stores
from learnkit.distributed.process import (
    die_with_parent,
    is_lost_connection,
    note_failure,
    one_line,
    parent_is_torchrun,
)
from learnkit.distributed.stop import StopTogether
from learnkit.distributed.watcher import CLEAN_UP_GRACE, Watcher
from learnkit.distributed.world import get_rank, get_world_size, has_group

EXIT_GRACE = 3.0  # seconds that the interpreter of a failed rank has at least to end (0.3 s on a free machine)
SEEN = 0.7  # seconds that a failing rank waits until the others have seen why
# seconds in which another rank's death must be found to explain a lost connection: MISSED * LIFE, and two looks
SILENT = 4.0

BY_ALL = "what one rank calls all have to call: take it out of `if is_main():`"

_n_guards = 0  # the same on every rank
_active: Guard | None = None


@contextmanager
def guard(
    *,
    hang_timeout: float | None = 600.0,
    describe: Callable[[], str] | None = None,
    failure: Callable[[], BaseException | None] | None = None,
) -> Iterator[Guard]:
    """End all ranks, with the reason, when one of them fails, dies or hangs in this block. Does nothing in a world of
    one.

        with guard(hang_timeout=600, describe=lambda: f"epoch {epoch}, batch {i}") as g:
            for i, batch in enumerate(loader):
                train(batch)
                g.beat += 1

    All ranks must enter the block, and leave it together: it ends when all ranks have come to its end. Inside another
    guard, this is the outer one.

    Args:
        hang_timeout: seconds without any progress after which all ranks end; None: never. Progress is a change of
            `g.beat`, a plain number that costs nothing to count, or of what `describe` returns.
        describe: returns where the training is, for messages. Called from another thread.
        failure: returns the error that is being raised, if any, so that the other ranks get to know it before a
            clean-up that may hang; `g.report(error)` does the same. Called from another thread.
    """
    global _active
    if _active is not None or not has_group() or get_world_size() == 1:
        yield _active or Guard(None, None, None)
        return
    _active = Guard(hang_timeout, describe, failure)
    _active.start()
    try:
        yield _active
        _active.leave()
    except BaseException as error:
        _active.fail(error)
        raise
    finally:
        _active = None


class Guard:
    """The value of `with guard() as g`: count `g.beat` up for each step.

    Example:
        >>> with guard() as g:
        ...     for _ in range(3): g.beat += 1
        >>> g.beat
        3
    """

    board: Board  # both from `start` on
    watcher: Watcher

    def __init__(
        self,
        hang_timeout: float | None,
        describe: Callable[[], str] | None,
        failure: Callable[[], BaseException | None] | None,
    ) -> None:
        self.beat = 0
        self.hang_timeout, self.describe, self.failure = hang_timeout, describe, failure
        self.rank, self.world_size = get_rank(), get_world_size()
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.error: BaseException | None = None  # that this rank has reported
        self.reported_at = 0.0
        self.n_places = 0  # to which this rank has come, see come_to
        self.awaited = ""  # where it waits for the others
        self.stops: StopTogether | None = None  # answered by the watcher for the main thread, if there is one

    def start(self) -> None:
        global _n_guards
        _n_guards += 1
        for_watcher, own = (
            Board(dist.PrefixStore(f"guard/{_n_guards}", store), self.rank, self.world_size)
            for store in cloned_stores()
        )
        self.board, self.watcher = own, Watcher(self, for_watcher)
        if parent_is_torchrun():
            die_with_parent(os.getppid())  # if killed, it would leave its ranks behind
        describe, self.describe = self.describe, lambda: "at its start"  # it may need what the block makes
        for_watcher.show_life(self.watcher.life())
        own.join_machine(self.watcher.machine)
        self.describe = describe
        self.watcher.thread.start()
        atexit.register(self.at_exit)

    def leave(self) -> None:
        """Wait, still guarded, until all ranks have come to the end of the block; then none has to be waited for."""
        with suppress(dist.DistError, RuntimeError):  # the rank that holds the store has seen all others, and has left
            self.board.count_done()
            self.board.wait_until_all_done()
        self.stop()

    def come_to(self, place: str, *, wait: bool = False) -> None:
        """Check that all ranks come to the same places, in the same order. Costs a request or two to the store.

        Args:
            place: what happens here, in words.
            wait: whether to wait until all are there, before collectives that would meet those of another place.

        Raises:
            RuntimeError: on a rank that comes to another place than the first rank there.
        """
        if _active is not self:
            return
        number, self.n_places = self.n_places, self.n_places + 1
        rank, first = self.board.first_at(number, place)
        if first != place:
            raise RuntimeError(
                f"rank {rank} has come to {first}, and rank {self.rank} to {place}: {BY_ALL}, and show its result "
                f"there."
            )
        if not wait:
            return
        self.board.count_at(number)
        self.awaited = place
        self.board.wait_for_all_at(number)
        self.awaited = ""

    def fail(self, error: BaseException) -> None:
        """Report an error before it leaves the block. If it only shows that another rank is gone, wait for that one's
        reason.
        """
        lost = is_lost_connection(error)
        try:
            if self.error is None and lost:
                self.board.note_lost_connection()
                if self.another_failed(SILENT):
                    self.watcher.thread.join()  # which ends the process
            self.report(error)
        except (dist.DistError, RuntimeError):
            if lost:
                self.watcher.thread.join()  # which ends the process too: the store is gone

    def report(self, error: BaseException) -> None:
        """Report to the other ranks that this one fails, before its clean-up that may hang.

        Args:
            error: the reason; of several reports the first one counts.
        """
        if self.world_size == 1 or not self.reports_first(error):
            return
        note_failure(error)
        life = self.watcher.life()
        reason = f"rank {self.rank} failed: {one_line(error)}{self.place()}"
        self.board.accuse(Culprit(self.rank, reason, pid=life.pid, machine=life.machine))
        self.board.count_failure()
        deadline = time.monotonic() + SEEN
        while time.monotonic() < deadline and not self.board.all_failed():
            if self.board.others_have_seen():
                return
            time.sleep(0.02)

    def reports_first(self, error: BaseException) -> bool:
        with self.lock:
            if self.error is not None:
                return False
            self.error, self.reported_at = error, time.monotonic()
        return True

    def another_failed(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.board.has_culprit():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return self.board.culprit().rank != self.rank

    def stand_down(self) -> None:
        atexit.unregister(self.at_exit)
        self.stopping.set()

    def stop(self) -> None:
        self.stand_down()
        self.watcher.thread.join()
        self.watcher.watchdog.join()

    def at_exit(self) -> None:
        """A thread that is inside the store when the interpreter ends aborts the process (torch 2.15: exit code
        134).
        """
        self.stopping.set()
        self.watcher.thread.join(2.0)
        if self.error is not None and sys.platform != "win32":
            # The rest of the clean-up must end too, and no thread can end it any more. A rank that is late here, on a
            # busy machine, still has the time to exit with its own code, 1.
            left = CLEAN_UP_GRACE - (time.monotonic() - self.reported_at)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(EXIT_GRACE, left))

    def stop_together(self) -> StopTogether:
        """For a loop that one rank may want to leave: see StopTogether. Replaces an earlier one."""
        self.stops = StopTogether(self.board.store, self.rank, self.world_size)
        return self.stops

    def stage(self) -> str:
        """Where this rank is, in words."""
        waits = f"waiting for all ranks to come to {self.awaited}; {BY_ALL}" if self.awaited else ""
        try:
            described = self.describe() if self.describe is not None else ""
        except Exception as error:
            described = f"(describe failed: {one_line(error)})"  # its errors must not end the guard
        return ", ".join(filter(None, (described, waits)))

    def place(self) -> str:
        stage = self.stage()
        return f" ({stage})" if stage else ""
