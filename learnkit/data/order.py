"""The order of samples: a pure function of (seed, epoch), and of nothing else. Not of the number of workers or ranks,
of validation passes in between, or of the global random number generators.
"""

from __future__ import annotations

import copy
import hashlib
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SequentialSampler

T = TypeVar("T")
_lasting: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()  # the copies whose workers live on


def mix(*numbers: int) -> int:
    """One 63-bit seed made of several numbers, so that neighbouring epochs or ranks get unrelated streams."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n samples in an epoch: int64 (n,), on the CPU."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))


class PrivateGenerator(torch.Generator):
    """A loader's own source of randomness, seeded anew by (seed, epoch) at each pass; by the rank too, where it has
    one.
    """

    rank = 0


class EpochOrder:
    """What has an order by (seed, epoch). Iterating it by hand walks through the epochs 0, 1, 2, …; `set_epoch` says
    which is next.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = torch.initial_seed() if seed is None else seed
        self.epoch = 0

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        """Make `epoch` the next one; `seed` replaces its own."""
        self.epoch, self.seed = epoch, self.seed if seed is None else seed

    def next_epoch(self) -> int:
        """The epoch that begins now."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        return epoch


class EpochSampler(EpochOrder, Sampler[int]):
    """Each index of `range(n)` once, in an order that depends on (seed, epoch) alone.

    `seed=None` takes torch's initial seed, so `torch.manual_seed` before it is enough for the same order in every run.
    """

    def __init__(self, n: int, *, shuffle: bool = True, seed: int | None = None) -> None:
        super().__init__(seed)
        self.n, self.shuffle = n, shuffle

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return self.order_from(0)

    def order_from(self, start: int) -> Iterator[int]:
        """The next epoch, from its `start`-th sample on."""
        epoch = self.next_epoch()
        return iter(permutation(self.n, self.seed, epoch)[start:].tolist() if self.shuffle else range(start, self.n))


class PrivateSampler(EpochOrder, Sampler[Any]):
    """A sampler or batch sampler of somebody else's, which may draw from the global generators, made a function of
    (seed, epoch).
    """

    def __init__(self, sampler: Iterable[Any], seed: int | None = None) -> None:
        super().__init__(seed)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return privately(self.sampler, mix(self.seed, self.next_epoch()))


class RestSampler(EpochOrder, Sampler[Any]):
    """What a sampler or batch sampler yields from its n-th item on: the rest of an epoch that was begun before."""

    def __init__(self, sampler: Any, n: int) -> None:
        super().__init__(getattr(sampler, "seed", 0))
        self.sampler, self.n = sampler, n

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        super().set_epoch(epoch, seed)
        tell_epoch(self.sampler, epoch, seed)

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.n)

    def __iter__(self) -> Iterator[Any]:
        return items_from(self.sampler, self.n)


def items_from(sampler: Any, n: int) -> Iterator[Any]:
    """A sampler's items from the n-th on."""
    return sampler.order_from(n) if isinstance(sampler, EpochSampler) else islice(iter(sampler), n, None)


class Around:
    """What we put around a loader, as `loader`."""

    loader: Any


class PrivateLoader(Around, EpochOrder):
    """Batches of a loader of somebody else's, which may draw from the global generators, made a function of (seed,
    epoch).

    The generators are seeded while it is asked for a batch, and put back in between: what it gives depends neither on
    what a model draws meanwhile nor on the process. `n_left_out`: its batches from the n-th on; what comes before is
    read, and left out.
    """

    def __init__(self, loader: Any, seed: int | None = None, *, n_left_out: int = 0) -> None:
        super().__init__(seed)
        self.loader, self.n_left_out = loader, n_left_out

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)  # while it is being unpickled
        return getattr(self.loader, name)

    def rest(self, n: int) -> PrivateLoader:
        """The same epochs, each from its n-th batch on."""
        return PrivateLoader(self.loader, self.seed, n_left_out=n)

    def __len__(self) -> int:
        return max(0, len(self.loader) - self.n_left_out)

    def __iter__(self) -> Iterator[Any]:
        seed = mix(self.seed, self.next_epoch())
        if self.n_left_out:
            warn_of_reading_again(self.loader, self.n_left_out)
        has_workers = (
            isinstance(self.loader, DataLoader) and self.loader.num_workers > 0
        )  # which draw in processes of their own
        return islice(self.loader if has_workers else privately(self.loader, seed, 1), self.n_left_out, None)


def warn_of_reading_again(loader: Any, n: int) -> None:
    what = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
    warnings.warn(
        f"the first batches of this epoch, {n}, that were trained on before, are read again, and left out: {what} "
        f"cannot be indexed. A dataset with __getitem__ and __len__ goes on at once.",
        stacklevel=2,
    )


def tell_epoch(part: Any, epoch: int, seed: int | None) -> None:
    """Make `epoch` the next one of a loader or sampler that listens."""
    if isinstance(part, EpochOrder):
        part.set_epoch(epoch, seed)
    elif callable(getattr(part, "set_epoch", None)):
        part.set_epoch(epoch)


