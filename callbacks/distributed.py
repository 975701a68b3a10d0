"""One Learner on many processes: the model wrapped, the data sharded, the results of all ranks brought together."""

from __future__ import annotations

import atexit
import copy
import inspect
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from learnkit.callbacks.param_scheduler import ParamScheduler
from learnkit.callbacks.progress import Progress, tell_interval
from learnkit.data.loaders import TensorLoader, in_order, n_batches
from learnkit.data.order import PrivateGenerator, PrivateLoader, generator_of, mix, parts_of, private
from learnkit.devices.dtensor import is_shard
from learnkit.devices.staging import packed
from learnkit.distributed.algorithms import Algorithm
from learnkit.distributed.batchnorm import restore_batchnorm
from learnkit.distributed.compare import check_same, digest_of_facts
from learnkit.distributed.guard import Guard, guard
from learnkit.distributed.prepare import ONE_REDUCTION, gradient_order_of, parameter_names, prepare_model
from learnkit.distributed.reduce import (
    agree,
    agree_all,
    all_sum,
    broadcast_from_main,
    gather_objects,
    gather_on_main,
    on_main,
)
from learnkit.distributed.shard import InStep, prepare_data_loader
from learnkit.distributed.stop import StoppedAlone, StopTogether
from learnkit.distributed.weights import average_gradients, means, model_in_words, share_values, share_weights
from learnkit.distributed.world import (
    as_local_rank,
    destroy_process_group,
    get_device,
    get_rank,
    get_world_size,
    init_process_group,
    seed_everything,
    take_device,
)
from learnkit.hooks import (
    Callback,
    ControlFlow,
    Interrupted,
    Run,
    Stop,
    StopEpoch,
    StopFit,
    StopTrain,
    add_note,
    run_then,
)
from learnkit.learner import Learner
from learnkit.loop.evaluate import Measure
from learnkit.loop.placement import place
from learnkit.optim.groups import as_number

NO_BATCH = 2**62  # further than any batch of an epoch
TOO_EARLY = (
    "{name} was raised before the backward pass of this batch, by rank {rank} and not by all: the others wait in "
    "theirs. Raise it in after_step or after_batch, or on all ranks."
)
SEVERAL_BACKWARDS = (
    "learnkit: DDP takes one backward pass a step through each parameter. For several, as with a loss after the other, "
    "use learn.to_distributed(delay_allreduce=True)."
)
WITHIN_A_BATCH = (
    "Within a batch DDP hears nothing of it: do it before or after one, as in before_epoch, before_train or after_step."
)
BETWEEN_FITS = (
    "Beside algorithm=…, pure=True, or between the batches of one step, DDP cannot be made anew: do it between two "
    "fits, or with GradualUnfreezing."
)
WEIGHTS = "the weights' checksum (something changes the weights on one rank alone, or a step was left out there)"
STEPS_DONE = "the number of steps done (raise Stop* on one rank in after_step, after_batch or after_epoch, else on all)"


