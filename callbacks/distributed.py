"""One Learner on many processes: the model wrapped, the data sharded, the results of all ranks brought together."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from learnkit.data import DataBunch, EpochSampler, PrivateGenerator, TensorLoader, parts_of
from learnkit.distributed.compare import check_same
from learnkit.distributed.guard import guard
from learnkit.distributed.prepare import prepare_model, restore_batchnorm
from learnkit.distributed.reduce import agree, all_sum, broadcast_from_main, gather_objects
from learnkit.distributed.shard import ShardedBatchSampler, prepare_data_loader
from learnkit.distributed.world import get_device, get_rank, get_world_size, init_process_group
from learnkit.evaluate import join
from learnkit.hooks import Callback, ControlFlow, Run, StopFit
from learnkit.learner import Learner


class Distributed(Callback):
    """What `learn.to_distributed()` adds, where there is more than one process.

    For the length of a fit, the training batches go through DistributedDataParallel, and each rank's training loader is its
    part of the whole one; validate and get_preds shard theirs too, unpadded, and leave DDP out. Losses, metrics and
    predictions are those of all ranks. A guard ends all processes when one fails or hangs. Everything is undone afterwards.

    sync_bn         batch statistics over all ranks' samples, for the length of a fit
    hang_timeout    seconds without a batch's end on some rank after which all processes end with that rank's place. None: never
    ddp_options     DistributedDataParallel's own, such as find_unused_parameters=True

    >>> learn.to_distributed(sync_bn=True)  # doctest: +SKIP
    """
    order = -100
    unique = True

    def __init__(self, *, sync_bn: bool = False, hang_timeout: float | None = None, **ddp_options: Any) -> None:
        self.sync_bn, self.hang_timeout, self.ddp_options = sync_bn, hang_timeout, ddp_options
        self.guarded = False
        self.unchecked = False          # whether this fit's first backward is still to come
        self.ragged_batch = -1          # index of a last global batch that the ranks share unevenly; -1: there is none
        self.ragged_weight = 1.         # of this rank's mean loss in it

    def around_fit(self, learn: Learner, run: Run) -> None:
        whole, seed = learn.data, learn.order_seed
        with self.guard(learn):
            try:
                learn.order_seed = broadcast_from_main(order_seed(learn))
                learn.data = copy.copy(whole)
                learn.data.train_dl = sharded(whole.train_dl, learn, training=True)
                learn.plan_steps()
                check_same(facts(learn))
                self.ragged_batch, self.ragged_weight = ragged(learn.data.train_dl)
                learn.training_model = prepare_model(learn.model, device=learn.device, sync_bn=self.sync_bn, **self.ddp_options)
                self.unchecked = not self.ddp_options.get("find_unused_parameters", False)
                run()
            finally:
                if learn.training_model is not learn.model: unwrap(learn)
                learn.data, learn.order_seed = whole, seed

    def around_epoch(self, learn: Learner, run: Run) -> None:
        """A StopFit that one rank raises at the epoch's end stops all of them."""
        stops = False
        try: run()
        except StopFit: stops = True
        if agree(stops): raise StopFit

    def around_train(self, learn: Learner, run: Run) -> None:
        run()
        share_buffers(learn)

    def around_backward(self, learn: Learner, run: Run) -> None:
        if learn.batch_index == self.ragged_batch: self.weighted(learn, run)
        else: run()
        if self.unchecked: self.check_unused(learn)

    def around_validate(self, learn: Learner, run: Run) -> None:
        if learn.meter.everywhere: return run()
        learn.dl = sharded(learn.dl, learn, training=False)     # the Learner puts its own back
        with self.guard(learn): run()

    def weighted(self, learn: Learner, run: Run) -> None:
        """DDP takes the mean of the ranks' gradients: of unequal parts, each counts by its samples."""
        loss = learn.loss
        learn.loss = loss * self.ragged_weight
        try: run()
        finally: learn.loss = loss

    def check_unused(self, learn: Learner) -> None:
        """Name the parameters that got no gradient: DDP would wait for them, or complain one step later without a name."""
        self.unchecked = False
        unused = [name for name, p in learn.model.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise ValueError(f"{len(unused)} parameters got no gradient: {', '.join(unused[:8])}{', …' if len(unused) > 8 else ''}. "
                             "DDP waits for every parameter: take them out of the model, freeze them, or use "
                             "learn.to_distributed(find_unused_parameters=True).")

    @contextmanager
    def guard(self, learn: Learner) -> Iterator[None]:
        """The guard of the outermost stage; the stages within are under it already."""
        if self.guarded:
            yield
            return
        self.guarded = True
        try:
            with guard(hang_timeout=self.hang_timeout, describe=learn.where, failure=lambda: learn.failure): yield
        finally: self.guarded = False


class Group:
    """All ranks of the process group, as `learn.ranks`."""

    def all_sum(self, tensors: Any) -> Any: return all_sum(tensors)

    def agree(self, flag: bool) -> bool: return agree(flag)

    def batches_in_order(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        own = [[n_rows(row) for row in rows], join(rows) if rows else None]
        shares = [(lengths, split(values, lengths)) for lengths, values in gather_objects(own)]
        longest = max(len(batches) for _, batches in shares)
        return [batches[k] for k in range(longest) for _, batches in shares if k < len(batches)]

    def on_main(self, action: Callable[[], object]) -> None:
        error: Exception | None = None
        if get_rank() == 0:
            try: action()
            except Exception as raised: error = raised
        told = broadcast_from_main(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None: raise error
        if told is not None: raise RuntimeError(f"rank 0 failed: {told}")


def attach(learn: Learner, local_rank: int | str | None, *, timeout: float | None, **options: Any) -> Learner:
    """What `learn.to_distributed` does: join the group, take this rank's device, start from rank 0's weights."""
    init_process_group(local_rank=local_rank, timeout=timeout)
    if get_world_size() == 1: return learn
    learn.add_callback(Distributed(**options))
    learn.rank, learn.world_size, learn.ranks = get_rank(), get_world_size(), Group()
    learn.device = get_device(local_rank)
    learn.model.to(learn.device)
    same_weights(learn)
    return learn


def same_weights(learn: Learner) -> None:
    """Rank 0's weights and buffers on every rank, so that an evaluation before the first fit agrees too."""
    state = learn.model.state_dict()
    check_same({"the model's parameters": model_in_words(learn)})
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    with torch.no_grad():
        for own, given in zip(tensors, broadcast_from_main(tensors), strict=True): own.copy_(given)


def share_buffers(learn: Learner) -> None:
    """Rank 0's buffers (batch norm's statistics) on every rank, in one collective: what is evaluated must be one model."""
    buffers = list(learn.model.buffers())
    if not buffers: return
    with torch.no_grad():
        for own, given in zip(buffers, broadcast_from_main(buffers), strict=True): own.copy_(given)


def unwrap(learn: Learner) -> None:
    """Take DDP off the model again; without its hooks, the model can be trained alone or wrapped anew."""
    learn.training_model._remove_autograd_hooks()       # type: ignore[operator]
    restore_batchnorm(learn.model)
    learn.training_model = learn.model


def order_seed(learn: Learner) -> int:
    """The seed of the order of samples: the Learner's, else the one that its loader would use alone."""
    if learn.order_seed is not None: return learn.order_seed
    samplers = [part for part in parts_of(learn.data.train_dl) if isinstance(part, EpochSampler)]
    return samplers[0].seed if samplers else torch.initial_seed()


def sharded(loader: Any, learn: Learner, *, training: bool) -> Any:
    """This rank's part of a loader."""
    if isinstance(loader, TensorLoader):
        own = loader.sharded(learn.rank, learn.world_size, even=training)
        own.tensors = tuple(t.to(learn.device) for t in own.tensors)
        return own
    own = prepare_data_loader(loader, seed=learn.order_seed, training=training)
    if isinstance(own, DataLoader) and isinstance(own.generator, PrivateGenerator): own.generator = PrivateGenerator(salt=learn.rank)
    return own


def ragged(loader: Any) -> tuple[int, float]:
    """(index of the last global batch, this rank's weight in it) if its samples are shared unevenly, else (-1, 1)."""
    part = loader if isinstance(loader, TensorLoader) else getattr(loader, "batch_sampler", None)
    if not isinstance(part, (TensorLoader, ShardedBatchSampler)) or part.batch_size is None: return -1, 1.
    last = len(part) - 1
    n = part.global_batch_size(last)
    start, stop = part.share_of(last)
    weight = (stop - start) * part.world_size / n
    return (last, weight) if weight != 1 else (-1, 1.)


def facts(learn: Learner) -> dict[str, Any]:
    """What must be equal on all ranks before the first step."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in learn.opt.param_groups]
    return {"the torch version": torch.__version__, "the model": type(learn.model).__name__,
            "the model's parameters": model_in_words(learn), "the optimizer": type(learn.opt).__name__,
            "the optimizer's settings": str(settings), "the batch size": str(getattr(learn.data.train_dl, "batch_size", None)),
            "the number of epochs": learn.n_epochs, "the number of steps": str(learn.n_steps), "the seed": str(learn.seed)}


def model_in_words(learn: Learner) -> str:
    return ", ".join(f"{name} {tuple(p.shape)}{'' if p.requires_grad else ' frozen'}" for name, p in learn.model.named_parameters())
