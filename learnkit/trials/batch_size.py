"""Find the largest batch that fits into memory, by trying."""

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
    30  # steps that float16 may skip until its scaled gradients are finite: from scale 2^16 down to the smallest, 2^-14
)


def find(learn: Learner, max_bs: int, n_steps: int) -> int:
    """Implement `learn.batch_size_find`.

    Each rank tries alone, without the others' gradients; the result is the minimum over all ranks.
    """
    if any(map(is_shard, learn.model.parameters())):
        raise ValueError(
            "batch_size_find lets each rank try by itself, but after to_fsdp no rank has the full model: call it "
            "before to_fsdp to get a bound, or try sizes by hand."
        )
    samples = first_batch(learn.data.train_dl)
    with unchanged(learn):
        by_oneself(learn)
        largest, bs, failure = 0, 2, None  # batch norm needs more than one sample
        while bs <= max_bs and (failure := attempt(learn, samples, bs, n_steps)) is None:
            largest, bs = bs, 2 * bs
        if not largest and not (
            failure is not None and stage_of(failure) == "step"
        ):  # the memory of an optimizer step does not depend on the batch
            failure = attempt(learn, samples, 1, n_steps)
            largest = int(failure is None)
    found = min(learn.ranks.gather(largest))
    if found:
        return found
    if failure is not None and not is_out_of_memory(failure):
        raise failure  # it looked like an out-of-memory error, but was another one
    raise RuntimeError("not even one sample fits into memory: use a smaller model, or to_bf16().") from failure


def by_oneself(learn: Learner) -> None:
    from learnkit.callbacks.auto_microbatch import AutoMicrobatch
    from learnkit.callbacks.distributed import Distributed
    from learnkit.callbacks.reduce_afterwards import ReduceAfterwards

    learn.callbacks = [
        cb for cb in learn.callbacks if not isinstance(cb, (AutoMicrobatch, Distributed, ReduceAfterwards))
    ]
    learn.ranks, learn.world_size = Alone(), 1


def attempt(learn: Learner, samples: Any, bs: int, n_steps: int) -> BaseException | None:
    """Train `n_steps` steps with batches of bs samples; return the error if memory runs out.

    From the second step on, the optimizer has its state.
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
    """Return a batch of bs samples that repeats those of `batch`."""
    n = len(next(t for t in tensors_in(batch) if t.ndim))
    rows = torch.arange(bs) % n
    return map_tensors(lambda t: t.index_select(0, rows.to(t.device)) if t.ndim and len(t) == n else t, batch)
