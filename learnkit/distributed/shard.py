"""Loaders of one rank's part: any sampler, batch sampler, iterable of batches or stream, sharded by the rule of
learnkit.data.shares.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    get_worker_info,
)

from learnkit.data.batch import count_samples, split_batch
from learnkit.data.generators import generator_state, order_generators, put_states
from learnkit.data.order import (
    Around,
    EpochOrder,
    PrivateGenerator,
    divider_of,
    draws_globally,
    generator_of,
    items_from,
    items_per_batch,
    mix,
    parts_of,
    privately,
    rest_of,
    set_seed_and_epoch,
)
from learnkit.data.shares import global_batch_size_at, global_batches, n_rank_batches, rank_batches
from learnkit.devices.transfer import Moved
from learnkit.distributed.reduce import agree, broadcast_from_main
from learnkit.distributed.world import get_rank, get_world_size

T = TypeVar("T")


# --- samplers ----------------------------------------------------------------


@runtime_checkable
class HasEpoch(Protocol):
    def set_epoch(self, epoch: int) -> None: ...


def set_epoch(loader: Any, epoch: int) -> None:
    """Makes `epoch` the next one of a loader, its sampler or its batch sampler, whichever listens. Once an epoch."""
    for part in parts_of(loader):
        if isinstance(part, HasEpoch):
            part.set_epoch(epoch)


class ShardedBatchSampler(EpochOrder):
    """The batches of one rank, out of any sampler of the user's: weighted, sorted by length, and so on.

    `sampler` yields indices, in the order of the whole data set. It may draw from torch's, Python's or numpy's global
    generators: while it is asked these are seeded by (seed, epoch), on every rank alike, and put back. A generator that
    it owns is seeded too, unless `keep_generator`. With `batch_size` None it is a batch sampler: its k-th batch goes to
    rank k % world_size, and in training (`even`) a last round that has no batch for every rank is left out. Epochs
    count by themselves; `set_epoch` says which one is next.

    >>> [list(ShardedBatchSampler(range(7), 2, rank=r, world_size=2)) for r in range(2)]
    [[[0, 1], [4, 5]], [[2, 3], [6]]]
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        batch_size: int | None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
        even: bool = True,
        seed: int = 0,
        keep_generator: bool = False,
    ) -> None:
        super().__init__(seed)
        if isinstance(sampler, Iterator):
            raise TypeError(
                f"sampler is a {type(sampler).__name__}, which can be read only once: expected a sampler, whose "
                "__iter__ starts anew at each epoch."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, expected 1 or more.")
        self.sampler, self.batch_size, self.drop_last, self.even = sampler, batch_size, drop_last, even
        self.rank = get_rank() if rank is None else rank
        self.world_size = get_world_size() if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}, expected 0 to {self.world_size - 1}.")
        self.keep_generator = keep_generator
        self.n_left_out = 0  # see rest
        self.sizes: list[int] = []  # of a batch sampler: the samples of all ranks in each step so far
        self.n_drawn = 0  # samples of this epoch that all ranks have been given

    @property
    def items_per_batch(self) -> int:
        return (self.batch_size or 1) * self.world_size

    def rest(self, n: int) -> ShardedBatchSampler:
        """The same epochs, each from the n-th item of `sampler` on."""
        own = copy.copy(self)
        own.n_left_out, own.sizes = n, []
        return own

    @property
    def n_items(self) -> int:
        """Of `sampler`, without those left out; raises TypeError where it has no length."""
        return max(0, length_of(self.sampler) - self.n_left_out)

    def global_batch_size(self, k: int) -> int:
        """The number of samples that all ranks have in step k, counted from 0; where no length tells, once it was given
        out.
        """
        if self.batch_size is None:
            return self.sizes[k]
        try:
            n = self.n_items
        except TypeError:
            n = self.n_drawn
        return global_batch_size_at(k, n, self.items_per_batch)

    def __len__(self) -> int:
        per_rank = self.batch_size or 1  # of a batch sampler, batches are dealt out as if each were one sample
        return n_rank_batches(
            self.n_items, per_rank, self.rank, self.world_size, drop_last=self.drop_last, even=self.even
        )

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: a DataLoader with workers calls iter() twice and reads one of them, which is the one that counts.
        epoch, seed = self.next_epoch(), self.seed
        if isinstance(self.sampler, EpochOrder):
            self.sampler.set_epoch(epoch, seed)
        elif isinstance(self.sampler, HasEpoch):
            self.sampler.set_epoch(epoch)
        order, place = self.order(mix(seed, epoch)), (self.rank, self.world_size)
        if self.batch_size is None:
            yield from dealt_out(order, *place, even=self.even, sizes=self.sizes, size=len)
        else:
            yield from map(list, rank_batches(order, self.batch_size, *place, drop_last=self.drop_last, even=self.even))

    def order(self, seed: int) -> Iterator[Any]:
        """The sampler's items; under borrowed global generators only where it may draw from them, which costs 0.17 ms a
        batch.
        """
        generator, n = generator_of(self.sampler), self.n_left_out
        if draws_globally(self.sampler):
            order = islice(privately(self.sampler, seed, self.items_per_batch, reseed=not self.keep_generator), n, None)
        elif generator is None and isinstance(self.sampler, Sampler) and hasattr(self.sampler, "generator"):
            own: Any = copy.copy(self.sampler)  # torch's would draw from the global one
            own.generator = torch.Generator().manual_seed(seed)
            order = items_from(own, n)
        else:
            is_ours = isinstance(generator, PrivateGenerator)
            if generator is not None and (is_ours or not self.keep_generator):
                generator.manual_seed(seed)
            order = items_from(self.sampler, n)
        return order if has_length(self.sampler) else self.counted(order)

    def counted(self, order: Iterable[int]) -> Iterator[int]:
        self.n_drawn = 0
        for self.n_drawn, sample in enumerate(order, 1):
            yield sample


