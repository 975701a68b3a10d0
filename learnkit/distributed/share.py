"""One rank's share of a Learner's loaders, in step with the shares of the other ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from learnkit.data.loaders import TensorLoader, n_batches
from learnkit.data.order import PrivateGenerator, PrivateLoader, generator_of, mix, parts_of, private
from learnkit.distributed.shard import InStep, prepare_data_loader
from learnkit.distributed.world import seed_everything

if TYPE_CHECKING:
    from learnkit.learner import Learner

NO_BATCH = 2**62  # larger than any number of a batch


def training_share(loader: Any, learn: Learner) -> Any:
    """This rank's part of the training loader, with as many batches as the other ranks have."""
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
    """This rank's part of an evaluation's loader: each sample is on exactly one rank."""
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
    """Workers are seeded from the loader's generator, which may be the same on all ranks: their augmentations must
    still differ.
    """
    loader._iterator = None  # persistent workers belong to the original
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
    """(batch index -> samples of all ranks in that batch, the first index from which the shares may differ in size)."""
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


def batch_size_of(loader: Any) -> int | None:
    part = next((part for part in parts_in_step(loader) if getattr(part, "batch_size", None) is not None), None)
    return None if part is None else int(part.batch_size)


def n_samples_of(loader: Any) -> int | None:
    """Samples of all ranks in an epoch; None where the loader is not sharded by learnkit."""
    part = next((part for part in parts_in_step(loader) if hasattr(part, "global_batch_size")), None)
    return n_batches(getattr(part, "sampler", None))
