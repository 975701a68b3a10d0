"""Checkpoints of the whole state of a fit, from which `fit(…, resume=True)` resumes as if it had never stopped."""

from __future__ import annotations

import math
import secrets
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from learnkit.callbacks.distributed import Distributed
from learnkit.checkpoint.files import as_path, clean, explained_os_error
from learnkit.checkpoint.resume import (
    begin_at,
    check_fits,
    order_states,
    place_of,
    restore_training,
    training_state,
    with_own_copies,
)
from learnkit.checkpoint.sharded import begin_sharded, check_safetensors, filled_parts, is_apart, is_spread
from learnkit.checkpoint.snapshot import (
    copied_to_host,
    newest_snapshot,
    next_name,
    remove_snapshot,
    snapshots_of_run,
    write_snapshot,
)
from learnkit.checkpoint.weights import snapshot_from_main
from learnkit.data.loaders import n_batches
from learnkit.devices.transfer import Enqueued
from learnkit.distributed.request import SAVE, Request
from learnkit.hooks import Callback, ControlFlow, Deferred, Interrupted, Run, SkipBatch, StopBatch, StopEpoch, StopFit
from learnkit.learner import Learner
from learnkit.optim.groups import has_modes

STOPPING = [s for s in (getattr(signal, name, None) for name in ("SIGTERM", "SIGINT")) if s is not None]
SAVING = getattr(signal, "SIGUSR1", None)