def has_length(sampler: Any) -> bool:
    try:
        return length_of(sampler) >= 0
    except TypeError:
        return False


def length_of(sampler: Any) -> int:
    if not isinstance(sampler, Sized):
        raise TypeError(f"{type(sampler).__name__} has no len().")
    return len(sampler)


def dealt_out(
    batches: Iterable[T], rank: int, world_size: int, *, even: bool, sizes: list[int], size: Callable[[T], int]
) -> Iterator[T]:
    """Every world_size-th batch; into `sizes` goes how many samples all ranks have in each step."""
    sizes.clear()
    for step in global_batches(batches, world_size, drop_last=even):
        sizes.append(sum(map(size, step)))
        if rank < len(step):
            yield step[rank]


# --- loaders -----------------------------------------------------------------


class ShardedLoader(Around):
    """Every world_size-th batch of any re-iterable of batches that is the same on every rank.

    In training (`even`) a last round that has no batch for every rank is left out.

    >>> [list(ShardedLoader("abcde", rank=r, world_size=2)) for r in range(2)]
    [['a', 'c'], ['b', 'd']]
    """

    def __init__(
        self, loader: Iterable[Any], *, rank: int | None = None, world_size: int | None = None, even: bool = True
    ) -> None:
        self.loader, self.even = loader, even
        self.rank = get_rank() if rank is None else rank
        self.world_size = get_world_size() if world_size is None else world_size
        self.sizes: list[int] = []  # the samples of all ranks in each step so far

    @property
    def items_per_batch(self) -> int:
        return self.world_size

    def rest(self, n: int) -> ShardedLoader:
        """The same epochs, each from the n-th batch of `loader` on."""
        return ShardedLoader(rest_of(self.loader, n), rank=self.rank, world_size=self.world_size, even=self.even)

    def global_batch_size(self, k: int) -> int:
        """The number of samples that all ranks have in step k, counted from 0, once it was given out."""
        return self.sizes[k]

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the loader, if it listens."""
        set_epoch(self.loader, epoch)

    def __len__(self) -> int:
        return n_rank_batches(length_of(self.loader), 1, self.rank, self.world_size, even=self.even)

    def __iter__(self) -> Iterator[Any]:
        return dealt_out(self.loader, self.rank, self.world_size, even=self.even, sizes=self.sizes, size=n_samples_in)


def n_samples_in(batch: Any) -> int:
    return count_samples(*split_batch(batch))


class InStep(Around, EpochOrder):
    """A rank's batches for as long as every rank has another one: for loaders whose lengths nobody knows.

    Costs one small collective a batch. The batches that some ranks have more are left out, on each of them.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        super().__init__(None)
        self.loader = loader

    @property
    def items_per_batch(self) -> int:
        return items_per_batch(self.loader)

    def rest(self, n: int) -> InStep:
        """The same epochs, each from the n-th item on."""
        return InStep(rest_of(self.loader, n))

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        """Passed on to the loader, if it listens; its private generators are seeded anew."""
        super().set_epoch(epoch, seed)
        set_seed_and_epoch(self.loader, seed, epoch)

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self.loader), object()
        while not agree((batch := next(batches, end)) is end):
            yield batch


