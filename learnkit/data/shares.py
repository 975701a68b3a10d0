"""Which rank has which samples. One rule: the k-th global batch is the same at every world size, and each rank has its
part of it.

With b samples a rank and a step, and W ranks, the k-th global batch is `order[k*b*W : (k+1)*b*W]`, and rank r has its
r-th contiguous part. The parts, joined in rank order, are the global batch again. So 2 ranks of b samples see what one
process of 2b samples sees, step by step.

Training keeps all ranks in step (`even=True`): a last, smaller global batch is divided as evenly as possible (parts
differ by at most one sample; weigh their losses by their sizes). It is dropped with `drop_last`, and also if it has
fewer samples than there are ranks. Evaluation (`even=False`) sees each sample exactly once: nothing is padded, and
ranks may have unequal numbers of batches, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")


def share_of_rank(n: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return (start, stop) of the contiguous part of n samples that a rank has. Sizes differ by at most one, and the
    first ranks have the larger parts.
    """
    size, n_larger = divmod(n, world_size)
    start = rank * size + min(rank, n_larger)
    return start, start + size + (rank < n_larger)


def shard_batch(batch: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return the contiguous part of a global batch that `rank` has, see `share_of_rank`."""
    start, stop = share_of_rank(len(batch), rank, world_size)
    return batch[start:stop]


def global_batches(order: Iterable[T], global_batch_size: int, *, drop_last: bool = False) -> Iterator[list[T]]:
    """Yield `order` in lists of `global_batch_size`; the last one may be smaller, unless `drop_last`."""
    samples = iter(order)
    while batch := list(islice(samples, global_batch_size)):
        if len(batch) == global_batch_size or not drop_last:
            yield batch


def rank_batches(
    order: Iterable[T], batch_size: int, rank: int, world_size: int, *, drop_last: bool = False, even: bool = True
) -> Iterator[Sequence[T]]:
    """Yield the batches that `rank` has of `order`, of `batch_size` samples each.

    Args:
        even: for training: all ranks have the same number of batches. Otherwise each sample belongs to some rank, and
            a rank may have one batch less than another.
    """
    for batch in global_batches(order, batch_size * world_size, drop_last=drop_last):
        if even and len(batch) < world_size:
            return
        start, stop = share_of_rank(len(batch), rank, world_size)
        if start < stop:
            yield batch[start:stop]


def n_rank_batches(
    n_samples: int, batch_size: int, rank: int, world_size: int, *, drop_last: bool = False, even: bool = True
) -> int:
    """Return how many batches `rank_batches` yields."""
    n_whole, rest = divmod(n_samples, batch_size * world_size)
    has_rest = not drop_last and rest >= (world_size if even else rank + 1)
    return n_whole + has_rest


def global_batch_size_at(k: int, n_samples: int, items_per_batch: int) -> int:
    """Return the number of samples that all ranks have in step k, counted from 0."""
    return min(items_per_batch, n_samples - k * items_per_batch)


def dataset_order(n_samples: int, batch_size: int, world_size: int) -> torch.Tensor:
    """Return the index that puts rows gathered after an evaluation (all of rank 0, all of rank 1, …) into the order of
    the dataset: int64 (n_samples,).

    Example:
        `gather_for_metrics(own_rows)[dataset_order(n, batch_size, get_world_size())]`
    """
    positions = [
        i
        for rank in range(world_size)
        for batch in rank_batches(range(n_samples), batch_size, rank, world_size, even=False)
        for i in batch
    ]
    return torch.argsort(torch.tensor(positions, dtype=torch.int64))