class Distributed(Callback):
    """What `learn.to_distributed()` adds, where there is more than one process.

    For the length of a fit the training batches go through DistributedDataParallel, and each rank's training loader is
    its part of the whole one; validate and get_preds shard theirs too, unpadded, and leave DDP out. Losses, metrics and
    predictions are those of all ranks. What one rank stops, all stop, after the same step. A guard ends all processes
    when one fails or hangs. Everything is undone afterwards. The options are those of `Learner.to_distributed`;
    `replicas=False` leaves the model to another callback.

    >>> learn.to_distributed(sync_bn=True)  # doctest: +SKIP
    """

    order = -100
    unique = True

    def __init__(
        self, *, replicas: bool = True, hang_timeout: float | None = 600.0, seed: int = 0, **options: Any
    ) -> None:
        self.replicas = (
            Replicas(**options) if replicas else None
        )  # None: another callback brings the gradients together
        self.hang_timeout = hang_timeout
        self.seed = seed  # of what no other seed decides, the same on all ranks
        # In a fit:
        self.watch: Guard | None = None
        self.stops: StopTogether | None = None
        self.train_dl: Any = None  # the whole one, of which learn.data has this rank's share
        self.wish: Stop | None = None  # what this rank has raised in a batch, until all have agreed on something
        self.stops_fit = False  # whether this rank has raised StopFit
        self.compared = False  # whether the ranks have compared their optimizers and schedules
        self.reduced = False  # whether this batch's backward has begun, in which ranks wait for each other
        self.size_of: Callable[[int], int] = int  # number of a batch in its pass -> samples of all ranks in it
        self.uneven_from = NO_BATCH  # number of the first batch that the ranks may share unevenly
        self.bar: Progress | None = None  # shows the loss of all ranks
        self.next_told = NO_BATCH  # the batch after which they tell it each other again

    # --- a fit ---------------------------------------------------------------
    def around_fit(self, learn: Learner, run: Run) -> None:
        whole, seed, n_of_all = learn.data, learn.order_seed, learn.n_of_all
        with self.guarded(learn) as watch:
            self.watch = watch
            watch.come_to("a fit")
            self.stops, self.stops_fit, self.compared, self.train_dl = (
                watch.stop_together(),
                False,
                False,
                whole.train_dl,
            )
            try:
                learn.order_seed = broadcast_from_main(learn.order_seed)
                learn.data = copy.copy(whole)
                learn.data.train_dl = training_share(whole.train_dl, learn)
                learn.plan_steps()
                check_same(facts(learn))
                with self.replicas.wrapped(learn) if self.replicas is not None else nullcontext():
                    run()
            finally:
                learn.data, learn.order_seed, self.watch, self.stops, self.train_dl = whole, seed, None, None, None
                learn.n_of_all = n_of_all

    def around_epoch(self, learn: Learner, run: Run) -> None:
        """What is still pending is settled where all ranks meet: of stops only StopFit outlives its epoch."""
        assert self.stops is not None
        if not self.compared:
            check_same({"the optimizer's settings": settings(learn), "the schedules": schedules(learn)})
        self.compared = True
        signal: ControlFlow | None = None
        try:
            run()
        except ControlFlow as raised:
            signal = raised
        stops_fit = self.stops_fit or is_own_stop(signal)
        own = WANTED + number_of(learn.wanted) if learn.wanted else STOP if stops_fit else int(self.stops.under_way)
        if self.watch is not None:
            self.watch.come_to(f"the end of epoch {learn.epoch}")
        settled, ends = settle(
            own, stops_fit, {STEPS_DONE: learn.step, **({} if self.replicas is None else {WEIGHTS: checksum(learn)})}
        )
        if settled:
            self.stops.end()
        if settled >= WANTED:
            learn.agreed, learn.wanted = request_name(settled - WANTED), None
        if ends and not is_own_stop(signal):
            raise StopFit
        if settled > WANTED and signal is None:
            raise Interrupted
        if signal is not None:
            raise signal

    def around_train(self, learn: Learner, run: Run) -> None:
        self.wish = None
        self.size_of, self.uneven_from = sizes(learn.dl)
        learn.n_of_all = partial(self.n_of_all, learn)
        self.bar = next((cb for cb in learn.running if isinstance(cb, Progress) and cb.shares), None)
        self.next_told = NO_BATCH if self.bar is None else learn.first_batch + tell_interval(learn) - 1
        run()

    def around_batch(self, learn: Learner, run: Run) -> None:
        """A rank that leaves the loop alone would leave the others waiting."""
        if not learn.training or self.stops is None:
            return run()
        self.reduced, raised = False, False
        own = self.replicas
        if own is not None and [*map(is_trained, own.parameters)] != own.trained:
            own.wrap_anew(learn)
        uneven = learn.batch_index - learn.first_batch >= self.uneven_from and learn.whole is None
        # DDP takes the mean of the ranks' gradients: of unequal parts, each counts by its samples.
        if uneven:
            learn.whole = self.size_of(learn.batch_index - learn.first_batch) / learn.world_size
        try:
            run()
        except (StopFit, StopEpoch, StopTrain) as signal:
            raised, self.wish, self.stops_fit = True, signal, self.stops_fit or isinstance(signal, StopFit)
        finally:
            if uneven:
                learn.whole = None
        try:
            agreed = self.stops.passed(
                self.wish.stage if self.wish else learn.wanted, complete=not raised or self.reduced
            )
        except StoppedAlone:
            raise RuntimeError(TOO_EARLY.format(name=type(self.wish).__name__, rank=learn.rank)) from self.wish
        if agreed is not None:
            self.do(agreed, learn)  # all ranks come here after the same batch
        if learn.batch_index >= self.next_told and self.bar is not None:
            self.bar.show_loss_of_all(learn)
            self.next_told = learn.batch_index + tell_interval(learn)

    def n_of_all(self, learn: Learner, k: int, own: int) -> int:
        k -= learn.first_batch
        return self.size_of(k) if k >= self.uneven_from else own * learn.world_size

    def do(self, agreed: str, learn: Learner) -> None:
        """What all ranks have agreed to do after this batch. A Stop* that a rank has raised comes before a signal or a
        save that was wished for first, and is the strongest of all.
        """
        if self.replicas is None and learn.n_held and agreed not in STOPS_OF_ALL:
            learn.wanted = agreed  # gradients that wait are in no checkpoint: all ask again after the next batch
            return
        wish, self.wish, stages = self.wish, None, ["", *STOPS_OF_ALL]
        [strongest] = agree_all(
            [max(stages.index(stage) for stage in (agreed, wish.stage if wish else "") if stage in stages)]
        )
        if strongest and agreed.startswith("signal"):
            learn.wanted = agreed  # asked for again when that stop has happened
        elif agreed not in stages:
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
        """A signal that ends the stage is no failure: the guard does not see it, and waits until all ranks are
        through.
        """
        signal: ControlFlow | None = None
        with guard(hang_timeout=self.hang_timeout, describe=learn.where, failure=lambda: learn.failure) as watch:
            try:
                yield watch
            except ControlFlow as raised:
                signal = raised
        if signal is not None:
            raise signal