class ShardedStream(IterableDataset):
    """A rank's and worker's part of an IterableDataset whose samples come in the same order in every process.

    Every process reads the whole stream and keeps its own; with `batch_size` as the DataLoader's the rule above holds
    for any number of workers. In training (`even`) a last round without a full batch for every rank is left out.

    >>> [list(ShardedStream(range(9), 2, rank=r, world_size=2)) for r in range(2)]
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """

    is_sharded = True

    def __init__(
        self,
        dataset: Iterable[Any],
        batch_size: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        even: bool = True,
    ) -> None:
        self.dataset, self.batch_size, self.even = dataset, batch_size, even
        self.rank = get_rank() if rank is None else rank
        self.world_size = get_world_size() if world_size is None else world_size

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the dataset, if it listens. (Persistent workers hold copies, which hear nothing.)"""
        set_epoch(self.dataset, epoch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, n_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = rank_batches(
            self.dataset, self.batch_size, self.rank, self.world_size, drop_last=self.even, even=self.even
        )
        for batch in islice(batches, number, None, n_workers):
            yield from batch  # a DataLoader asks its workers in turn


def prepare_data_loader(
    loader: Any,
    *,
    seed: int | None = None,
    training: bool | None = None,
    keep_generator: bool = False,
    device: torch.device | None = None,
) -> Any:
    """A loader of this rank's part: the same kind, with all its settings, over a sharded order. See `set_epoch`.

    In a world of one the loader itself, unless a `seed` is given, which fixes the order of a shuffled one at any world
    size. `training=None`: a loader is for training if it shuffles, drops the last batch or has a sampler of its own.
    For an unshuffled training loader say so: its ranks must keep step, while an evaluation must see every sample.
    A DataLoader with a sampler is wrapped, sampler and all; one with a batch sampler, and any other iterable of
    batches, is dealt out batch by batch; one with an attribute `is_sharded = True` stays as it is. So does one whose
    sampler divides by itself, as torch's DistributedSampler; with `training=False` that one is taken out, since it
    repeats samples. An IterableDataset is refused, with advice.
    `keep_generator`: a generator that the sampler owns is not seeded anew, but goes on from rank 0's state. `device`,
    such as `get_device()`: batches come there, alone too; to a GPU beside the work on the batch before.
    """
    own = share_of(loader, seed, training, keep_generator)
    return own if device is None else Moved(own, device)


def share_of(loader: Any, seed: int | None, training: bool | None, keep_generator: bool) -> Any:
    if get_world_size() == 1 and seed is None:
        return loader
    if getattr(loader, "is_sharded", False):
        return loader
    if not isinstance(loader, DataLoader):
        return as_sharded(loader, training, keep_generator)
    if isinstance(loader.dataset, IterableDataset):
        return check_stream(loader)
    if (found := divider_of(loader)) is not None:
        name, n = type(found[0]).__name__, found[1]
        check_divided(name, n)
        if training is None:
            return loader
        if (whole := undivided(loader, training)) is None:
            return told_divided(loader, name, training)
        loader = whole
    sampler, batch_size, drop_last = order_of(loader)
    own = sampler.seed if isinstance(sampler, EpochOrder) else torch.initial_seed()
    shared = broadcast_from_main(own) if seed is None else seed
    if keep_generator:
        share_states(loader)
    even = drop_last or not isinstance(sampler, SequentialSampler) if training is None else training
    batch_sampler = ShardedBatchSampler(
        sampler, batch_size, drop_last=even and drop_last, even=even, seed=shared, keep_generator=keep_generator
    )
    return rebuilt_with(loader, batch_sampler, shared)


def check_divided(name: str, n: int) -> None:
    if n == get_world_size():
        return
    raise ValueError(
        f"the {name} of this DataLoader divides its samples among {n} processes, and there are {get_world_size()}. "
        "Leave it out, as learnkit divides the loader, or build it with num_replicas=get_world_size(), rank=get_rank()."
    )


def undivided(loader: DataLoader[Any], training: bool) -> DataLoader[Any] | None:
    """The loader over the whole order, where it is torch's own DistributedSampler that divides it: in training the
    order of the epoch, in an evaluation that of the dataset; without the samples that it repeats. Else None.
    """
    batches = loader.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else None
    if type(sampler) is not DistributedSampler:
        return None
    whole = copy.copy(loader)
    order: Any = SequentialSampler(sampler.dataset)  # type: ignore[arg-type]
    if training:
        order = DistributedSampler(sampler.dataset, 1, 0, shuffle=sampler.shuffle, seed=sampler.seed)
    object.__setattr__(whole, "sampler", order)  # DataLoader refuses a plain assignment
    object.__setattr__(whole, "batch_sampler", BatchSampler(order, batches.batch_size, batches.drop_last))  # type: ignore[union-attr]
    return whole


def told_divided(loader: DataLoader[Any], name: str, training: bool) -> DataLoader[Any]:
    """The loader as it is, with a word about what that means."""
    if get_rank() == 0:
        what = (
            "its shares are trained on as they are"
            if training
            else "its shares are evaluated as they are, in their order, and a sample that it gives twice counts twice"
        )
        warnings.warn(
            f"the {name} of this DataLoader divides its samples among the ranks by itself: {what}. To have learnkit "
            "divide them, give a sampler of the whole order, as for one process.",
            stacklevel=2,
        )
    return loader


def share_states(loader: Any) -> None:
    """The generators that a user gave to a loader or its samplers go on from rank 0's states, on every rank."""
    own = order_generators(loader)
    if own:
        put_states(own, broadcast_from_main([generator_state(generator) for generator in own]), "the order of samples")


