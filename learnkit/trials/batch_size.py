"""The largest batch that fits into memory, by trying."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch

from learnkit.data.loaders import first_batch
from learnkit.devices.dtensor import is_shard
from learnkit.devices.nested import map_tensors, tensors_in
from learnkit.devices.ranks import Alone
from learnkit.loop.memory import forget_tensors, free_cached, is_out_of_memory, stage_of
from learnkit.trials.trial import unchanged

if TYPE_CHECKING:
    from learnkit.learner import Learner

N_SKIPS = (
    30  # steps that float16 may skip until its scaled gradients are finite: from 2^16 down to its smallest scale, 2^-14
)


def find(learn: Learner, max_bs: int, n_steps: int) -> int:
    """What `learn.batch_size_find` does: each rank by itself, without the others' gradients, and then the least of
    all.
    """
    if any(map(is_shard, learn.model.parameters())):
        raise ValueError(
            "batch_size_find lets each rank try by itself, and after to_fsdp none has a whole model: find it before, "
            "for a bound, or try sizes by hand."
        )
    samples = first_batch(learn.data.train_dl)
    with unchanged(learn):
        by_oneself(learn)
        largest, bs, failure = 0, 2, None  # of one sample there is no batch norm
        while bs <= max_bs and (failure := attempt(learn, samples, bs, n_steps)) is None:
            largest, bs = bs, 2 * bs
        if not largest and not (
            failure is not None and stage_of(failure) == "step"
        ):  # what a step needs depends on no batch
            failure = attempt(learn, samples, 1, n_steps)
            largest = int(failure is None)
    found = min(learn.ranks.gather(largest))
    if found:
        return found
    if failure is not None and not is_out_of_memory(failure):
        raise failure  # taken for one of memory, which it was not
    raise RuntimeError("not even one sample fits into memory: take a smaller model, or to_bf16().") from failure


def by_oneself(learn: Learner) -> None:
    from learnkit.callbacks.auto_microbatch import AutoMicrobatch
    from learnkit.callbacks.distributed import Distributed
    from learnkit.callbacks.reduce_afterwards import ReduceAfterwards

    learn.callbacks = [
        cb for cb in learn.callbacks if not isinstance(cb, (AutoMicrobatch, Distributed, ReduceAfterwards))
    ]
    learn.ranks, learn.world_size = Alone(), 1


def attempt(learn: Learner, samples: Any, bs: int, n_steps: int) -> BaseException | None:
    """Train `n_steps` steps with batches of bs samples; the error, where memory runs out.

    From the second step on the optimizer has its state.
    """
    n_batches = (n_steps + N_SKIPS) * math.prod(cb.batches_per_step for cb in learn.callbacks)
    learn.data = copy.copy(learn.data)
    learn.data.valid_dl = None
    try:
        learn.data.train_dl = [grown(samples, bs)] * n_batches
        learn.fit(1, max_steps=n_steps)
    except BaseException as error:
        if not is_out_of_memory(error, perhaps=True):
            raise
        forget_tensors(error)
        return error
    finally:
        learn.data.train_dl = [samples]
        learn.inputs, learn.target = (), None
        free_cached(learn.device)
    return None


def grown(batch: Any, bs: int) -> Any:
    """A batch of bs samples, those of `batch` over and over."""
    n = len(next(t for t in tensors_in(batch) if t.ndim))
    rows = torch.arange(bs) % n
    return map_tensors(lambda t: t.index_select(0, rows.to(t.device)) if t.ndim and len(t) == n else t, batch)