class OneModel(Callback):
    """What all ranks evaluate is one model; the innermost callback, so that it is whatever others have put in the
    model's place.

    Rank 0's buffers (batch norm's statistics) become everybody's when an epoch's training ends, early or not, and
    before an evaluation. So do, of ranks whose weights are apart, their means; amid training for the evaluation's
    length alone.
    """

    order = 10_000
    unique = True

    def around_train(self, learn: Learner, run: Run) -> None:
        run_then(run, lambda: unite(learn, learn.model))

    def around_validate(self, learn: Learner, run: Run) -> None:
        model = learn.evaluated_model
        if learn.meter.everywhere and not any(map(is_shard, model.parameters())):
            return run()  # one rank may predict by itself
        learn.ranks.share(list(model.buffers()))
        with borrowed_means(learn, model) if learn.ranks.apart else nullcontext():
            run()


@torch.no_grad()
def unite(learn: Learner, model: nn.Module) -> None:
    """Rank 0's buffers, and the means of weights that are apart, on all ranks."""
    learn.ranks.share(list(model.buffers()))
    if not learn.ranks.apart:
        return
    parameters = list(model.parameters())
    for p, value in zip(parameters, learn.ranks.mean(parameters), strict=True):
        p.copy_(value)


@contextmanager
def borrowed_means(learn: Learner, model: nn.Module) -> Iterator[None]:
    """Within the block the model's weights are the means; then each rank has its own again. Storage changes places: see
    `Average`.
    """
    parameters = list(model.parameters())
    own = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, learn.ranks.mean(parameters), strict=True):
            p.data = value
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value


