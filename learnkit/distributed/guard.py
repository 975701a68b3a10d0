# pyright: reportPrivateImportUsage=false
"""When one rank fails, dies or hangs, all end within seconds, and the culprit is named.

A rank in a collective cannot be reached: torch neither interrupts it nor notices, for up to half an hour, that another
rank raised an error and will never come. So each rank has a thread that looks into the store that the ranks share:

    a rank raises         it writes the reason under one key, which the first writer wins, and waits until the others
    have
                          seen it; then its error goes its way, and its traceback comes last
    the others            say in one line why they end, and end a little later, so that launchers meet the culprit first
    stuck clean-up        a rank that has failed and is still there after GRACE seconds is ended by its own thread
    killed, os._exit      noticed by the threads on the same machine; from another one by a lost connection and no signs
                          of life
    frozen                each thread writes a sign of life; one that does not change for hang_timeout is a frozen
                          rank's
    hanging               no rank has got on for hang_timeout: every thread shows where its process is

Measured with 2 ranks on 2 cores (torch 2.15, gloo): see tests/distributed/test_guard.py, which holds each under 10 s.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from learnkit.distributed.process import (
    die_with_parent,
    discard_failure,
    full_traceback,
    is_alive,
    is_lost_connection,
    machine_id,
    note_failure,
    one_line,
    parent_is_torchrun,
    record_failure,
    stack_of,
)
from learnkit.distributed.reduce import wait_for_key
from learnkit.distributed.stop import StopTogether
from learnkit.distributed.world import agent_serves, get_rank, get_world_size, has_group

# seconds between two looks into the store, of up to MANY ranks; then more, up to FEWER times, as one process serves it
POLL = 0.2
MANY, FEWER = 256, 4
LIFE = 0.5  # seconds between two signs of life
MISSED = (
    4  # signs of life that a rank has left out when it is taken for gone, where nobody gets on or a connection is lost
)
SEEN = 0.7  # seconds that a failing rank waits until the others have seen why
LINGER = 1.5  # seconds that the others stay, so that the launcher meets the culprit first (torchrun polls every 0.1 s)
SHOWN = 1.0  # seconds after which a failed rank that is still there shows its traceback
CLEAN_UP_GRACE = 5.0  # seconds that a failed rank has for its clean-up
# seconds in which another rank's death must be found to explain a lost connection: MISSED * LIFE, and two looks
SILENT = 4.0

TORCH, HERE = (os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
WAITS = (
    TORCH + "distributed",
    os.path.join(TORCH, "nn", "parallel"),
    TORCH + "autograd",
    HERE + "reduce",
)  # DDP's backward too

BY_ALL = "what one rank calls all have to call: take it out of `if is_main():`"

_n_guards = 0  # the same on every rank
_active: Guard | None = None
_clones: tuple[weakref.ref[Any], dist.Store, dist.Store] | None = None  # of the group's store: one a thread


@contextmanager
def guard(
    *,
    hang_timeout: float | None = 600.0,
    describe: Callable[[], str] | None = None,
    failure: Callable[[], BaseException | None] | None = None,
) -> Iterator[Guard]:
    """Within the block, a rank that fails, dies or hangs ends all of them, with its reason told. Nothing in a world of
    one.

        with guard(hang_timeout=600, describe=lambda: f"epoch {epoch}, batch {i}") as g:
            for i, batch in enumerate(loader):
                train(batch)
                g.beat += 1

    `hang_timeout`: seconds without any progress after which all end; None: never. Progress is a change of `g.beat`, a
    plain number that costs nothing to count, or of what `describe` says. `failure` gives the error that is on its way
    out, if any, so that the others hear of it before a clean-up that may hang; `g.report(error)` does the same. Both
    functions are called from another thread. All ranks must enter, and leave together: the block ends when all ranks
    have. A guard within a guard is the outer one.
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
    """What `guard` gives: `beat`, to be counted up, and `report`.

    >>> with guard() as g:
    ...     for _ in range(3): g.beat += 1
    >>> g.beat
    3
    """

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
        self.error: BaseException | None = None  # that this rank reported
        self.reported_at = 0.0
        self.reacting = False  # to another rank's end
        self.connection_lost = False  # as rank 0 knows, some rank's to another one
        self.progress, self.last_progress, self.progress_at = 0, "", 0.0
        self.clock = Clock()
        self.peers: dict[int, Peer] = {}  # rank 0's are all, another's rank 0 and those of its machine
        self.met = False  # whether all have come
        self.n_places = 0  # to which this rank has come, see come_to
        self.awaited = ""  # where it waits for the others
        self.own_machine = f"machine/{machine_id()}"  # the key under which its ranks are
        self.stops: StopTogether | None = None  # answered for the main thread, where there is one

    # --- main thread ---------------------------------------------------------
    def start(self) -> None:
        global _n_guards
        _n_guards += 1
        keys = f"guard/{_n_guards}"
        self.store, self.own_store = (dist.PrefixStore(keys, store) for store in cloned_stores())
        if parent_is_torchrun():
            die_with_parent(os.getppid())  # killed, it would leave its ranks behind
        describe, self.describe = self.describe, lambda: "at its start"  # it may speak of what the block makes
        self.show_life()
        # torch's stubs lack it
        self.own_store.append(self.own_machine, f"{self.rank} ")  # pyright: ignore[reportAttributeAccessIssue]
        self.describe = describe
        self.thread = threading.Thread(target=self.watch, name="guard", daemon=True)
        self.watchdog = threading.Thread(target=self.watch_looks, name="guard of the guard", daemon=True)
        self.thread.start()
        atexit.register(self.at_exit)

    def leave(self) -> None:
        """Waits, under guard, until all ranks have come so far; then there is nobody left to wait for."""
        with suppress(dist.DistError, RuntimeError):  # who holds the store has seen all others, and is gone
            if self.own_store.add("n_done", 1) == self.world_size:
                self.own_store.set("all_done", "")
            pause = 1e-3
            while not self.own_store.check(["all_done"]):
                time.sleep(pause)
                pause = min(pause * 1.5, 0.05)
        self.stop()

    def come_to(self, place: str, *, wait: bool = False) -> None:
        """All ranks come to the same places, in the same order; raises RuntimeError on one that comes to another than
        the first there.

        `wait`: until all are there, before collectives that would meet those of another place. Costs a request or two
        to the store.
        """
        if _active is not self:
            return
        key, self.n_places = f"place/{self.n_places}", self.n_places + 1
        rank, _, first = self.own_store.compare_set(key, "", f"{self.rank} {place}").decode().partition(" ")
        if first != place:
            raise RuntimeError(
                f"rank {rank} has come to {first}, and rank {self.rank} to {place}: {BY_ALL}, and show its result "
                f"there."
            )
        if not wait:
            return
        if self.own_store.add(f"{key}/n", 1) == self.world_size:
            self.own_store.set(f"{key}/all", "")
        self.awaited = place
        wait_for_key(self.own_store, f"{key}/all")
        self.awaited = ""

    def fail(self, error: BaseException) -> None:
        """Before this rank's error goes its way. One that only says that another rank is gone waits for that one's
        reason.
        """
        lost = is_lost_connection(error)
        try:
            if self.error is None and lost:
                self.own_store.set("lost", "")
                if self.another_failed(SILENT):
                    self.thread.join()  # which ends the process
            self.report(error)
        except (dist.DistError, RuntimeError):
            if lost:
                self.thread.join()  # which ends the process too: the store is gone

    def report(self, error: BaseException) -> None:
        """Tells the other ranks that this one fails, before its clean-up; the first report counts."""
        if self.world_size == 1 or not self.reports_first(error):
            return
        note_failure(error)
        self.accuse(self.rank, f"rank {self.rank} failed: {one_line(error)}{self.place()}", self.own_store)
        self.own_store.add("n_failed", 1)
        deadline = time.monotonic() + SEEN
        while time.monotonic() < deadline and not self.all_failed(self.own_store):
            if self.own_store.add("n_seen", 0) == self.world_size - 1:
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
        while not self.own_store.check(["culprit"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return json.loads(self.own_store.get("culprit"))["rank"] != self.rank

    def all_failed(self, store: dist.Store) -> bool:
        with suppress(dist.DistError, RuntimeError):
            return store.add("n_failed", 0) == self.world_size
        return False

    def stand_down(self) -> None:
        atexit.unregister(self.at_exit)
        self.stopping.set()

    def stop(self) -> None:
        self.stand_down()
        self.thread.join()
        self.watchdog.join()

    def at_exit(self) -> None:
        """A thread that is inside the store when the interpreter ends aborts the process (torch 2.15: exit code
        134).
        """
        self.stopping.set()
        self.thread.join(2.0)
        if (
            self.error is not None and sys.platform != "win32"
        ):  # what is left of the clean-up must end too: no thread can see to it any more
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, max(0.1, CLEAN_UP_GRACE - (time.monotonic() - self.reported_at)))

    def stop_together(self) -> StopTogether:
        """For a loop that one rank may want to leave: see StopTogether. None other is answered any more."""
        self.stops = StopTogether(self.own_store, self.rank, self.world_size)
        return self.stops

    # --- guard's thread ------------------------------------------------------
    def watch(self) -> None:
        """Looks again and again; another thread watches that a look does not take for ever."""
        self.watchdog.start()
        try:
            while not self.stopping.wait(pause_between_looks(self.world_size)):
                self.look()
        except (dist.DistError, RuntimeError) as error:
            if not self.stopping.is_set() and self.error is None:
                self.lost_store(error)
        except Exception:  # our own mistake: a training must not die of it, nor a rank survive because of it
            self.say(f"the guard of rank {self.rank} failed, and guards no longer:\n{traceback.format_exc()}")
            if self.reacting and self.error is None:
                self.end()
        self.look_after_clean_up()

    def look(self) -> None:
        self.clock.tick()
        error = self.failure() if self.failure is not None else None
        if error is not None and not is_lost_connection(error):
            self.report(error)  # else it may be another's: see `fail`
        if self.stops is not None:
            self.stops.look(self.store)
        if self.store.check(["culprit"]):
            self.react(json.loads(self.store.get("culprit")))
        elif self.clock.passed(LIFE):
            self.show_life()
            if not self.store.check(["all_done"]):
                self.look_at_others()

    def react(self, culprit: dict[str, Any]) -> None:
        """Someone failed. If it was not this rank, say so, and end it a little later."""
        self.reacting = True
        if self.error is None:
            self.say(f"rank {self.rank} of {self.world_size} ends: {culprit['reason']}")
            if culprit["show_stacks"]:
                self.show_stacks()
            self.note(culprit["reason"], culprit["rank"])
            self.store.add("n_seen", 1)
            self.linger(culprit)
            if self.error is None:
                self.end()
            discard_failure()  # it has failed itself, and may catch its error and go on
        self.look_after_clean_up()

    def linger(self, culprit: dict[str, Any]) -> None:
        """Until the culprit is gone, if that can be seen from here, and a little longer."""
        pid = culprit["pid"] if culprit["machine"] == machine_id() and culprit["rank"] != self.rank else None
        if culprit["frozen"] and pid:
            kill(pid)
        start = time.monotonic()

        def passed() -> float:
            return time.monotonic() - start

        while pid and passed() < CLEAN_UP_GRACE and is_alive(pid):
            time.sleep(0.05)
        if culprit["show_stacks"] and pid:
            kill(pid)  # one that hung was to end itself; it is frozen now
        while passed() < LINGER and self.error is None:
            time.sleep(0.05)

    def look_after_clean_up(self) -> None:
        """This rank has failed: it may clean up, but not for ever. If all have failed, nobody waits for anybody."""
        shown = False
        while self.error is not None and not self.stopping.wait(0.1):
            if self.all_failed(self.store):
                return self.stand_down()
            waited = time.monotonic() - self.reported_at
            if waited > SHOWN and not shown:
                shown = True
                self.say(f"rank {self.rank} failed, and still cleans up\n{full_traceback(self.error)}")
            if waited > CLEAN_UP_GRACE:
                self.show_stacks()
                self.say(f"rank {self.rank} failed, and its clean-up did not end\n{full_traceback(self.error)}")
                os._exit(1)

    def look_at_others(self) -> None:
        """Rank 0 looks at all, the others at rank 0 and at their own machine: no more than the store can bear."""
        if not self.met:
            self.meet()
        self.connection_lost = self.connection_lost or (self.rank == 0 and self.store.check(["lost"]))
        lives = self.lives_of(rank for rank in self.peers if self.rank == 0 or rank == 0)
        for rank, peer in self.peers.items():
            if peer.is_local:
                self.look_for_death(rank, peer)
            if rank in lives:
                self.look_for_life(rank, peer, lives[rank])
        if self.rank == 0 and self.met:
            self.look_for_progress()

    def meet(self) -> None:
        """Who has come so far, until all have, which rank 0 sees. The others read of none but it and their own machine:
        w ranks that read w signs of life would ask one store for w².
        """
        met = self.store.check(["met"] if self.rank else self.keys_of_lives(range(self.world_size)))
        if met and self.rank == 0:
            self.store.set("met", "")
        if not met and self.too_long(0.0):
            self.accuse_missing()
        come = range(self.world_size) if met and self.rank == 0 else map(int, self.store.get(self.own_machine).split())
        leader = [0] if self.store.check(self.keys_of_lives([0])) else []
        lives = self.lives_of({*leader, *come} - {self.rank, *self.peers})
        self.peers |= {rank: Peer(life, self.clock.now, self.clock.now) for rank, life in lives.items()}
        self.met = met

    def accuse_missing(self) -> None:
        missing = [rank for rank in range(self.world_size) if not self.store.check(self.keys_of_lives([rank]))]
        if missing:
            self.accuse(
                missing[0],
                f"ranks {missing} did not come within {self.hang_timeout:g} s{self.place()}",
                show_stacks=True,
            )

    def lives_of(self, ranks: Iterable[int]) -> dict[int, dict[str, Any]]:
        """The last signs of life of ranks that have come, by one request."""
        keys = self.keys_of_lives(asked := sorted(ranks))
        return dict(zip(asked, map(json.loads, self.store.multi_get(keys) if keys else []), strict=True))

    def keys_of_lives(self, ranks: Iterable[int]) -> list[str]:
        return [f"life/{rank}" for rank in ranks]

    def look_for_death(self, rank: int, peer: Peer) -> None:
        pid = peer.life["pid"]
        if is_alive(pid) or self.store.check(["all_done"]):
            return
        self.accuse(
            rank, f"rank {rank} is gone: its process {pid} was killed, or left by os._exit{in_stage(peer.life)}"
        )

    def look_for_life(self, rank: int, peer: Peer, life: dict[str, Any]) -> None:
        now = self.clock.now
        if life["tick"] != peer.life["tick"]:
            peer.seen_at = now
        if life["progress"] != peer.life["progress"]:
            peer.progress_at = now
        peer.life = life
        if self.too_long(peer.seen_at) or (self.connection_lost and self.is_silent(peer)):
            self.accuse_frozen(rank, peer)

    def is_silent(self, peer: Peer) -> bool:
        return self.clock.now - peer.seen_at > MISSED * LIFE

    def accuse_frozen(self, rank: int, peer: Peer) -> None:
        state, seconds = "frozen" if peer.is_local else "gone, frozen or out of reach", self.clock.now - peer.seen_at
        reason = f"rank {rank} is {state}{in_stage(peer.life)}: no sign of life for {seconds:.1f} s"
        self.accuse(rank, reason, frozen=True, show_stacks=True)

    def look_for_progress(self) -> None:
        """Rank 0 alone decides that nothing moves: a rank may well wait for another one that does."""
        own = Peer(self.life(), self.clock.now, self.progress_at)
        everyone = {self.rank: own, **self.peers}
        if not self.too_long(max(peer.progress_at for peer in everyone.values())):
            return
        for rank, peer in self.peers.items():  # frozen after its last step, but not for so long
            if self.is_silent(peer):
                return self.accuse_frozen(rank, peer)
        absent = [rank for rank, peer in everyone.items() if not peer.life["in_collective"]]
        rank = min(absent or everyone, key=lambda r: everyone[r].progress_at)
        others = f"; all others wait for rank {rank}" if absent == [rank] else ""
        places = "".join(
            f"\n  rank {r}{in_stage(peer.life)}: {peer.life['at']}" for r, peer in sorted(everyone.items())
        )
        self.accuse(rank, f"no rank has got on for {self.hang_timeout:g} s{others}{places}", show_stacks=True)

    def too_long(self, since: float) -> bool:
        return self.hang_timeout is not None and self.clock.now - since > self.hang_timeout

    # --- what is told --------------------------------------------------------
    def show_life(self) -> None:
        self.store.set(f"life/{self.rank}", json.dumps(self.life()))

    def life(self) -> dict[str, Any]:
        """Written every LIFE seconds. `tick` says that the thread runs, `progress` that the main thread got on."""
        stage = self.stage()
        if (now := f"{self.beat} {stage}") != self.last_progress:
            self.last_progress, self.progress, self.progress_at = now, self.progress + 1, self.clock.now
        at, in_collective = where_main_is()
        return {
            "tick": self.clock.n_ticks,
            "progress": self.progress,
            "stage": stage,
            "at": at,
            "in_collective": in_collective,
            "pid": os.getpid(),
            "machine": machine_id(),
        }

    def stage(self) -> str:
        waits = f"waiting for all ranks to come to {self.awaited}; {BY_ALL}" if self.awaited else ""
        try:
            described = self.describe() if self.describe is not None else ""
        except Exception as error:
            described = f"(describe failed: {one_line(error)})"  # it must not bring the guard down
        return ", ".join(filter(None, (described, waits)))

    def place(self) -> str:
        stage = self.stage()
        return f" ({stage})" if stage else ""

    def accuse(
        self,
        rank: int,
        reason: str,
        store: dist.Store | None = None,
        *,
        frozen: bool = False,
        show_stacks: bool = False,
    ) -> None:
        """Names the culprit; the first one named counts."""
        nowhere = {"pid": None, "machine": None}  # a rank that never came
        life = self.life() if rank == self.rank else self.peers[rank].life if rank in self.peers else nowhere
        note = {
            "rank": rank,
            "reason": reason,
            "frozen": frozen,
            "show_stacks": show_stacks,
            "pid": life["pid"],
            "machine": life["machine"],
        }
        (store or self.store).compare_set("culprit", "", json.dumps(note))

    def say(self, text: str) -> None:
        """Straight to standard error: the main thread may hold the stream's lock, for ever."""
        os.write(2, f"[learnkit] {text}\n".encode())

    def show_stacks(self) -> None:
        """Where every thread of this process is, the guard's own left out, the main one last."""
        main = threading.main_thread()
        for thread in (*(t for t in threading.enumerate() if t not in (self.thread, self.watchdog, main)), main):
            name = "" if thread is main else f", thread {thread.name},"
            if stack := stack_of(thread):
                self.say(f"rank {self.rank}{self.place()}{name} is here:\n{stack}")

    # --- the en --------------------------------------------------------------
    def note(self, reason: str, culprit: int | None = None) -> None:
        """For the launcher, dated later than a culprit's own."""
        record_failure(reason, "", dragged_along=culprit != self.rank, delay=LINGER)

    def end(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(1)

    def lost_store(self, error: BaseException) -> None:
        if self.stopping.wait(0.4):
            return  # all ranks are through, and the first one has left already
        holder, reason = (
            self.peers.get(0),
            f"the store that the ranks share is gone, and the launcher with it ({one_line(error)})",
        )
        if not agent_serves():
            reason = "rank 0 is gone, and with it the store that the ranks share"
        if holder is not None and not agent_serves():
            reason += in_stage(holder.life)
        self.say(f"rank {self.rank} of {self.world_size} ends: {reason}")
        self.note(reason)
        time.sleep(LINGER)
        self.end()

    def watch_looks(self) -> None:
        """Where rank 0 serves the store itself and is frozen, a look into the store never comes back."""
        clock, n_looks, since = Clock(), -1, 0.0
        while (
            self.hang_timeout is not None and not self.stopping.wait(LIFE) and self.error is None and not self.reacting
        ):
            clock.tick()
            if self.clock.n_ticks != n_looks:
                n_looks, since = self.clock.n_ticks, clock.now
            elif clock.now - since > self.hang_timeout + 2 * LIFE:
                self.silent_store()

    def silent_store(self) -> None:
        holder = (
            "the launcher" if agent_serves() else f"rank 0{in_stage(self.peers[0].life) if 0 in self.peers else ''}"
        )
        reason = f"the store that the ranks share has not answered for {self.hang_timeout:g} s; it is held by {holder}"
        self.say(f"rank {self.rank} of {self.world_size} ends: {reason}")
        self.show_stacks()
        self.note(reason)
        if not agent_serves() and 0 in self.peers and self.peers[0].is_local:
            kill(self.peers[0].life["pid"])
        self.end()


@dataclass
class Peer:
    """Another rank, as this one sees it. Times are this guard's clock's."""

    life: dict[str, Any]
    seen_at: float
    progress_at: float

    @property
    def is_local(self) -> bool:
        return self.life["machine"] == machine_id()


class Clock:
    """Seconds during which this thread was awake: while the process is suspended, or another thread holds the
    interpreter, it sees nothing of the others, and must not take that for their silence."""

    def __init__(self) -> None:
        self.now, self.n_ticks, self.last, self.due = 0.0, 0, time.monotonic(), 0.0

    def tick(self) -> None:
        at = time.monotonic()
        self.now, self.last, self.n_ticks = self.now + min(at - self.last, 1.0), at, self.n_ticks + 1

    def passed(self, seconds: float) -> bool:
        """Whether `seconds` have passed since it last said so."""
        if self.now < self.due:
            return False
        self.due = self.now + seconds
        return True


def pause_between_looks(world_size: int) -> float:
    """Seconds. 1,024 ranks ask the store no more often than 256, and two signs of life still come within MISSED *
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


def in_stage(life: dict[str, Any]) -> str:
    return f" ({life['stage']})" if life["stage"] else ""


def kill(pid: int) -> None:
    """A frozen rank cannot end itself, and launchers wait long before they do it."""
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def cloned_stores() -> tuple[dist.Store, dist.Store]:
    """Connections of their own to the group's store, for two threads, made once a group."""
    global _clones
    group: Any = dist.group.WORLD
    if _clones is None or _clones[0]() is not group:
        store = dist.distributed_c10d._get_default_store()
        _clones = weakref.ref(group), store.clone(), store.clone()
    return _clones[1:]
