# pyright: reportPrivateImportUsage=false
"""What a guard's thread does: look into the store that the ranks share, name a culprit, and end this rank.

A second thread watches the first one, because a look into a store that does not answer never returns.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from learnkit.distributed.board import Board, Culprit, Life
from learnkit.distributed.process import (
    discard_failure,
    full_traceback,
    is_alive,
    is_lost_connection,
    machine_id,
    one_line,
    record_failure,
    stack_of,
)
from learnkit.distributed.world import agent_serves

if TYPE_CHECKING:
    from learnkit.distributed.guard import Guard

# seconds between two looks into the store, with up to MANY ranks; with more ranks, up to FEWER times as long, because
# one process serves the store
POLL = 0.2
MANY, FEWER = 256, 4
LIFE = 0.5  # seconds between two signs of life
# signs of life that a rank has missed when it counts as gone, where no rank gets on or a connection is lost
MISSED = 4
LINGER = 1.5  # seconds that the others stay, so that the launcher sees the culprit first (torchrun polls every 0.1 s)
SHOWN = 1.0  # seconds after which a failed rank that still runs shows its traceback
CLEAN_UP_GRACE = 5.0  # seconds that a failed rank has for its clean-up

TORCH, HERE = (os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
WAITS = (
    TORCH + "distributed",
    os.path.join(TORCH, "nn", "parallel"),
    TORCH + "autograd",
    HERE + "reduce",
)  # DDP's backward too


class Watcher:
    """The thread of a guard, and what it knows of the other ranks."""

    def __init__(self, guard: Guard, board: Board) -> None:
        self.guard, self.board = guard, board
        self.rank, self.world_size = guard.rank, guard.world_size
        self.hang_timeout = guard.hang_timeout
        self.machine = machine_id()
        self.clock = Clock()
        self.peers: dict[int, Peer] = {}  # on rank 0 all others; elsewhere rank 0 and the ranks of the same machine
        self.met = False  # whether all have come
        self.reacting = False  # to another rank's end
        self.connection_lost = False  # on rank 0: whether any rank has lost its connection to another one
        self.progress, self.last_progress, self.progress_at = 0, "", 0.0
        self.thread = threading.Thread(target=self.watch, name="guard", daemon=True)
        self.watchdog = threading.Thread(target=self.watch_looks, name="guard of the guard", daemon=True)

    # --- a look --------------------------------------------------------------
    def watch(self) -> None:
        """Look again and again; the watchdog sees to it that no look takes for ever."""
        guard = self.guard
        self.watchdog.start()
        try:
            while not guard.stopping.wait(pause_between_looks(self.world_size)):
                self.look()
        except (dist.DistError, RuntimeError) as error:
            if not guard.stopping.is_set() and guard.error is None:
                self.lost_store(error)
        except Exception:  # a mistake in this file: a training must not die of it, nor a rank survive because of it
            to_stderr(f"the guard of rank {self.rank} failed, and guards no longer:\n{traceback.format_exc()}")
            if self.reacting and guard.error is None:
                end()
        self.look_after_clean_up()

    def look(self) -> None:
        guard = self.guard
        self.clock.tick()
        error = guard.failure() if guard.failure is not None else None
        if error is not None and not is_lost_connection(error):
            guard.report(error)  # else it may be another rank's: see Guard.fail
        if guard.stops is not None:
            guard.stops.look(self.board.store)
        if self.board.has_culprit():
            self.react(self.board.culprit())
        elif self.clock.passed(LIFE):
            self.board.show_life(self.life())
            if not self.board.all_done():
                self.look_at_others()

    def life(self) -> Life:
        """This rank's sign of life, written every LIFE seconds."""
        stage = self.guard.stage()
        if (now := f"{self.guard.beat} {stage}") != self.last_progress:
            self.last_progress, self.progress, self.progress_at = now, self.progress + 1, self.clock.now
        at, in_collective = where_main_is()
        return Life(self.clock.n_ticks, self.progress, stage, at, in_collective, os.getpid(), machine_id())

    def look_at_others(self) -> None:
        """Rank 0 looks at all ranks, each other at rank 0 and its own machine: more would overload the store."""
        if not self.met:
            self.meet()
        self.connection_lost = self.connection_lost or (self.rank == 0 and self.board.connection_is_lost())
        lives = self.board.lives_of(rank for rank in self.peers if self.rank == 0 or rank == 0)
        for rank, peer in self.peers.items():
            if peer.is_local:
                self.look_for_death(rank, peer)
            if rank in lives:
                self.look_for_life(rank, peer, lives[rank])
        if self.rank == 0 and self.met:
            self.look_for_progress()

    def meet(self) -> None:
        """Find the ranks that have come so far, until rank 0 has seen all.

        Rank 0 reads all signs of life, each other rank those of rank 0 and its own machine: w ranks that read w signs
        of life each would make w² requests to one store.
        """
        met = self.board.all_met() if self.rank else self.board.have_come(range(self.world_size))
        if met and self.rank == 0:
            self.board.set_all_met()
        if not met and self.too_long(0.0):
            self.accuse_missing()
        come: Iterable[int] = (
            range(self.world_size) if met and self.rank == 0 else self.board.ranks_of_machine(self.machine)
        )
        leader = [0] if self.board.have_come([0]) else []
        lives = self.board.lives_of({*leader, *come} - {self.rank, *self.peers})
        self.peers |= {rank: Peer(life, self.clock.now, self.clock.now) for rank, life in lives.items()}
        self.met = met

    def look_for_death(self, rank: int, peer: Peer) -> None:
        pid = peer.life.pid
        if is_alive(pid) or self.board.all_done():
            return
        self.accuse(
            rank, f"rank {rank} is gone: its process {pid} was killed, or left by os._exit{peer.life.in_stage()}"
        )

    def look_for_life(self, rank: int, peer: Peer, life: Life) -> None:
        now = self.clock.now
        if life.tick != peer.life.tick:
            peer.seen_at = now
        if life.progress != peer.life.progress:
            peer.progress_at = now
        peer.life = life
        if self.too_long(peer.seen_at) or (self.connection_lost and self.is_silent(peer)):
            self.accuse_frozen(rank, peer)

    def look_for_progress(self) -> None:
        """Rank 0 alone decides that no rank gets on: a rank may wait for another one that does."""
        own = Peer(self.life(), self.clock.now, self.progress_at)
        everyone = {self.rank: own, **self.peers}
        if not self.too_long(max(peer.progress_at for peer in everyone.values())):
            return
        for rank, peer in self.peers.items():  # frozen after its last step, but not yet for hang_timeout
            if self.is_silent(peer):
                return self.accuse_frozen(rank, peer)
        absent = [rank for rank, peer in everyone.items() if not peer.life.in_collective]
        rank = min(absent or everyone, key=lambda r: everyone[r].progress_at)
        others = f"; all others wait for rank {rank}" if absent == [rank] else ""
        places = "".join(f"\n  rank {r}{peer.life.in_stage()}: {peer.life.at}" for r, peer in sorted(everyone.items()))
        self.accuse(rank, f"no rank has got on for {self.hang_timeout:g} s{others}{places}", show_stacks=True)

    def is_silent(self, peer: Peer) -> bool:
        return self.clock.now - peer.seen_at > MISSED * LIFE

    def too_long(self, since: float) -> bool:
        return self.hang_timeout is not None and self.clock.now - since > self.hang_timeout

    # --- naming the culprit --------------------------------------------------
    def accuse(self, rank: int, reason: str, *, frozen: bool = False, show_stacks: bool = False) -> None:
        life = self.life() if rank == self.rank else self.peers[rank].life if rank in self.peers else None
        pid, machine = (None, None) if life is None else (life.pid, life.machine)  # None: a rank that never came
        self.board.accuse(Culprit(rank, reason, frozen, show_stacks, pid, machine))

    def accuse_missing(self) -> None:
        missing = self.board.missing_ranks()
        if missing:
            reason = f"ranks {missing} did not come within {self.hang_timeout:g} s{self.guard.place()}"
            self.accuse(missing[0], reason, show_stacks=True)

    def accuse_frozen(self, rank: int, peer: Peer) -> None:
        state, seconds = "frozen" if peer.is_local else "gone, frozen or out of reach", self.clock.now - peer.seen_at
        reason = f"rank {rank} is {state}{peer.life.in_stage()}: no sign of life for {seconds:.1f} s"
        self.accuse(rank, reason, frozen=True, show_stacks=True)

    # --- the end -------------------------------------------------------------
    def react(self, culprit: Culprit) -> None:
        """A rank has failed. If it is another one, report that, and end this rank a little later."""
        self.reacting = True
        if self.guard.error is None:
            to_stderr(f"rank {self.rank} of {self.world_size} ends: {culprit.reason}")
            if culprit.show_stacks:
                self.show_stacks()
            self.note(culprit.reason, culprit.rank)
            self.board.note_seen()
            self.linger(culprit)
            if self.guard.error is None:
                end()
            discard_failure()  # this rank has failed too, and may catch its error and continue
        self.look_after_clean_up()

    def linger(self, culprit: Culprit) -> None:
        """Wait until the culprit is gone, if that can be seen from here, and a little longer."""
        pid = culprit.pid if culprit.machine == machine_id() and culprit.rank != self.rank else None
        if culprit.frozen and pid:
            kill(pid)
        start = time.monotonic()

        def passed() -> float:
            return time.monotonic() - start

        while pid and passed() < CLEAN_UP_GRACE and is_alive(pid):
            time.sleep(0.05)
        if culprit.show_stacks and pid:
            kill(pid)  # a hanging rank should have ended itself; it is frozen now
        while passed() < LINGER and self.guard.error is None:
            time.sleep(0.05)

    def look_after_clean_up(self) -> None:
        """After a failure of this rank, end its clean-up when it takes too long. If all ranks have failed, none waits
        for another.
        """
        guard, shown = self.guard, False
        while guard.error is not None and not guard.stopping.wait(0.1):
            if self.board.all_failed():
                return guard.stand_down()
            waited = time.monotonic() - guard.reported_at
            if waited > SHOWN and not shown:
                shown = True
                to_stderr(f"rank {self.rank} failed, and still cleans up\n{full_traceback(guard.error)}")
            if waited > CLEAN_UP_GRACE:
                self.show_stacks()
                to_stderr(f"rank {self.rank} failed, and its clean-up did not end\n{full_traceback(guard.error)}")
                os._exit(1)

    def lost_store(self, error: BaseException) -> None:
        if self.guard.stopping.wait(0.4):
            return  # all ranks are through, and the first one has left already
        reason = f"the store that the ranks share is gone, and the launcher with it ({one_line(error)})"
        if not agent_serves():
            reason = f"rank 0 is gone, and with it the store that the ranks share{self.stage_of_rank_0()}"
        to_stderr(f"rank {self.rank} of {self.world_size} ends: {reason}")
        self.note(reason)
        time.sleep(LINGER)
        end()

    def watch_looks(self) -> None:
        """In the second thread: where rank 0 serves the store and is frozen, a look into it never returns."""
        guard, clock, n_looks, since = self.guard, Clock(), -1, 0.0
        while (
            self.hang_timeout is not None
            and not guard.stopping.wait(LIFE)
            and guard.error is None
            and not self.reacting
        ):
            clock.tick()
            if self.clock.n_ticks != n_looks:
                n_looks, since = self.clock.n_ticks, clock.now
            elif clock.now - since > self.hang_timeout + 2 * LIFE:
                self.silent_store()

    def silent_store(self) -> None:
        holder = "the launcher" if agent_serves() else f"rank 0{self.stage_of_rank_0()}"
        reason = f"the store that the ranks share has not answered for {self.hang_timeout:g} s; it is held by {holder}"
        to_stderr(f"rank {self.rank} of {self.world_size} ends: {reason}")
        self.show_stacks()
        self.note(reason)
        if not agent_serves() and 0 in self.peers and self.peers[0].is_local:
            kill(self.peers[0].life.pid)
        end()

    def stage_of_rank_0(self) -> str:
        return self.peers[0].life.in_stage() if 0 in self.peers else ""

    def note(self, reason: str, culprit: int | None = None) -> None:
        """For the launcher, dated later than a culprit's own."""
        record_failure(reason, "", dragged_along=culprit != self.rank, delay=LINGER)

    def show_stacks(self) -> None:
        """Where every thread of this process is, except the guard's own, with the main thread last."""
        main = threading.main_thread()
        for thread in (*(t for t in threading.enumerate() if t not in (self.thread, self.watchdog, main)), main):
            name = "" if thread is main else f", thread {thread.name},"
            if stack := stack_of(thread):
                to_stderr(f"rank {self.rank}{self.guard.place()}{name} is here:\n{stack}")


