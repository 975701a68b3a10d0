"""Find, read and restore the random generators in a user's loaders, samplers and datasets.

These are a torch.Generator, a random.Random, a numpy Generator or RandomState, under any name, and a sampler or dataset
with state_dict and load_state_dict.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from learnkit.data.order import Around, EpochOrder, PrivateGenerator, generator_of, is_stream, parts_of

MOST = 64  # containers with more entries are not searched: indices or samples of a dataset are not generators
DEEPEST = 6  # maximum number of attributes from a loader to a generator
NOT_LOOKED_INTO = (
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    Tensor,
    nn.Module,
    Optimizer,
    type,
    ModuleType,
    FunctionType,
)


def order_generators(loader: Any) -> list[Any]:
    """Return the generators that decide a loader's order.

    These are its own, its samplers', and those of loaders inside it. Its dataset's are included if resuming reads the
    loader again up to the position: if it is a stream, or a loader of the user's own class.
    """
    loader = inner(loader)
    is_indexed = isinstance(loader, DataLoader) and not is_stream(loader)
    return once(sources_in(loader, leave_out=Dataset if is_indexed else ()))


def sample_generators(loader: Any) -> list[Any]:
    """Return the generators with which a loader's dataset makes its samples in this process."""
    loader = inner(loader)
    if not isinstance(loader, DataLoader) or loader.num_workers or is_stream(loader):
        return []  # each worker has its own copies
    of_order = order_generators(loader)
    return [found for found in once(sources_in(loader.dataset)) if not any(found is other for other in of_order)]


def inner(loader: Any) -> Any:
    """Return the user's loader inside our wrappers."""
    return inner(loader.loader) if isinstance(loader, Around) else loader


def once(found: Iterable[Any]) -> list[Any]:
    return list({id(generator): generator for generator in found}.values())


def sources_in(
    thing: Any, leave_out: type | tuple[()] = (), depth: int = 0, seen: set[int] | None = None
) -> Iterator[Any]:
    """Yield the generators in an object's attributes, in order, except those inside objects of type `leave_out`."""
    seen = set() if seen is None else seen
    if isinstance(thing, (NOT_LOOKED_INTO, leave_out)) or id(thing) in seen or depth > DEEPEST:
        return
    seen.add(id(thing))
    if is_generator(thing):
        if not isinstance(thing, PrivateGenerator):
            yield thing
        return
    if isinstance(thing, (list, tuple, Mapping)):
        parts = list(thing.values() if isinstance(thing, Mapping) else thing) if len(thing) <= MOST else []
    else:
        if has_state(thing):
            yield thing
        left_out = (
            ("dataset", "data_source", "_iterator") if leave_out else ("_iterator",)
        )  # persistent workers have copies
        parts = [part for name, part in getattr(thing, "__dict__", {}).items() if name not in left_out]
    for part in parts:
        yield from sources_in(part, leave_out, depth + 1, seen)


def is_generator(thing: Any) -> bool:
    if isinstance(thing, random.SystemRandom):
        return False  # it has no state
    return isinstance(thing, (torch.Generator, random.Random)) or is_numpys(thing)


def is_numpys(thing: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(thing, (numpy.random.Generator, numpy.random.RandomState))


def has_state(thing: Any) -> bool:
    """Return whether a sampler or dataset saves its own state. A loader is not asked: that would start loading."""
    if not isinstance(thing, (Sampler, Dataset)) or isinstance(thing, IterableDataset):
        return False  # a stream is read again when resuming
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def generator_state(generator: Any) -> Any:
    """Return the state as tensors and plain types."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return plain(generator.getstate())
    if not is_numpys(generator):
        return generator.state_dict()
    return plain(generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state())


def put_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate((state[0], tuple(state[1]), state[2]))
    elif not is_numpys(generator):
        generator.load_state_dict(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(tuple(state))


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def put_states(generators: Sequence[Any], states: Sequence[Any], what: str) -> None:
    """Restore the states of generators that decide `what`.

    Raises ValueError if their number differs from the checkpoint's.
    """
    if len(generators) != len(states):
        raise ValueError(
            f"the checkpoint has the states of {len(states)} random generators that decide {what}, the loaders of this "
            f"fit have {len(generators)}. Resume with the same loaders, samplers and datasets."
        )
    for generator, state in zip(generators, states, strict=True):
        put_state(generator, state)


@contextmanager
def unmoved_loaders(*loaders: Any) -> Iterator[None]:
    """Restore the epochs and generators of loaders, and of their datasets in this process, after the block."""
    parts = [part for loader in loaders for part in parts_of(loader)]
    epochs = [(part, part.epoch) for part in parts if isinstance(part, EpochOrder)]
    private = [generator for part in parts if (generator := generator_of(part)) is not None]
    owners = [generator for loader in loaders for generator in (*order_generators(loader), *sample_generators(loader))]
    states = [(generator, generator_state(generator)) for generator in once((*private, *owners))]
    try:
        yield
    finally:
        for part, epoch in epochs:
            part.epoch = epoch
        for generator, state in states:
            put_state(generator, state)