class Replicas:
    """The whole model on every rank, for a fit's length in DistributedDataParallel."""

    def __init__(self, *, sync_bn: bool = False, **ddp_options: Any) -> None:
        check_options(ddp_options)
        self.sync_bn, self.ddp_options = sync_bn, ddp_options
        # In a fit:
        self.wrapper: nn.Module | None = None  # DDP, or the model itself where nothing is trained
        self.check: Callable[[], None] | None = (
            None  # raises RuntimeError where DDP still waits for gradients after a backward pass
        )
        self.names: list[str] = []  # of the model's parameters
        self.parameters: list[nn.Parameter] = []
        self.trained: list[bool] = []  # which of them DDP has

    @contextmanager
    def wrapped(self, learn: Learner) -> Iterator[None]:
        before = learn.no_sync, learn.reduce_gradients, learn.gradient_order
        self.names, self.parameters = map(list, zip(*learn.model.named_parameters(), strict=True))
        try:
            self.wrap(learn, gradient_order=(learn.resumed or {}).get("gradient_order", ()))
            learn.reduce_gradients = lambda: average_gradients(learn.model.parameters())
            yield
        finally:
            unwrap(learn)
            self.wrapper, self.check, self.names, self.parameters, self.trained = None, None, [], [], []
            learn.no_sync, learn.reduce_gradients, learn.gradient_order = before

    def wrap(self, learn: Learner, **options: Any) -> None:
        self.trained = [*map(is_trained, self.parameters)]
        ddp = self.wrapper = learn.training_model = prepare_model(
            learn.model, device=learn.device, sync_bn=self.sync_bn, **{**self.ddp_options, **options}
        )
        learn.gradient_order = partial(gradient_order_of, ddp)
        if not isinstance(ddp, DistributedDataParallel):
            return
        learn.no_sync = refused_static_graph if self.ddp_options.get("static_graph") else ddp.no_sync
        waits = not (self.ddp_options.get("find_unused_parameters") or self.ddp_options.get("static_graph"))
        self.check = ddp.reducer._check_reducer_finalized if waits else None

    def wrap_anew(self, learn: Learner) -> None:
        """Some parameters were frozen or thawed since, on all ranks alike: DDP takes those that are trained when it is
        made.
        """
        if learn.n_held or learn.training_model is not self.wrapper or learn.asked_of_ddp.startswith("algorithm"):
            raise self.changed(BETWEEN_FITS)
        if isinstance(self.wrapper, DistributedDataParallel):
            self.wrapper._remove_autograd_hooks()
        self.check = None
        at_once = (
            learn.resumed is not None and learn.resumed["step"] == learn.step
        )  # what the interrupted run had learned of it holds
        self.wrap(
            learn, init_sync=False, gradient_order=learn.resumed["gradient_order"] if learn.resumed and at_once else ()
        )

    def changed(self, advice: str) -> ValueError:
        names = [
            name
            for name, p, was in zip(self.names, self.parameters, self.trained, strict=True)
            if p.requires_grad is not was
        ]
        return ValueError(
            f"{len(names)} parameters were frozen or thawed during the fit: {listed_names(names)}. {advice}"
        )

    def name_unused(self, error: RuntimeError) -> None:
        """DDP would wait for parameters that got no gradient, or complain one step later and without names."""
        match = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if match is None or not isinstance(self.wrapper, DistributedDataParallel):
            return
        names, in_order = parameter_names(self.wrapper.module), self.wrapper._build_params_for_reducer()[0]
        unused = [names[id(in_order[int(number)])] for number in match[1].split()]
        raise ValueError(
            f"{len(unused)} parameters got no gradient: {listed_names(unused)}. DDP waits for every parameter in each "
            f"step: take them out of the model, freeze them, or use learn.to_distributed(find_unused_parameters=True)."
        ) from error


is_trained = attrgetter("requires_grad")


def listed_names(names: list[str]) -> str:
    return ", ".join([*names[:8], *(["…"] if len(names) > 8 else [])])


STOP, WANTED = (
    2,
    100,
)  # what ranks tell each other at an epoch's end: to stop; or what is wanted, with a signal's number


def number_of(wanted: str) -> int:
    return 0 if wanted == "save" else int(wanted.split()[1])


def request_name(number: int) -> str:
    return f"signal {number}" if number else "save"