def private(loader: Any, seed: int | None = None) -> Any:
    """The loader with an order of (seed, epoch), where it is not one whose samplers and generators we know."""
    if isinstance(loader, DataLoader):
        return PrivateLoader(loader, seed) if is_stream(loader) else loader
    is_known = isinstance(loader, (list, tuple)) or hasattr(loader, "rest")  # ours, or one that says how to go on
    return loader if is_known else PrivateLoader(loader, seed)


def is_stream(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)


def items_per_batch(loader: Any) -> int:
    """How many items of the order of an epoch a step of all ranks takes: samples, or batches where the loader deals out
    batches.
    """
    if not isinstance(loader, DataLoader):
        return getattr(loader, "items_per_batch", 1)
    if is_stream(loader):
        return 1  # torch gives it a sampler, which counts nothing
    batches: Any = loader.batch_sampler
    own = batches.batch_size if type(batches) is BatchSampler else getattr(batches, "items_per_batch", 1)
    return own * n_divided(loader)


def rest_of(loader: Any, n: int) -> Any:
    """A loader whose next epoch begins at the n-th item of its order (see `items_per_batch`); samples before it are not
    read.
    """
    if n == 0:
        return loader
    if isinstance(loader, (list, tuple)):
        return loader[n:]
    if callable(getattr(loader, "rest", None)):
        return loader.rest(n)
    if not isinstance(loader, DataLoader) or is_stream(loader):
        return PrivateLoader(loader, n_left_out=n)
    own, n = copy.copy(loader), n // n_divided(loader)
    own._iterator = None  # workers that live on belong to the original
    batches: Any = loader.batch_sampler
    if batches is None:
        object.__setattr__(own, "sampler", RestSampler(loader.sampler, n))
    elif type(batches) is BatchSampler:
        rest = BatchSampler(RestSampler(batches.sampler, n), batches.batch_size, batches.drop_last)
        object.__setattr__(own, "batch_sampler", rest)
    else:
        object.__setattr__(
            own, "batch_sampler", batches.rest(n) if hasattr(batches, "rest") else RestSampler(batches, n)
        )
    return own


DIVIDED = (
    ("num_replicas", "rank"),
    ("world_size", "rank"),
    ("num_processes", "process_index"),
    ("_world_size", "_rank"),
)


def divider_of(loader: Any) -> tuple[Any, int] | None:
    """(sampler, number of ranks), where a sampler of somebody else's divides its samples among ranks by itself, as
    torch's DistributedSampler does.
    """
    for part in parts_of(loader):
        if isinstance(part, (EpochOrder, DataLoader)) or not isinstance(part, (Sampler, Iterable)):
            continue
        for many, which in DIVIDED:
            n, rank = getattr(part, many, None), getattr(part, which, None)
            if isinstance(n, int) and isinstance(rank, int) and n > 1:
                return part, n
    return None


def n_divided(loader: Any) -> int:
    found = divider_of(loader)
    return 1 if found is None else found[1]


# --- workers -----------------------------------------------------------------
class SeededIndices(list[Any]):
    """The indices of one batch, and the seed for what a worker draws while it loads them."""

    seed = 0


class SeededBatches(Sampler[Any]):
    """Gives each batch the seed (seed, epoch, rank, number): what a worker draws does not depend on the batches
    before.
    """

    def __init__(self, batches: Any, seed: int, first: int) -> None:
        self.batches, self.seed, self.first = batches, seed, first

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[SeededIndices]:
        for k, indices in enumerate(self.batches, self.first):
            own = SeededIndices(indices)
            own.seed = mix(self.seed, k)
            yield own


class SeededDataset:
    """A dataset that seeds its process's generators before each batch; everything else is the dataset's own."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":
            raise AttributeError(name)  # while it is being unpickled
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Any) -> list[Any]:
        if isinstance(indices, SeededIndices):
            seed_process(indices.seed)
        many: Any = getattr(self.dataset, "__getitems__", None)
        return many(indices) if many is not None else [self.dataset[i] for i in indices]


def seed_process(seed: int) -> None:
    """torch's, Python's and (where it is loaded) numpy's generators of a loader's worker."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def with_seeded_workers(loader: Any, seed: int, first: int) -> Any:
    """A copy of a DataLoader whose workers draw anew for each batch, the first one of which has the number `first`.

    Any other loader is taken as it is. Of one whose workers live on from epoch to epoch it is the same copy each time.
    """
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        return loader
    if is_stream(loader) or loader.batch_sampler is None:
        return loader
    if (own := _lasting.get(loader)) is None:
        own = copy.copy(loader)
        own._iterator = None
        object.__setattr__(own, "dataset", SeededDataset(loader.dataset))
        object.__setattr__(own, "batch_sampler", SeededBatches(loader.batch_sampler, seed, first))
        if loader.persistent_workers:
            _lasting[loader] = own
    batches: Any = own.batch_sampler
    batches.batches, batches.seed, batches.first = loader.batch_sampler, seed, first
    own.generator = loader.generator
    return own