def as_sharded(loader: Any, training: bool | None, keep_generator: bool) -> Any:
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise TypeError(
            f"loader is a {type(loader).__name__}: expected a DataLoader, or an iterable of batches that starts "
            "anew each time."
        )
    if get_world_size() == 1:
        return loader
    if keep_generator:
        share_states(loader)
    return ShardedLoader(loader, even=training is not False)


def order_of(loader: DataLoader[Any]) -> tuple[Iterable[Any], int | None, bool]:
    """(sampler, batch size, drop_last); of a batch sampler of the user's own kind (it, None, False)."""
    batches = loader.batch_sampler
    if batches is None:
        raise ValueError(
            "the DataLoader has batch_size=None, so its dataset makes the batches: give it a sampler that "
            "yields this rank's share, or use batch_size."
        )
    return (
        (batches.sampler, batches.batch_size, batches.drop_last)
        if type(batches) is BatchSampler
        else (batches, None, False)
    )


def check_stream(loader: DataLoader[Any]) -> DataLoader[Any]:
    if get_world_size() == 1 or getattr(loader.dataset, "is_sharded", False):
        return loader
    name = type(loader.dataset).__name__
    raise TypeError(
        f"the dataset {name} is an IterableDataset: each rank and worker would read all of it. If its order is the "
        f"same in every process, wrap it: DataLoader(ShardedStream({name}(…), batch_size), batch_size). Else let "
        "its __iter__ read a part, number get_rank() * num_workers + get_worker_info().id of get_world_size() * "
        f"num_workers parts, and say so: {name}.is_sharded = True."
    )


def rebuilt_with(loader: DataLoader[Any], batch_sampler: ShardedBatchSampler, seed: int) -> DataLoader[Any]:
    """A copy, so that every setting is kept, of subclasses too; with another batch sampler and randomness of its
    own.
    """
    sharded = copy.copy(loader)
    sharded._iterator = None  # workers that live on belong to the original
    object.__setattr__(sharded, "batch_sampler", batch_sampler)  # DataLoader refuses a plain assignment
    if sharded.generator is None:  # it seeds the workers: else all ranks would draw the same augmentations
        sharded.generator = torch.Generator().manual_seed(mix(seed, batch_sampler.rank))
    return sharded
