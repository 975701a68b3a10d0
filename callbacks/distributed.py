"""One Learner on many processes: the model is wrapped, the data sharded, and the results of all ranks combined."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from learnkit.callbacks.param_scheduler import ParamScheduler
from learnkit.callbacks.progress import Progress, tell_interval
from learnkit.data.loaders import in_order
from learnkit.distributed.compare import check_same
from learnkit.distributed.facts import checksum, facts, settings
from learnkit.distributed.guard import Guard, guard
from learnkit.distributed.reduce import agree_all, broadcast_from_main
from learnkit.distributed.replicas import Replicas, is_trained
from learnkit.distributed.request import Request, settle
from learnkit.distributed.share import NO_BATCH, evaluation_share, sizes, training_share
from learnkit.distributed.stop import StoppedAlone, StopTogether
from learnkit.hooks import (
    Callback,
    ControlFlow,
    Deferred,
    Interrupted,
    Run,
    Stop,
    StopEpoch,
    StopFit,
    StopTrain,
    add_note,
)
from learnkit.learner import Learner
from learnkit.loop.evaluate import Measure

TOO_EARLY = (
    "{name} was raised before the backward pass of this batch, by rank {rank} and not by all: the others wait in "
    "theirs. Raise it in after_step or after_batch, or on all ranks."
)
SEVERAL_BACKWARDS = (
    "learnkit: DDP allows one backward pass through each parameter in each step. For several, such as one for each "
    "loss, use learn.to_distributed(delay_allreduce=True)."
)
WITHIN_A_BATCH = (
    "Within a batch DDP does not notice it: do it between batches, as in before_epoch, before_train or after_step."
)
WEIGHTS = "the weights' checksum (something changes the weights on one rank alone, or a step was skipped there)"
STEPS_DONE = "the number of steps done (raise Stop* on one rank in after_step, after_batch or after_epoch, else on all)"


class Distributed(Callback):
    """Train on several processes. `learn.to_distributed()` adds it, if there is more than one process.

    During a fit the training batches go through DistributedDataParallel, and each rank's training loader is its part of
    the whole one; validate and get_preds shard their loaders too, without padding, and do not use DDP. Losses, metrics
    and predictions are those of all ranks. If one rank stops a stage, all stop it, after the same step. A guard ends
    all processes when one fails or hangs. Everything is undone after the fit.

    Args:
        replicas: whether this callback wraps the model; False: another callback combines the gradients.
        hang_timeout: as in `Learner.to_distributed`.
        seed: decides the order of evaluations where no other seed does; the same on all ranks.
        **options: `sync_bn` and the options of DistributedDataParallel, as in `Learner.to_distributed`.

    Raises:
        TypeError: for an unknown option.

    Example:
        >>> learn.to_distributed(sync_bn=True)  # doctest: +SKIP
    """

    order = -100
    unique = True

    def __init__(
        self, *, replicas: bool = True, hang_timeout: float | None = 600.0, seed: int = 0, **options: Any
    ) -> None:
        self.replicas = Replicas(**options) if replicas else None
        self.hang_timeout = hang_timeout
        self.seed = seed
        # In a fit:
        self.watch: Guard | None = None
        self.stops: StopTogether | None = None
        self.train_dl: Any = None  # the whole one; learn.data has this rank's share
        self.wish: Stop | None = None  # what this rank has raised in a batch, until all ranks agree
        self.stops_fit = False  # whether this rank has raised StopFit
        self.compared = False  # whether the ranks have compared their optimizers and schedules
        self.reduced = False  # whether this batch's backward pass has begun, in which ranks wait for each other
        self.size_of: Callable[[int], int] = int  # number of a batch in its pass -> samples of all ranks in it
        self.uneven_from = NO_BATCH  # number of the first batch whose shares may differ in size
        self.bar: Progress | None = None  # shows the loss of all ranks
        self.next_shown = NO_BATCH  # the batch after which it is summed over the ranks again

    # --- a fit ---------------------------------------------------------------
    def around_fit(self, learn: Learner, run: Run) -> None:
        whole, seed, n_of_all = learn.data, learn.order_seed, learn.n_of_all
        with self.guarded(learn) as watch:
            self.watch = watch
            watch.come_to("a fit")
            self.stops = watch.stop_together()
            self.stops_fit = self.compared = False
            self.train_dl = whole.train_dl
            try:
                learn.order_seed = broadcast_from_main(learn.order_seed)
                learn.data = copy.copy(whole)
                learn.data.train_dl = training_share(whole.train_dl, learn)
                learn.plan_steps()
                check_same(facts(learn))
                with self.replicas.wrapped(learn) if self.replicas is not None else nullcontext():
                    run()
            finally:
                learn.data, learn.order_seed, learn.n_of_all = whole, seed, n_of_all
                self.watch = self.stops = self.train_dl = None

    def around_epoch(self, learn: Learner, run: Run) -> None:
        """At the epoch's end, where all ranks meet, settle what is pending: of the stops, only StopFit still counts."""
        assert self.stops is not None
        if not self.compared:
            check_same({"the optimizer's settings": settings(learn), "the schedules": schedules(learn)})
        self.compared = True
        with Deferred() as deferred:
            run()
        signal = deferred.signal
        stops_fit = self.stops_fit or is_own_stop(signal)
        wanted, pending = learn.wanted, self.stops.under_way
        if self.watch is not None:
            self.watch.come_to(f"the end of epoch {learn.epoch}")
        same = {STEPS_DONE: learn.step, **({} if self.replicas is None else {WEIGHTS: checksum(learn)})}
        settled = settle(wanted, fit_ends=stops_fit, pending=pending, facts=same)
        if settled.pending:
            self.stops.end()
        if settled.request is not None:
            learn.agreed, learn.wanted = settled.request, None
        if settled.fit_ends and not is_own_stop(signal):
            raise StopFit
        if settled.request is not None and settled.request.kind == "signal" and signal is None:
            raise Interrupted
        deferred.release()

    def around_train(self, learn: Learner, run: Run) -> None:
        self.wish = None
        self.size_of, self.uneven_from = sizes(learn.dl)
        learn.n_of_all = partial(self.n_of_all, learn)
        self.bar = next((cb for cb in learn.running if isinstance(cb, Progress) and cb.shares), None)
        self.next_shown = NO_BATCH if self.bar is None else learn.first_batch + tell_interval(learn) - 1
        run()

    def around_batch(self, learn: Learner, run: Run) -> None:
        """Stop all ranks after the same batch: if one left the loop alone, the others would wait for it."""
        if not learn.training or self.stops is None:
            return run()
        self.reduced, raised = False, False
        own = self.replicas
        if own is not None and [*map(is_trained, own.parameters)] != own.trained:
            own.wrap_again(learn)
        uneven = learn.batch_index - learn.first_batch >= self.uneven_from and learn.whole is None
        # DDP takes the mean of the ranks' gradients: shares of different sizes must count by their samples.
        if uneven:
            learn.whole = self.size_of(learn.batch_index - learn.first_batch) / learn.world_size
        try:
            run()
        except (StopFit, StopEpoch, StopTrain) as signal:
            raised, self.wish, self.stops_fit = True, signal, self.stops_fit or isinstance(signal, StopFit)
        finally:
            if uneven:
                learn.whole = None
        own_request = Request(self.wish.stage) if self.wish else learn.wanted
        try:
            agreed = self.stops.passed(
                None if own_request is None else own_request.text, complete=not raised or self.reduced
            )
        except StoppedAlone:
            raise RuntimeError(TOO_EARLY.format(name=type(self.wish).__name__, rank=learn.rank)) from self.wish
        if agreed is not None:
            self.do(Request.from_text(agreed), learn)  # all ranks come here after the same batch
        if learn.batch_index >= self.next_shown and self.bar is not None:
            self.bar.show_loss_of_all(learn)
            self.next_shown = learn.batch_index + tell_interval(learn)

    def n_of_all(self, learn: Learner, k: int, own: int) -> int:
        k -= learn.first_batch
        return self.size_of(k) if k >= self.uneven_from else own * learn.world_size

    def do(self, agreed: Request, learn: Learner) -> None:
        """Do what all ranks have agreed to do after this batch. The strongest Stop* that a rank has raised comes before
        a signal or a save, also before one that was asked for earlier.
        """
        if self.replicas is None and learn.n_held and agreed.kind not in STOPS_OF_ALL:
            learn.wanted = agreed  # held gradients are in no checkpoint: all ask again after the next batch
            return
        wish, self.wish, stages = self.wish, None, ["", *STOPS_OF_ALL]
        [strongest] = agree_all(
            [max(stages.index(stage) for stage in (agreed.kind, wish.stage if wish else "") if stage in stages)]
        )
        if strongest and agreed.kind == "signal":
            learn.wanted = agreed  # asked again after that stop
        elif agreed.kind not in stages:
            learn.agreed, learn.wanted = agreed, None if agreed == learn.wanted else learn.wanted
        if strongest:
            raise wish if wish and wish.stage == stages[strongest] else STOPS_OF_ALL[stages[strongest]]

    def around_backward(self, learn: Learner, run: Run) -> None:
        own, self.reduced = self.replicas, True
        if own is None:
            return run()
        if [*map(is_trained, own.parameters)] != own.trained:
            raise own.changed(WITHIN_A_BATCH)
        try:
            run()
            if own.check is not None:
                own.check()
        except RuntimeError as error:
            if "ready only once" in str(error):
                add_note(error, SEVERAL_BACKWARDS)
            else:
                own.name_unused(error)
            raise

    # --- an evaluation -------------------------------------------------------
    def around_validate(self, learn: Learner, run: Run) -> None:
        if learn.meter.everywhere:
            with self.guarded(learn) if self.replicas is None else nullcontext():
                return run()
        with self.guarded(learn) as watch:
            call = "validate" if isinstance(learn.meter, Measure) else "get_preds"
            watch.come_to(f"an evaluation (learn.{call})", wait=True)
            whole = (
                in_order(self.train_dl) if self.train_dl is not None and learn.dl is learn.data.train_dl else learn.dl
            )
            learn.dl = evaluation_share(whole, learn, self.seed)  # the Learner puts its own back
            run()

    @contextmanager
    def guarded(self, learn: Learner) -> Iterator[Guard]:
        """Guard the block. A Stop* or Skip* that ends it is no failure: it is raised after all ranks have left."""
        guarded = guard(hang_timeout=self.hang_timeout, describe=learn.where, failure=lambda: learn.failure)
        with guarded as watch, Deferred() as deferred:
            yield watch
        deferred.release()


def is_own_stop(signal: ControlFlow | None) -> bool:
    return isinstance(signal, StopFit) and not isinstance(signal, Interrupted)


# the strongest last
STOPS_OF_ALL: dict[str, type[Stop]] = {signal.stage: signal for signal in (StopTrain, StopEpoch, StopFit)}


def schedules(learn: Learner) -> str:
    """The values of every schedule at five points of the fit."""
    tables = [(name, values) for cb in learn.running if isinstance(cb, ParamScheduler) for _, name, values in cb.tables]
    return "; ".join(
        f"{name} {', '.join(f'{values[int(i * (len(values) - 1) / 4)]:g}' for i in range(5))}"
        for name, values in tables
    )
