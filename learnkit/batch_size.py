"""The largest batch that fits into memory, by trying."""
from __future__ import annotations

import copy
import gc
import math
from typing import TYPE_CHECKING, Any

import torch

from learnkit.batch import map_tensors, tensors_in
from learnkit.data import first_batch
from learnkit.ranks import Alone
from learnkit.session import is_out_of_memory
from learnkit.shards import is_shard
from learnkit.trial import unchanged

if TYPE_CHECKING:
    from learnkit.learner import Learner


def find(learn: Learner, max_bs: int, n_steps: int) -> int:
    """What `learn.batch_size_find` does: each rank by itself, without the others' gradients, and then the least of all."""
    if any(map(is_shard, learn.model.parameters())):
        raise ValueError("batch_size_find lets each rank try by itself, and after to_fsdp none has a whole model: find it before, for a "
                         "bound, or try sizes by hand.")
    samples = first_batch(learn.data.train_dl)
    with unchanged(learn):
        by_oneself(learn)
        largest, bs = 0, 2      # of one sample there is no batch norm
        while bs <= max_bs and fits(learn, samples, bs, n_steps): largest, bs = bs, 2 * bs
        if not largest: largest = int(fits(learn, samples, 1, n_steps))
    found = min(learn.ranks.gather(largest))
    if found == 0: raise RuntimeError("not even one sample fits into memory: take a smaller model, or to_bf16().")
    return found


def by_oneself(learn: Learner) -> None:
    from learnkit.callbacks.auto_microbatch import AutoMicrobatch
    from learnkit.callbacks.distributed import Distributed
    from learnkit.callbacks.reduce_afterwards import ReduceAfterwards
    learn.callbacks = [cb for cb in learn.callbacks if not isinstance(cb, (AutoMicrobatch, Distributed, ReduceAfterwards))]
    learn.ranks, learn.world_size = Alone(), 1


def fits(learn: Learner, samples: Any, bs: int, n_steps: int) -> bool:
    loader = [grown(samples, bs)] * (n_steps * math.prod(cb.batches_per_step for cb in learn.callbacks))
    learn.data = copy.copy(learn.data)
    learn.data.train_dl, learn.data.valid_dl = loader, None
    try: learn.fit(1, max_steps=n_steps)
    except BaseException as error:
        if not is_out_of_memory(error): raise
        return False
    finally:
        learn.data.train_dl = [samples]
        del loader
        if learn.device.type != "cpu":
            gc.collect()
            torch.accelerator.memory.empty_cache()
    return True


def grown(batch: Any, bs: int) -> Any:
    """A batch of bs samples, those of `batch` over and over."""
    n = len(next(t for t in tensors_in(batch) if t.ndim))
    rows = torch.arange(bs) % n
    return map_tensors(lambda t: t.index_select(0, rows.to(t.device)) if t.ndim and len(t) == n else t, batch)
