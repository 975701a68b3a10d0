"""The order of samples: a pure function of (seed, epoch), and of nothing else. Not of the number of workers or ranks, of
validation passes in between, or of the global random number generators."""
from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

T = TypeVar("T")


def mix(*numbers: int) -> int:
    """One 63-bit seed made of several numbers, so that neighbouring epochs or ranks get unrelated streams."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of n samples in an epoch: int64 (n,), on the CPU."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))


class PrivateGenerator(torch.Generator):
    """A loader's own source of randomness, seeded anew by (seed, epoch) at each pass; by the rank too, where it has one."""
    rank = 0


class EpochOrder:
    """What has an order by (seed, epoch). Iterating it by hand walks through the epochs 0, 1, 2, …; `set_epoch` says which is next."""

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

    def __len__(self) -> int: return self.n

    def __iter__(self) -> Iterator[int]:
        epoch = self.next_epoch()
        return iter(permutation(self.n, self.seed, epoch).tolist() if self.shuffle else range(self.n))


class PrivateSampler(EpochOrder, Sampler[Any]):
    """A sampler or batch sampler of somebody else's, which may draw from the global generators, made a function of (seed, epoch)."""

    def __init__(self, sampler: Iterable[Any], seed: int | None = None) -> None:
        super().__init__(seed)
        self.sampler = sampler

    def __len__(self) -> int: return len(self.sampler)      # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]: return privately(self.sampler, mix(self.seed, self.next_epoch()))


def parts_of(loader: Any) -> list[Any]:
    """The loader and those of its samplers that exist: where an order, an epoch or a generator may live."""
    found, layer = [loader, getattr(loader, "sampler", None)], getattr(loader, "batch_sampler", None)
    while layer is not None and layer not in found:
        found.append(layer)
        layer = getattr(layer, "sampler", None)
    unique = {id(part): part for part in found if part is not None}
    return list(unique.values())


def generator_of(part: Any) -> torch.Generator | None:
    generator = getattr(part, "generator", None)
    return generator if isinstance(generator, torch.Generator) else None


def set_epoch(loader: Any, seed: int | None, epoch: int) -> None:
    """Make the loader's next pass that of (seed, epoch), as far as it lets us: see `private_order`.

    `seed=None` keeps the seeds that the loader's own samplers have.
    """
    for part in parts_of(loader):
        if isinstance(part, EpochOrder): part.set_epoch(epoch, seed)
        elif callable(getattr(part, "set_epoch", None)): part.set_epoch(epoch)
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
                    part.generator = PrivateGenerator()                         # type: ignore[union-attr]
                    undo.callback(setattr, part, "generator", None)
            if isinstance(loader, DataLoader): make_sampler_private(loader, undo)
        yield


def make_sampler_private(loader: DataLoader[Any], undo: ExitStack) -> None:
    """A sampler of a kind that we do not know may draw from any global generator."""
    batches: Any = loader.batch_sampler
    if batches is None: return
    if type(batches) is not BatchSampler:
        if draws_globally(batches):
            object.__setattr__(loader, "batch_sampler", PrivateSampler(batches))    # DataLoader refuses a plain assignment
            undo.callback(object.__setattr__, loader, "batch_sampler", batches)
    elif draws_globally(sampler := batches.sampler):
        batches.sampler = PrivateSampler(sampler)
        undo.callback(setattr, batches, "sampler", sampler)


def draws_globally(sampler: Any) -> bool:
    """Whether a sampler might: not torch's own kinds, which have a generator or need none, nor a plain list or range."""
    known = type(sampler).__module__.startswith("torch.") or isinstance(sampler, (SequentialSampler, EpochSampler, PrivateSampler))
    return not known and not isinstance(sampler, (list, tuple, range, Tensor))


# ---------------------------------------------------------------------- global generators, borrowed
def privately(sampler: Iterable[T], seed: int, at_a_time: int = 64, *, reseed: bool = False) -> Iterator[T]:
    """What `sampler` yields when the global generators are seeded with `seed`; read in portions, and put back in between.

    `reseed`: a generator that the sampler owns is seeded too.
    """
    state = private_state(seed)
    with swapped(state):
        generator = generator_of(sampler)
        if generator is not None and reseed: generator.manual_seed(seed)
        samples = iter(sampler)
    while True:
        with swapped(state): portion = list(islice(samples, at_a_time))
        if not portion: return
        yield from portion


def private_state(seed: int) -> list[Any]:
    """The states of torch's, Python's and (where it is loaded) numpy's global generators, seeded."""
    state: list[Any] = [torch.Generator().manual_seed(seed).get_state(), random.Random(seed).getstate()]
    if "numpy" in sys.modules: state.append(sys.modules["numpy"].random.RandomState(seed % 2**32).get_state())
    return state


@contextmanager
def swapped(state: list[Any]) -> Iterator[None]:
    """For a while, the global generators are in `state`, which then takes up where they have got to."""
    numpy = sys.modules["numpy"].random if len(state) == 3 else None
    before = [torch.get_rng_state(), random.getstate(), *([numpy.get_state()] if numpy else [])]

    def put(values: list[Any]) -> None:
        torch.set_rng_state(values[0])
        random.setstate(values[1])
        if numpy: numpy.set_state(values[2])

    put(state)
    try: yield
    finally:
        state[:] = [torch.get_rng_state(), random.getstate(), *([numpy.get_state()] if numpy else [])]
        put(before)