@dataclass
class Peer:
    """Another rank, as this one sees it. Times are those of this guard's clock."""

    life: Life
    seen_at: float
    progress_at: float

    @property
    def is_local(self) -> bool:
        return self.life.machine == machine_id()


class Clock:
    """Seconds during which this thread was awake. While the process is suspended, or another thread holds the
    interpreter, it sees nothing of the others, and must not take that for their silence.
    """

    def __init__(self) -> None:
        self.now, self.n_ticks, self.last, self.due = 0.0, 0, time.monotonic(), 0.0

    def tick(self) -> None:
        at = time.monotonic()
        self.now, self.last, self.n_ticks = self.now + min(at - self.last, 1.0), at, self.n_ticks + 1

    def passed(self, seconds: float) -> bool:
        """Whether `seconds` have passed since this last returned True."""
        if self.now < self.due:
            return False
        self.due = self.now + seconds
        return True


def pause_between_looks(world_size: int) -> float:
    """Seconds. 1,024 ranks ask the store no more often than 256, and two signs of life still arrive within MISSED *
    LIFE.
    """
    return POLL * min(FEWER, max(1.0, world_size / MANY))


def where_main_is() -> tuple[str, bool]:
    """(the main thread's innermost place outside torch and this folder, whether it waits in a collective there)."""
    frame, waits = sys._current_frames().get(threading.main_thread().ident or -1), False
    while frame is not None and (name := frame.f_code.co_filename).startswith((TORCH, HERE)):
        waits = waits or name.startswith(WAITS)
        frame = frame.f_back
    return f"{frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?", waits


def to_stderr(text: str) -> None:
    """Write straight to standard error: the main thread may hold the stream's lock for ever."""
    os.write(2, f"[learnkit] {text}\n".encode())


def kill(pid: int) -> None:
    """A frozen rank cannot end itself, and launchers wait long before they do it."""
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def end() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(1)