class Checkpoint(Callback):
    """Save checkpoints of a fit in a folder; `learn.fit(…, resume=True)` resumes from the newest complete one, bit for
    bit.

    SIGTERM and SIGINT (Ctrl-C) end the fit on all ranks after the current batch, or after the current validation, save
    a checkpoint, and exit with code 143 or 130; a second signal ends the process at once. SIGUSR1 saves a checkpoint,
    and the fit continues.

    Args:
        dir: the folder; on several ranks it is rank 0's, and only rank 0 writes and reads.
        every_n_steps: save also after every n-th optimizer step, within epochs, too. None: only by `every_n_epochs`.
        every_n_epochs: save after every n-th epoch, and at the end of the fit. None: only at the end.
        keep: how many checkpoints of this fit are kept. The checkpoint that the fit resumed from is removed once a
            newer one is durable.
        async_write: write in a thread, from a copy in memory, whose memory is used again for the next checkpoint.
            Errors are raised at the next save or at the end of the fit.
        sharded: for a model sharded by `to_fsdp`: each rank writes and reads its own shard of weights and optimizer
            state, in safetensors files, so that no process ever holds the whole model. All ranks must be able to access
            `dir`. Any number of ranks can resume from it, sharded or not. Cannot be combined with `async_write`. For a
            model that is not sharded it changes nothing.

    Raises:
        ValueError: when a number is not a whole number of 1 or more, or `sharded` is combined with `async_write`.
        OSError: before the first step, when the folder cannot be written to.

    Example:
        >>> learn = Learner(data, model, callbacks=[Checkpoint("checkpoints")])  # doctest: +SKIP
        >>> learn.fit_one_cycle(10, resume=True)  # doctest: +SKIP
    """

    order = Distributed.order - 10
    unique = True
    restores = True
    in_trials = False

    def __init__(
        self,
        dir: str | Path,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        keep: int = 2,
        async_write: bool = False,
        sharded: bool = False,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs), ("keep", keep)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more.")
        self.dir, self.every_n_steps, self.every_n_epochs, self.keep = as_path(dir), every_n_steps, every_n_epochs, keep
        if sharded and async_write:
            raise ValueError(
                "sharded=True cannot be combined with async_write=True: all ranks write at the same time and "
                "communicate while they write, which training would disturb. Use only one of them."
            )
        if sharded:
            check_safetensors()
        self.async_write, self.sharded = async_write, sharded
        self.run = ""  # identifies a fit, over all its interruptions
        self.written: list[Path] = []  # checkpoints of this run, oldest first
        self.parts: dict[str, Any] | None = None  # the state that this fit resumes from, until it is restored
        self.apart: Path | None = None  # folder of the sharded tensors, of which `parts` has only the shapes
        self.order_states: list[Any] = []  # states of the loaders' own generators at the start of the epoch
        self.saved_at: tuple[int, ...] = ()  # epoch, step and items of the last save
        self.writer: ThreadPoolExecutor | None = None
        self.writing: Future[None] | None = None
        self.copy: Any = None  # host copy that async_write writes or has written
        self.copied = threading.Event()  # set while the training state may change: no copy of it is being made
        self.copied.set()

    # --- a fit ---------------------------------------------------------------
    def around_fit(self, learn: Learner, run: Run) -> None:
        self.run, self.written, self.parts, self.apart, self.saved_at = secrets.token_hex(8), [], None, None, ()
        learn.ranks.on_main(self.prepare, f"write checkpoints to {self.dir}")
        if learn.resume:
            self.find(learn)
        learn.runs[learn.n_fits] = self.run
        stop = Deferred(StopFit)
        with handlers(learn):
            try:
                with stop:
                    run()
            except BaseException:
                self.wait_for_writer()  # until the current write has ended; an error of its own is not raised
                raise
            learn.ranks.on_main(self.end_writing, f"write a checkpoint to {self.dir}")
            # A signal may have arrived when the ranks agree on nothing any more: here all get to know it. Then rank 0,
            # which may hold the store, can exit.
            numbers = learn.ranks.gather(0 if learn.wanted is None else learn.wanted.number)
        if number := next(filter(None, numbers), 0):
            learn.agreed = Request("signal", number)
        if learn.agreed is not None and learn.agreed.kind == "signal":
            self.leave(learn, learn.agreed.number)
        stop.release()

    def prepare(self) -> None:
        """Check before training that the folder can be written to; remove unfinished files of killed processes."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.dir):
                pass
        except OSError as error:
            raise explained_os_error(error, self.dir, 0) from error
        clean(self.dir)

    def find(self, learn: Learner) -> None:
        """Find the checkpoint to resume from, if there is one."""
        found = snapshot_from_main(learn, lambda: self.read(learn.n_fits))
        if found is None:
            return
        name, parts, about, apart, is_over = found
        if not begin_at(learn, parts["run"]["place"], is_over=is_over):
            return
        self.parts, self.run, self.apart = parts, about["run"], self.dir / name if apart else None
        self.written = snapshots_of_run(self.dir, self.run, name)

    def read(self, n_fits: int) -> list[Any] | None:
        """Read the newest checkpoint, or, when that is of a later fit of the same script, the last one of the fit that
        begins now.
        """
        found = newest_snapshot(self.dir)
        if found is None:
            return None
        place = found[1]["run"]["place"]
        if place["fit"] > n_fits and (run := place.get("runs", {}).get(n_fits)) is not None:
            found = newest_snapshot(self.dir, run=run) or found
        return [found[0].name, *found[1:], is_apart(found[1]), place["fit"] > n_fits]

    def before_epoch(self, learn: Learner) -> None:
        self.put_back(learn)
        self.order_states = order_states(learn)

    def after_fit(self, learn: Learner) -> None:
        self.put_back(learn)  # a finished fit that is resumed runs no epoch

    def put_back(self, learn: Learner) -> None:
        """Restore the state, once, after before_fit of all callbacks, which clears the state of the fit before."""
        if self.parts is None:
            return
        parts, self.parts = self.parts, None
        if self.apart is not None:
            check_fits(learn, parts)
            parts = filled_parts(learn, parts, self.apart)
        restore_training(learn, self, parts)
        self.saved_at = learn.epoch, learn.step, learn.n_items_done

    # --- when ----------------------------------------------------------------
    def around_batch(self, learn: Learner, run: Run) -> None:
        """Save after the batch, when all ranks have agreed on what follows it. A batch that ends the training pass
        early is no reason to save: resumed from there, the pass would continue.
        """
        own: ControlFlow | None = None
        try:
            run()
        except (StopBatch, SkipBatch) as raised:
            own = raised
        if learn.training:
            if learn.world_size == 1 and learn.wanted is not None:
                learn.agreed, learn.wanted = learn.wanted, None
            n = self.every_n_steps
            # Save here when the pass ends early: afterwards weights that differ between ranks are averaged.
            if learn.agreed is not None or (n is not None and learn.step % n == 0 and not learn.n_held):
                self.save(learn)
            if learn.agreed == SAVE:
                learn.agreed = None
            elif learn.agreed is not None:
                raise Interrupted
        if own is not None:
            raise own

    def around_epoch(self, learn: Learner, run: Run) -> None:
        with Deferred(StopFit, StopEpoch) as deferred:
            run()
        stop = deferred.signal
        if learn.world_size == 1 and learn.wanted is not None:
            learn.agreed, learn.wanted = learn.wanted, None
        ends = isinstance(stop, StopFit) and not isinstance(stop, Interrupted)  # also when a signal has arrived, too
        if learn.training and isinstance(stop, StopFit):
            self.save(learn, over=ends)  # stopped within the training pass
        else:
            last = learn.epoch + 1 == learn.n_epochs or ends
            due = self.every_n_epochs is not None and (learn.epoch + 1) % self.every_n_epochs == 0
            if due or last or learn.agreed is not None:
                self.save(learn, epoch_over=True, over=last)
        if learn.agreed == SAVE:
            learn.agreed = None
        if isinstance(stop, StopFit):
            raise stop
        if learn.agreed is not None:
            raise Interrupted
        deferred.release()

    # --- saving --------------------------------------------------------------
    def save(self, learn: Learner, *, epoch_over: bool = False, over: bool = False) -> None:
        """Save a checkpoint. All ranks call this at the same step; rank 0 writes, and all ranks raise if it fails."""
        place = place_of(learn, epoch_over=epoch_over, over=over)
        now = place["epoch"], place["step"], place["items"]
        if now == self.saved_at and not over:
            return
        self.saved_at = now
        order = (
            order_states(learn) if epoch_over or over else self.order_states
        )  # of the next epoch, or of the current one
        parts = training_state(learn, self, place, order, gathered=not self.sharded)
        if self.async_write:
            parts = with_own_copies(learn, parts)
        about = {
            "run": self.run,
            "epoch": place["epoch"],
            "step": place["step"],
            "values": {name: str(value) for name, value in learn.values.items()},
        }
        apart = begin_sharded(learn, self.dir, parts, about) if self.sharded and is_spread(parts) else None
        learn.ranks.on_main(
            lambda: self.write(learn, parts, about) if apart is None else self.keep_newest(apart()),
            f"write a checkpoint to {self.dir}",
        )
        if over or may_change(learn):
            self.copied.wait()

    def write(self, learn: Learner, parts: dict[str, Any], about: dict[str, Any]) -> None:
        if not self.async_write:
            return self.write_now(parts, about)
        self.finish_writing()  # one at a time; raises the error of the last write
        if self.writer is None:
            self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.copied.clear()
        self.writing = self.writer.submit(self.copy_and_write, parts, about, Enqueued(learn.device))

    def copy_and_write(self, parts: dict[str, Any], about: dict[str, Any], steps: Enqueued) -> None:
        """Copy to the host and write, in the thread. A device copies on its copy stream, which waits for the `steps`
        that were enqueued before the save.
        """
        try:
            with steps.awaited():
                parts = self.copy = copied_to_host(parts, self.copy)
        finally:
            self.copied.set()
        self.write_now(parts, about)

    def before_step(self, learn: Learner) -> None:
        """Wait for the copy of the weights, which runs during the forward and backward passes after a save: the step
        changes them.
        """
        if not self.copied.is_set():
            self.copied.wait()

    def before_validate(self, learn: Learner) -> None:
        self.before_step(learn)  # for the validation, a callback may put other weights into the model

    def write_now(self, parts: dict[str, Any], about: dict[str, Any]) -> None:
        self.keep_newest(write_snapshot(self.dir, next_name(self.dir, about["step"]), parts, about))

    def keep_newest(self, path: Path) -> None:
        self.written.append(path)
        try:
            while len(self.written) > self.keep:
                remove_snapshot(self.written.pop(0))
        except OSError as error:
            raise explained_os_error(error, self.dir, 0) from error

    def finish_writing(self) -> None:
        """Wait for the thread's current write and raise its error, if there is one."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def end_writing(self) -> None:
        try:
            self.finish_writing()
        finally:
            self.wait_for_writer()

    def wait_for_writer(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.shutdown()
        self.copy = None

    # --- leaving -------------------------------------------------------------
    def leave(self, learn: Learner, number: int) -> None:
        if learn.rank == 0:
            print(
                f"stopped by {signal.Signals(number).name}; saved {self.written[-1]}, from which resume=True continues",
                file=sys.stderr,
            )
        raise SystemExit(128 + number)


def may_change(learn: Learner) -> bool:
    """Whether weights may change before the next step: at the end of a training pass, or always where the ranks'
    weights differ or the optimizer has modes.
    """
    if learn.ranks.apart or has_modes(learn.opt):
        return True
    n = n_batches(learn.dl) if learn.training else math.inf
    return n is None or learn.agreed is not None or learn.batch_index - learn.first_batch + 1 >= n


@contextmanager
def handlers(learn: Learner) -> Iterator[None]:
    """During a fit, let signals only record what is wanted. The user's own handler is called too, and restored at the
    end.
    """
    learn.wanted = learn.agreed = None
    if threading.current_thread() is not threading.main_thread():
        warnings.warn(
            "fit runs in a thread, where no signal can be handled: SIGTERM will end it without a checkpoint.",
            stacklevel=2,
        )
        yield
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        if number != SAVING:
            learn.wanted = Request("signal", number)
        elif learn.wanted is None:
            learn.wanted = SAVE
        if number != SAVING:
            signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        if before[number] not in (signal.SIG_DFL, signal.default_int_handler, None):
            before[number](number, frame)

    for number in filter(None, [*STOPPING, SAVING]):
        if signal.getsignal(number) == signal.SIG_IGN:
            continue
        before[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