# --- what a loader is made of ------------------------------------------------
def parts_of(loader: Any) -> list[Any]:
    """The loader and those of its samplers that exist: where an order, an epoch or a generator may live."""
    if isinstance(loader, PrivateLoader):
        return [loader, *parts_of(loader.loader)]
    found, layer = [loader, getattr(loader, "sampler", None)], getattr(loader, "batch_sampler", None)
    while layer is not None and layer not in found:
        found.append(layer)
        layer = getattr(layer, "batches", getattr(layer, "sampler", None))
    unique = {id(part): part for part in found if part is not None}
    return list(unique.values())


def generator_of(part: Any) -> torch.Generator | None:
    generator = getattr(part, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


def set_seed_and_epoch(loader: Any, seed: int | None, epoch: int) -> None:
    """Make the loader's next pass that of (seed, epoch), as far as it lets us: see `private_order`.

    `seed=None` keeps the seeds that the loader's own samplers have.
    """
    for part in parts_of(loader):
        tell_epoch(part, epoch, seed)
        if isinstance(generator := generator_of(part), PrivateGenerator):
            own = (generator.rank,) if generator.rank else ()
            generator.manual_seed(mix(torch.initial_seed() if seed is None else seed, epoch, *own))


@contextmanager
def private_order(*loaders: Any) -> Iterator[None]:
    """For a while, give DataLoaders and samplers that would draw from the global random state one of their own.

    Without this, iterating even an unshuffled DataLoader advances the global state, and a validation pass changes the
    order of the next epoch. A generator that the user gave is left alone.
    """
    with ExitStack() as undo:
        for loader in loaders:
            for part in parts_of(loader):
                if isinstance(part, (DataLoader, Sampler)) and getattr(part, "generator", part) is None:
                    part.generator = PrivateGenerator()  # type: ignore[union-attr]
                    undo.callback(setattr, part, "generator", None)
            if isinstance(loader, DataLoader):
                make_sampler_private(loader, undo)
        yield


def make_sampler_private(loader: DataLoader[Any], undo: ExitStack) -> None:
    """A sampler of a kind that we do not know may draw from any global generator."""
    batches: Any = loader.batch_sampler
    if batches is None:
        return
    if type(batches) is not BatchSampler:
        if draws_globally(batches):
            object.__setattr__(
                loader, "batch_sampler", PrivateSampler(batches)
            )  # DataLoader refuses a plain assignment
            undo.callback(object.__setattr__, loader, "batch_sampler", batches)
    elif draws_globally(sampler := batches.sampler):
        batches.sampler = PrivateSampler(sampler)
        undo.callback(setattr, batches, "sampler", sampler)


def draws_globally(sampler: Any) -> bool:
    """Whether a sampler might: not torch's own kinds, which have a generator or need none, nor a plain list or
    range.
    """
    known = type(sampler).__module__.startswith("torch.") or isinstance(sampler, (SequentialSampler, EpochOrder))
    return not known and not isinstance(sampler, (list, tuple, range, Tensor))


# --- global generators, borrowed ---------------------------------------------
def privately(sampler: Iterable[T], seed: int, at_a_time: int = 1024, *, reseed: bool = False) -> Iterator[T]:
    """What `sampler` yields when the global generators are seeded with `seed`; read in portions, and put back in
    between.

    `reseed`: a generator that the sampler owns is seeded too.
    """
    state = private_state(seed)
    with swapped(state):
        generator = generator_of(sampler)
        if generator is not None and reseed:
            generator.manual_seed(seed)
        samples = iter(sampler)
    while True:
        with swapped(state):
            portion = list(islice(samples, at_a_time))
        if not portion:
            return
        yield from portion


def private_state(seed: int) -> list[Any]:
    """The states of torch's, Python's and (where it is loaded) numpy's global generators, seeded."""
    state: list[Any] = [torch.Generator().manual_seed(seed).get_state(), random.Random(seed).getstate()]
    if "numpy" in sys.modules:
        state.append(sys.modules["numpy"].random.RandomState(seed % 2**32).get_state())
    return state


@contextmanager
def swapped(state: list[Any]) -> Iterator[None]:
    """For a while, the global generators are in `state`, which then takes up where they have got to."""
    numpy = sys.modules["numpy"].random if len(state) == 3 else None
    before = [torch.get_rng_state(), random.getstate(), *([numpy.get_state()] if numpy else [])]

    def put(values: list[Any]) -> None:
        torch.set_rng_state(values[0])
        random.setstate(values[1])
        if numpy:
            numpy.set_state(values[2])

    put(state)
    try:
        yield
    finally:
        state[:] = [torch.get_rng_state(), random.getstate(), *([numpy.get_state()] if numpy else [])]
        put(before)