def settle(own: int, ends: bool, facts: dict[str, int]) -> tuple[int, bool]:
    """The largest `own` of all ranks, and whether the fit ends for any; raises ValueError where facts differ. One
    collective.
    """
    found = digest_of_facts(facts)
    settled, end, largest, negative = agree_all([own, int(ends), found, -found])
    if largest != -negative:
        check_same(facts)
    return settled, bool(end)


def is_own_stop(signal: ControlFlow | None) -> bool:
    return isinstance(signal, StopFit) and not isinstance(signal, Interrupted)


STOPS_OF_ALL: dict[str, type[Stop]] = {
    signal.stage: signal for signal in (StopTrain, StopEpoch, StopFit)
}  # the strongest last


class Group:
    """All ranks of the process group, as `learn.ranks`."""

    def __init__(self, *, apart: bool = False) -> None:
        self.apart = apart

    def all_sum(self, tensors: Any) -> Any:
        return all_sum(tensors)

    def share(self, tensors: Any) -> None:
        share_values(list(tensors))

    def mean(self, tensors: Any) -> list[Tensor]:
        return means(list(tensors))

    def agree(self, flag: bool) -> bool:
        return bool(agree(flag))

    def gather(self, state: Any) -> list[Any]:
        return gather_objects(state)

    def gather_on_main(self, state: Any) -> list[Any]:
        return gather_on_main(state)

    def on_main(self, action: Callable[[], object], name: str) -> None:
        on_main(action, name)

    def from_main(self, action: Callable[[], Any]) -> Any:
        error, told = None, None
        if get_rank() == 0:
            try:
                told = [True, action()]
            except Exception as raised:
                error, told = raised, [False, f"{type(raised).__name__}: {raised}"]
        done, result = broadcast_from_main(told)
        if error is not None:
            raise error
        if not done:
            raise RuntimeError(f"rank 0 failed: {result}")
        return result

    def batches_in_order(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Ranks have contiguous parts of each global batch, in rank order."""
        shares = gather_objects(rows)
        return [share[k] for k in range(max(map(len, shares))) for share in shares if k < len(share)]


# --- joining the others ------------------------------------------------------
def attach_distributed(
    learn: Learner,
    local_rank: int | str | None,
    *,
    timeout: float | None,
    algorithm: Algorithm,
    delay_allreduce: bool,
    **options: Any,
) -> Learner:
    """What `learn.to_distributed` does: join the group, take this rank's device, start from rank 0's weights."""
    if learn.is_running:
        raise RuntimeError("to_distributed was called while this Learner runs: call it before.")
    callback = Distributed(**options)  # its errors before anything else
    if delay_allreduce and algorithm.name != "allreduce":
        raise ValueError(ONE_REDUCTION.format(name=algorithm.name))
    if learn.is_spread or any(map(is_shard, learn.model.parameters())):
        raise TypeError(
            "the model is spread over the ranks already, by to_fsdp, which is for good: build it anew for "
            "to_distributed."
        )
    asked = {
        "algorithm": algorithm.name if algorithm.name != "allreduce" else None,
        "delay_allreduce": delay_allreduce or None,
        **{name: value for name, value in options.items() if name != "hang_timeout" and value is not False},
    }
    learn.asked_of_ddp = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
    if not join_ranks(learn, local_rank, timeout, apart=algorithm.averages):
        return alone(learn, algorithm)
    from learnkit.callbacks.communicate import Communicate
    from learnkit.callbacks.reduce_afterwards import ReduceAfterwards

    beside: list[Callback] = [] if algorithm.name == "allreduce" else [Communicate(algorithm)]
    if delay_allreduce:
        beside.append(ReduceAfterwards())
    with guard(hang_timeout=callback.hang_timeout, describe=lambda: "to_distributed"):
        share_weights(learn.model)
        return install(learn, callback, *beside)


def alone(learn: Learner, algorithm: Algorithm) -> Learner:
    """As it is; but a checkpoint of several ranks may have what only Communicate can take back."""
    from learnkit.callbacks.communicate import Communicate

    learn.callbacks = [cb for cb in learn.callbacks if not isinstance(cb, Communicate)]
    return learn.add_callback(Communicate(algorithm)) if algorithm.keeps_own else learn


def join_ranks(learn: Learner, local_rank: int | str | None, timeout: float | None, *, apart: bool = False) -> bool:
    """Make the Learner one of the ranks, on its device; returns whether there are others."""
    as_local_rank(local_rank)  # a wrong one also where nobody asks for it: alone, without GPUs
    # A Learner on the CPU of a machine with devices: there may be more ranks than devices, and nothing is sent from
    # one.
    backend = "gloo" if learn.device.type == "cpu" else None
    if init_process_group(backend, local_rank=local_rank, timeout=timeout):
        atexit.register(destroy_process_group)
    if get_world_size() == 1:
        return False
    device = learn.device if learn.device.type == "cpu" else get_device(local_rank)
    take_device(device)
    place(learn, device)
    learn.rank, learn.world_size, learn.ranks = get_rank(), get_world_size(), Group(apart=apart)
    return True


def install(learn: Learner, callback: Distributed, *beside: Callback) -> Learner:
    """In the place of what an earlier call installed."""
    from learnkit.callbacks.communicate import Communicate
    from learnkit.callbacks.reduce_afterwards import ReduceAfterwards

    callback.seed = broadcast_from_main(torch.initial_seed())
    learn.callbacks = [
        cb for cb in learn.callbacks if not isinstance(cb, (Distributed, Communicate, ReduceAfterwards, OneModel))
    ]
    for added in (*beside, OneModel(), callback):
        learn.add_callback(added)
    return learn


def check_options(ddp_options: dict[str, Any]) -> None:
    known = list(inspect.signature(DistributedDataParallel).parameters)
    unknown = [name for name in ddp_options if name not in known or name in ("module", "device_ids", "output_device")]
    if unknown:
        raise TypeError(
            f"to_distributed got {', '.join(unknown)}: expected local_rank, algorithm, sync_bn, delay_allreduce, "
            f"timeout, hang_timeout, or an option of DistributedDataParallel such as "
            f"{', '.join(n for n in known if n in EXAMPLES)}."
        )


EXAMPLES = ("bucket_cap_mb", "find_unused_parameters", "gradient_as_bucket_view", "static_graph")


def unwrap(learn: Learner) -> None:
    """Take DDP off the model again; without its hooks, the model can be trained alone or wrapped anew."""
    if isinstance(learn.training_model, DistributedDataParallel):
        learn.training_model._remove_autograd_hooks()
    restore_batchnorm(learn.model)
    learn.training_model = learn.model


# --- shares ------------------------------------------------------------------
def training_share(loader: Any, learn: Learner) -> Any:
    """This rank's part of the training loader: as many batches as the others have."""
    own = own_share(loader, learn, learn.order_seed, training=True)
    n = n_batches(own)
    if n == 0:
        bs = batch_size_of(loader)
        raise ValueError(
            f"train_dl has no batch for each of the {learn.world_size} ranks: alone it has {n_batches(loader)}"
            f"{'' if bs is None else f', of {bs} samples'}. "
            "Take a smaller batch size, which is per rank, fewer ranks, or drop_last=False."
        )
    return InStep(own) if n is None else own


def evaluation_share(loader: Any, learn: Learner, seed: int) -> Any:
    """This rank's part of an evaluation's loader: each sample is some rank's, none is two's."""
    return own_share(loader, learn, seed if learn.order_seed is None else learn.order_seed, training=False)


def own_share(loader: Any, learn: Learner, seed: int | None, *, training: bool) -> Any:
    if isinstance(loader, PrivateLoader):
        loader = loader.loader
    if isinstance(loader, TensorLoader):
        return loader.sharded(learn.rank, learn.world_size, even=training).to(learn.device)
    if not isinstance(loader, DataLoader):
        return prepare_data_loader(private(loader, seed), training=training, keep_generator=True)
    own = prepare_data_loader(loader, seed=seed, training=training, keep_generator=True)
    return private(with_own_augmentations(own if own is not loader else copy.copy(own), learn.rank), seed)


def with_own_augmentations(loader: DataLoader[Any], rank: int) -> DataLoader[Any]:
    """Workers are seeded from the loader's generator, which a user gave all ranks alike: their augmentations must
    differ all the same.
    """
    loader._iterator = None  # workers that live on belong to the original
    if isinstance(generator_of(loader), PrivateGenerator):
        loader.generator = PrivateGenerator()
        loader.generator.rank = rank
    elif loader.num_workers:
        loader.worker_init_fn = partial(seed_worker, rank, loader.worker_init_fn)
    return loader


def seed_worker(rank: int, init: Callable[[int], None] | None, worker: int) -> None:
    if rank:
        seed_everything(mix(torch.initial_seed(), rank))
    if init is not None:
        init(worker)


def sizes(loader: Any) -> tuple[Callable[[int], int], int]:
    """(batch index -> samples of all ranks in that batch, the first index from which the ranks may share them
    unevenly).
    """
    part = next((part for part in parts_in_step(loader) if hasattr(part, "global_batch_size")), None)
    if part is None:
        return int, NO_BATCH
    last = n_batches(loader)
    if last is None or getattr(part, "batch_size", None) is None:
        return part.global_batch_size, 0
    uneven = part.global_batch_size(last - 1) % part.world_size != 0
    return part.global_batch_size, last - 1 if uneven else NO_BATCH


def parts_in_step(loader: Any) -> list[Any]:
    return parts_of(loader.loader if isinstance(loader, InStep) else loader)


def refused_static_graph() -> AbstractContextManager[Any]:
    raise ValueError(
        "static_graph=True, with which DDP reduces gradients in every backward pass, beside something that keeps them "
        "with their rank for a while: Accumulate, AutoMicrobatch or delay_allreduce. Leave static_graph out."
    )


# --- what must be equal ------------------------------------------------------
def checksum(learn: Learner) -> int:
    """Of the weights, which are the same on all ranks or the training is none; by one read from the device."""
    words = [packed(p) for p in learn.model.parameters()]
    sums = torch.stack([w.sum(dtype=torch.int64) + 31 * w[1::2].sum(dtype=torch.int64) for w in words])
    return int((sums * torch.arange(1, len(words) + 1, device=sums.device)).sum())


def schedules(learn: Learner) -> str:
    """The values of every schedule at five places of the fit."""
    tables = [(name, values) for cb in learn.running if isinstance(cb, ParamScheduler) for _, name, values in cb.tables]
    return "; ".join(
        f"{name} {', '.join(f'{values[int(i * (len(values) - 1) / 4)]:g}' for i in range(5))}"
        for name, values in tables
    )


def facts(learn: Learner) -> dict[str, Any]:
    """What must be equal on all ranks before the first step."""
    return {
        "the Python version": platform.python_version(),
        "the model's parameters": model_in_words(learn.model),
        "the optimizer": type(learn.opt).__name__,
        "the number of epochs": learn.n_epochs,
        "the number of steps": learn.n_steps,
        "the batch size": batch_size_of(learn.data.train_dl),
        "the seed": learn.seed,
        "the number of training samples": n_samples_of(learn.data.train_dl),
        "the epochs trained so far": learn.epochs_trained,
        "validates": learn.data.valid_dl is not None,
        "the metrics": ", ".join(name for metric in learn.metrics for name in metric.names),
        "the callbacks": ", ".join(type(cb).__name__ for cb in learn.callbacks),
    }


def settings(learn: Learner) -> str:
    """Every setting of the optimizer's groups; what is equal in all of them once."""
    return "; ".join(
        ", ".join(f"{name}={as_number(value)}" for name, value in group.items() if name != "params")
        for group in learn.opt.param_groups
    )


def batch_size_of(loader: Any) -> int | None:
    part = next((part for part in parts_in_step(loader) if getattr(part, "batch_size", None) is not None), None)
    return None if part is None else int(part.batch_size)


def n_samples_of(loader: Any) -> int | None:
    """Of all ranks, in an epoch; None where the loader's share is not ours to make."""
    part = next((part for part in parts_in_step(loader) if hasattr(part, "global_batch_size")), None)
    return n_batches(getattr(part, "sampler", None))
