"""Loaders: whole tensors cut by index, DataLoaders, and any other iterable of batches, bundled under the names of their
tasks.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, TensorDataset

from learnkit.data.fork_rng import unmoved
from learnkit.data.generators import unmoved_loaders
from learnkit.data.order import EpochSampler, PrivateGenerator, permutation
from learnkit.data.prefetch import ahead
from learnkit.data.random import BatchTransform, transform_batch
from learnkit.data.shares import global_batch_size_at, n_rank_batches, share_of_rank
from learnkit.devices.accelerator import accelerator, can_pin
from learnkit.devices.nested import describe
from learnkit.devices.transfer import mover, sent


class TensorLoader:
    """Batches cut by index out of whole tensors: no worker, no per-sample Python, no copy where the order is plain.

    `tensors`: at least one, of equal length (samples, …), wherever they are to stay. `batch_tfms` are applied to the
    first one of each batch: functions `x -> x`, or `SampleTransform`s, which get the draws of (seed, epoch, sample).
    Yields tuples with as many tensors. Iterating it walks through the epochs, as EpochSampler does.
    `n_ahead`: for tensors that lie in a file, or do not fit on `device`: so many batches are cut by a thread ahead of
    time, and copied to `device` (None: where the tensors are) from pinned memory.

    >>> x, y = torch.arange(6.), torch.arange(6)
    >>> [len(yb) for xb, yb in TensorLoader((x, y), bs=4, drop_last=False)]
    [4, 2]
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        *,
        bs: int = 64,
        shuffle: bool = False,
        drop_last: bool = False,
        batch_tfms: Sequence[BatchTransform] = (),
        seed: int | None = None,
        n_ahead: int = 0,
        device: torch.device | None = None,
    ) -> None:
        check_batch_size("bs", bs)
        if device is not None and not n_ahead:
            raise ValueError(f"device={device} needs n_ahead=1 or more; else move the tensors there.")
        self.tensors = check_tensors(tensors)
        self.n_ahead, self.device = n_ahead, device
        self.batch_size, self.drop_last, self.batch_tfms = bs, drop_last, tuple(batch_tfms)
        self.rank, self.world_size, self.even = 0, 1, True  # see sharded
        self.n_left_out = 0  # see rest
        self.sampler = EpochSampler(len(self.tensors[0]), shuffle=shuffle, seed=seed)

    @property
    def n_samples(self) -> int:
        return self.sampler.n

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        """Make `epoch` the next one; `seed` replaces the loader's own."""
        self.sampler.set_epoch(epoch, seed)

    def in_dataset_order(self) -> TensorLoader:
        """The same samples in dataset order, each once."""
        return TensorLoader(
            self.tensors,
            bs=self.batch_size,
            batch_tfms=self.batch_tfms,
            seed=self.sampler.seed,
            n_ahead=self.n_ahead,
            device=self.device,
        )

    def to(self, device: torch.device) -> TensorLoader:
        """The same batches on `device`, and the tensors too, unless they are cut ahead of time where they are."""
        loader = copy.copy(self)
        if self.n_ahead:
            loader.device = device
        else:
            loader.tensors = tuple(t.to(device) for t in self.tensors)
        return loader

    def sharded(self, rank: int, world_size: int, *, even: bool) -> TensorLoader:
        """One rank's part of every global batch of `batch_size * world_size`; the k-th is the same at every world size.

        `even`, for training: a last global batch with fewer samples than ranks is left out, so that all have equally
        many.
        """
        loader = copy.copy(self)
        loader.rank, loader.world_size, loader.even = rank, world_size, even
        return loader

    @property
    def items_per_batch(self) -> int:
        return self.batch_size * self.world_size

    def rest(self, n: int) -> TensorLoader:
        """The same epochs, each from its n-th sample on."""
        loader = copy.copy(self)
        loader.n_left_out = n
        return loader

    def global_batch_size(self, k: int) -> int:
        """The number of samples of all ranks in the k-th batch."""
        return global_batch_size_at(k, self.n_samples - self.n_left_out, self.items_per_batch)

    def __len__(self) -> int:
        n = max(0, self.n_samples - self.n_left_out)
        return n_rank_batches(n, self.batch_size, self.rank, self.world_size, drop_last=self.drop_last, even=self.even)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        sampler, epoch, order = self.sampler, self.sampler.next_epoch(), None
        if sampler.shuffle:
            order = sent(permutation(sampler.n, sampler.seed, epoch), self.tensors[0].device)
        return self.batches(order, sampler.seed, epoch)

    def batches(self, order: Tensor | None, seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        is_host = (
            self.tensors[0].device.type == "cpu"
        )  # a device cuts batches without the host waiting: it needs no thread
        cuts = self.cuts(order, pin=is_host and self.device is not None and can_pin(self.device))
        if self.n_ahead and is_host:
            cuts = ahead(cuts, self.n_ahead)
        if self.device is not None:
            cuts = map(mover(self.device), cuts)
        for start, numbers, batch in cuts:
            if self.batch_tfms:
                index = partial(numbers_of, batch[0], start, numbers)
                batch = (transform_batch(batch[0], self.batch_tfms, seed, epoch, index), *batch[1:])
            yield batch

    def cuts(self, order: Tensor | None, *, pin: bool) -> Iterator[tuple[int, Tensor | None, tuple[Tensor, ...]]]:
        """(start, numbers, tensors) of each batch: its place in the order, and the samples' numbers where the order is
        not plain.
        """
        step, n = self.items_per_batch, self.n_samples
        for first in range(self.n_left_out, self.n_left_out + len(self) * step, step):
            start, stop = share_of_rank(min(step, n - first), self.rank, self.world_size)
            start, stop = first + start, first + stop
            numbers = None if order is None else order[start:stop]
            if pin:
                yield (
                    start,
                    None if numbers is None else numbers.pin_memory(),
                    in_pinned_memory(self.tensors, start, stop, numbers),
                )
            elif numbers is None:
                yield start, None, tuple([t[start:stop] for t in self.tensors])
            else:
                yield start, numbers, tuple([t.index_select(0, numbers) for t in self.tensors])


def in_pinned_memory(tensors: Sequence[Tensor], start: int, stop: int, numbers: Tensor | None) -> tuple[Tensor, ...]:
    """The samples start … stop - 1 of each, or those of these numbers, in memory from which a copy to a device does not
    wait.
    """
    if numbers is None:
        return tuple(t[start:stop].pin_memory() for t in tensors)
    rooms = [torch.empty((len(numbers), *t.shape[1:]), dtype=t.dtype, pin_memory=True) for t in tensors]
    return tuple(torch.index_select(t, 0, numbers, out=room) for t, room in zip(tensors, rooms, strict=True))


def numbers_of(batch: Tensor, start: int, numbers: Tensor | None) -> Tensor:
    """The samples' numbers in the data set: int64 (samples,), where the batch is."""
    return torch.arange(start, start + len(batch), device=batch.device) if numbers is None else numbers


class DataBunch:
    """The loaders of one task, under the names that the Learner looks for.

    `train_dl`, `valid_dl`, `test_dl`: DataLoaders or any re-iterable of batches; not a generator, which can be read
    only once. `loss_func`: what a Learner uses where it is not given one. `classes`: the names of the targets' classes.

    >>> data = DataBunch.from_tensors((torch.randn(32, 4), torch.randn(32)), bs=8)
    >>> len(data.train_dl)
    4
    """

    def __init__(
        self,
        train_dl: Iterable[Any],
        valid_dl: Iterable[Any] | None = None,
        test_dl: Iterable[Any] | None = None,
        *,
        loss_func: Callable[..., Tensor] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.train_dl, self.valid_dl, self.test_dl = train_dl, valid_dl, test_dl
        self.loss_func = loss_func
        self.classes = list(classes) if classes is not None else None
        for name in ("train_dl", "valid_dl", "test_dl"):
            if getattr(self, name) is not None:
                check_loader(getattr(self, name), name)

    @classmethod
    def create(
        cls,
        train_ds: Any,
        valid_ds: Any = None,
        test_ds: Any = None,
        *,
        bs: int = 64,
        val_bs: int | None = None,
        num_workers: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = True,
        seed: int | None = None,
    ) -> DataBunch:
        """DataLoaders over datasets: the training one shuffled by (seed, epoch), the others in order and complete.

        `bs` and `num_workers` are per process; `val_bs` defaults to `bs`. `num_workers=None`: none for a TensorDataset,
        else this process's share of the cores, at most 16, where workers can be forked. `drop_last` leaves out a last
        training batch that is smaller than `bs`.
        """
        check_batch_size("bs", bs)
        val_bs = bs if val_bs is None else val_bs
        check_batch_size("val_bs", val_bs)
        device = accelerator()
        pins = device is not None and can_pin(device)

        def loader(dataset: Any, size: int, *, train: bool) -> DataLoader[Any] | None:
            if dataset is None:
                return None
            sampler = (
                None
                if isinstance(dataset, IterableDataset)
                else EpochSampler(check_dataset(dataset), shuffle=train, seed=seed)
            )
            return DataLoader(
                dataset,
                batch_size=size,
                sampler=sampler,
                drop_last=train and drop_last,
                collate_fn=collate_fn,
                num_workers=default_workers(dataset) if num_workers is None else num_workers,
                pin_memory=pins,
                generator=PrivateGenerator(),
            )

        return cls(
            loader(train_ds, bs, train=True),  # type: ignore[arg-type]
            loader(valid_ds, val_bs, train=False),
            loader(test_ds, val_bs, train=False),
            classes=getattr(train_ds, "classes", None),
        )

    @classmethod
    def from_tensors(
        cls,
        train: Sequence[Tensor],
        valid: Sequence[Tensor] | None = None,
        test: Sequence[Tensor] | None = None,
        *,
        bs: int = 64,
        val_bs: int | None = None,
        batch_tfms: Any = (),
        drop_last: bool = True,
        seed: int | None = None,
        device: torch.device | str | None = None,
        classes: Sequence[str] | None = None,
    ) -> DataBunch:
        """Whole tensors `(x, …, y)`, moved to `device` once, batches cut by index.

        `batch_tfms`: functions of a batch's first input, `x -> x`, or `SampleTransform`s, applied in order to every
        batch; or a pair of such sequences, one for training and one for the rest. `device=None`: the accelerator, else
        the CPU.
        """
        place = default_device() if device is None else torch.device(device)
        train_tfms, other_tfms = split_transforms(batch_tfms)
        val_bs = bs if val_bs is None else val_bs
        check_batch_size("val_bs", val_bs)

        def loader(tensors: Sequence[Tensor] | None, size: int, *, training: bool) -> TensorLoader | None:
            if tensors is None:
                return None
            return TensorLoader(
                [t.to(place) for t in check_tensors(tensors)],
                bs=size,
                shuffle=training,
                seed=seed,
                drop_last=training and drop_last,
                batch_tfms=train_tfms if training else other_tfms,
            )

        train_dl = loader(train, bs, training=True)
        assert train_dl is not None
        return cls(
            train_dl, loader(valid, val_bs, training=False), loader(test, val_bs, training=False), classes=classes
        )

    def one_batch(self) -> Any:
        """The first batch that the next training pass would give; nothing moves on because of it."""
        return first_batch(self.train_dl)


def first_batch(loader: Any) -> Any:
    """A loader's next first batch; its epoch, its generators and the global random state stay as they are."""
    with unmoved_loaders(loader), same_random_state(loader):
        for batch in loader:
            return batch
    raise ValueError(f"{type(loader).__name__} gave no batch: it is empty.")


@contextmanager
def same_random_state(loader: Any) -> Iterator[None]:
    """What a loader draws in the block from global generators, also of devices on which it transforms, is not
    missed.
    """
    places = [t.device for t in getattr(loader, "tensors", ())] + [getattr(loader, "device", None)]
    with unmoved(*(place for place in places if isinstance(place, torch.device))):
        yield


def split_transforms(batch_tfms: Any) -> tuple[tuple[BatchTransform, ...], tuple[BatchTransform, ...]]:
    """(for training, for the rest) from one sequence of functions for both, or from a pair of sequences."""
    tfms: tuple[Any, ...] = (batch_tfms,) if callable(batch_tfms) else tuple(batch_tfms)
    if all(callable(t) for t in tfms):
        return tfms, tfms
    if len(tfms) == 2 and not any(callable(t) for t in tfms):
        return tuple(tfms[0]), tuple(tfms[1])
    raise TypeError(
        f"batch_tfms={batch_tfms!r}: expected a sequence of functions x -> x, or a pair of such sequences "
        "(for training, for validation)."
    )


def in_order(loader: Any) -> Any:
    """The loader for an evaluation: each sample once, in dataset order, where the order is ours or torch's to choose.

    A loader with a sampler or batch sampler of the user's own, and any other iterable, is taken as it is.
    """
    if callable(own := getattr(loader, "in_dataset_order", None)):
        return own()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    sampler = loader.sampler
    shuffled = (
        isinstance(sampler, RandomSampler)
        or (isinstance(sampler, EpochSampler) and sampler.shuffle)
        or (type(sampler) is DistributedSampler and sampler.num_replicas == 1)
    )
    if not shuffled and not loader.drop_last:
        return loader
    settings = dict(
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        generator=PrivateGenerator(),
    )
    return DataLoader(loader.dataset, sampler=None if shuffled else loader.sampler, **settings)  # type: ignore[arg-type]


def n_batches(loader: Any) -> int | None:
    """The loader's length, None where it does not know."""
    if not isinstance(loader, Sized):
        return None
    try:
        return len(loader)
    except TypeError:
        return None  # a DataLoader over an IterableDataset without a length


def default_device() -> torch.device:
    """The accelerator that this process uses (of several processes each has its own), else the CPU."""
    if accelerator() is None:
        return torch.device("cpu")
    from learnkit.distributed.world import get_device

    return get_device()


def default_workers(dataset: Any) -> int:
    """Workers of one process: its share of the cores, at most 16; none where they would not help, or need a main
    guard.
    """
    if isinstance(dataset, TensorDataset) or multiprocessing.get_start_method() != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    from learnkit.distributed.world import get_local_world_size

    return min(16, cores // get_local_world_size())


def check_batch_size(name: str, bs: Any) -> None:
    if isinstance(bs, bool) or not isinstance(bs, int):
        raise TypeError(f"{name}={bs!r} is not a whole number.")
    if bs < 1:
        raise ValueError(f"{name}={bs}: a batch has at least one sample.")


def check_dataset(dataset: Any) -> int:
    if not isinstance(dataset, Sized) or not callable(getattr(dataset, "__getitem__", None)):
        raise TypeError(
            f"{type(dataset).__name__} is not a dataset: expected __len__ and __getitem__, or an IterableDataset. "
            "Ready-made loaders go to DataBunch(train_dl, valid_dl)."
        )
    return len(dataset)


def check_tensors(tensors: Any) -> tuple[Tensor, ...]:
    if (
        isinstance(tensors, Tensor)
        or not isinstance(tensors, Sequence)
        or not all(isinstance(t, Tensor) for t in tensors)
    ):
        raise TypeError(f"got {describe(tensors)}, expected a tuple of tensors such as (x, y).")
    if not tensors or any(t.ndim == 0 for t in tensors) or len({len(t) for t in tensors}) > 1:
        raise ValueError(f"got {describe(tensors)}, expected at least one tensor, all with the same first dimension.")
    return tuple(tensors)


def check_loader(loader: Any, name: str) -> None:
    """Refuse what cannot be iterated anew at each epoch, and what holds no batch."""
    if isinstance(loader, Tensor) or not callable(getattr(loader, "__iter__", None)):
        raise TypeError(
            f"{name} is {describe(loader)}, which is no loader: expected a DataLoader or any re-iterable of batches. "
            "Tensors go to DataBunch.from_tensors, datasets to DataBunch.create."
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which can be read only once, so the second epoch would be empty. "
            "Give a DataLoader, a list of batches, or an object whose __iter__ starts anew."
        )
    if n_batches(loader) == 0:
        raise ValueError(f"{name} is empty: {why_empty(loader)}")


def why_empty(loader: Any) -> str:
    n, bs = getattr(loader, "n_samples", None), getattr(loader, "batch_size", None)
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized):
        n = len(loader.dataset)
    if n and getattr(loader, "drop_last", False):
        return (
            f"its {n} samples are fewer than the batch size {bs}, and drop_last=True drops the incomplete batch. "
            f"Take bs={n} or less, or drop_last=False."
        )
    return f"it holds {0 if n is None else n} samples. Check the path or the filter that selected them."
