"""Whatever decides the order of samples, a resumed fit goes on with it: at any step, at an epoch's end, on any number of ranks."""
import random
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Checkpoint
from learnkit.distributed import ShardedStream, get_rank, get_world_size

N, BS, EPOCHS = 24, 2, 3


def dataset() -> TensorDataset: return TensorDataset(torch.arange(float(N))[:, None], torch.randn(N, 1, generator=seeded(1)))
def seeded(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


class Drawn(Sampler[int]):
    """Draws from a generator of its own, or from Python's."""

    def __init__(self, rng: Any = random) -> None: self.rng = rng
    def __len__(self) -> int: return N

    def __iter__(self) -> Iterator[int]:
        order = list(range(N))
        self.rng.shuffle(order)
        return iter(order)


class ByLength(Drawn):
    """Batches of neighbours."""

    def __len__(self) -> int: return N // 2
    def __iter__(self) -> Iterator[Any]: return ([i, (i + 1) % N] for i in list(super().__iter__())[::2])


class WithState(Sampler[int]):
    """Counts its epochs, and says itself how to go on."""

    def __init__(self) -> None: self.epoch = 0
    def __len__(self) -> int: return N
    def state_dict(self) -> dict[str, int]: return {"epoch": self.epoch}
    def load_state_dict(self, state: dict[str, int]) -> None: self.epoch = state["epoch"]

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(N, generator=seeded(self.epoch)).tolist())


class Noisy(Dataset[Any]):
    """Adds to a sample what a generator of its own gives."""

    def __init__(self) -> None: self.rng = np.random.default_rng(3)
    def __len__(self) -> int: return N
    def __getitem__(self, i: int) -> Any: return torch.tensor([float(i)]), torch.tensor([self.rng.random()], dtype=torch.float32)


class Shuffled(IterableDataset[Any]):
    """A stream that is shuffled by a buffer, from the global generator or from its own."""

    def __init__(self, rng: Any = random) -> None: self.rng = rng

    def __iter__(self) -> Iterator[Any]:
        buffer, samples = [], dataset()
        for i in range(N):
            buffer.append(samples[i])
            if len(buffer) == 6: yield buffer.pop(self.rng.randrange(6))
        self.rng.shuffle(buffer)
        yield from buffer


class Zipped:
    """Two loaders side by side, as in contrastive learning."""

    def __init__(self, *loaders: Any) -> None: self.loaders = loaders
    def __len__(self) -> int: return min(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        for (x, y), (other, _) in zip(*self.loaders, strict=True): yield x, y + other


class Lazy:
    """Draws each batch when it is asked for it, from all three global generators."""

    def __len__(self) -> int: return N // BS

    def __iter__(self) -> Iterator[Any]:
        x, y = dataset().tensors
        for _ in range(len(self)):
            i = [random.randrange(N), int(np.random.randint(N))]
            yield x[i], y[i] + torch.rand(2, 1)


def over(sampler: Any, **options: Any) -> Any: return DataLoader(dataset(), BS, sampler=sampler, **options), DataLoader(dataset(), 5)


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: DataBunch.from_tensors(dataset().tensors, dataset().tensors, bs=BS),
    "create": lambda: DataBunch.create(dataset(), dataset(), bs=BS),
    "unshuffled": lambda: (DataLoader(dataset(), BS), DataLoader(dataset(), 5)),
    "shuffled": lambda: (DataLoader(dataset(), BS, shuffle=True), None),
    "own generator": lambda: (DataLoader(dataset(), BS, shuffle=True, generator=seeded(7)), DataLoader(dataset(), 5)),
    "one generator for both": lambda: (DataLoader(dataset(), BS, shuffle=True, generator=(g := seeded(7))), DataLoader(dataset(), 5, generator=g)),
    "sampler with a generator": lambda: over(RandomSampler(dataset(), generator=seeded(7))),
    "replacement": lambda: over(RandomSampler(dataset(), replacement=True, generator=seeded(7))),
    "weighted": lambda: over(WeightedRandomSampler([1. + i for i in range(N)], N, generator=seeded(7))),
    "weighted, global": lambda: over(WeightedRandomSampler([1. + i for i in range(N)], N)),
    "weighted validation": lambda: (DataLoader(dataset(), BS), DataLoader(dataset(), 5, sampler=WeightedRandomSampler([1.] * N, 9, generator=seeded(7)))),
    "own sampler": lambda: over(Drawn()),
    "own sampler, random.Random": lambda: over(Drawn(random.Random(4))),
    "own sampler, numpy": lambda: over(Drawn(np.random.default_rng(4))),
    "own sampler, RandomState": lambda: over(Drawn(np.random.RandomState(4))),
    "own sampler with a state": lambda: over(WithState()),
    "own batch sampler": lambda: (DataLoader(dataset(), batch_sampler=ByLength()), None),
    "own batch sampler, random.Random": lambda: (DataLoader(dataset(), batch_sampler=ByLength(random.Random(4))), None),
    "torch's batch sampler": lambda: (DataLoader(dataset(), batch_sampler=BatchSampler(Drawn(), BS, drop_last=True)), None),
    "DistributedSampler": lambda: over(DistributedSampler(dataset(), get_world_size(), get_rank(), seed=3)),
    "workers": lambda: (DataLoader(dataset(), BS, shuffle=True, generator=seeded(7), num_workers=1), None),
    "list": lambda: (list(DataLoader(dataset(), BS)), None),
    "zipped": lambda: (Zipped(DataLoader(dataset(), BS, shuffle=True), DataLoader(dataset(), BS, shuffle=True)), None),
    "zipped, own generators": lambda: (Zipped(*(DataLoader(dataset(), BS, shuffle=True, generator=seeded(i)) for i in range(2))), None),
    "lazy": lambda: (Lazy(), None),
}
OF_EACH_RANK = {        # what ranks draw by themselves: not the same on another number of them
    "own noise": lambda: (DataLoader(Noisy(), BS, shuffle=True), None),
    "stream": lambda: (DataLoader(ShardedStream(Shuffled(), BS), BS), None),
    "stream, random.Random": lambda: (DataLoader(ShardedStream(Shuffled(random.Random(4)), BS), BS), None),
}
READ_AGAIN = pytest.mark.filterwarnings("ignore:the first batches of this epoch")


class Watch(Callback):
    """[epoch][step]: the numbers of this rank's samples. Ends the fit as a crash would, when everything of a step is done."""
    order = Checkpoint.order - 10

    def __init__(self, until: int | None = None) -> None: self.until, self.seen = until, {}

    def before_batch(self, learn: Learner) -> None:
        if learn.training: self.seen.setdefault(learn.epoch, []).append(learn.inputs[0].flatten().int().tolist())

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step == self.until: raise ConnectionAbortedError


def fit(source: Callable[[], Any], folder: str, until: int | None = None, every: int | None = 1) -> tuple[Any, ...]:
    """({epoch: batches of this rank}, state) of a fit that goes on from what is in the folder."""
    torch.manual_seed(3), random.seed(3 + until if until else 3), np.random.seed(5 + (until or 0))
    watch = Watch(until)
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(.3), nn.Linear(4, 1)).double()
    net.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
    learn = Learner(source(), net, loss_func=lambda pred, y: nn.functional.mse_loss(pred, y.double()), opt_func=torch.optim.SGD,
                    callbacks=[watch, Checkpoint(folder, every_n_steps=every)]).to_distributed()
    try:
        with learn.no_logging(): learn.fit(EPOCHS, 1e-4, resume=True)
    except ConnectionAbortedError: pass
    values = [[repr(v) for v in row] for row in learn.recorder.values]
    return watch.seen, ([p.tolist() for p in net.state_dict().values()], learn.recorder.losses, values, learn.step)


def never_stopped_and_resumed(source: Callable[[], Any], folder: Path, *stops: tuple[int | None, int | None]) -> list[Any]:
    """What a fit goes through alone, and what its parts do, each stopped after a step: (step, every_n_steps)."""
    whole = fit(source, f"{folder}/whole", every=None)
    return [whole, *(fit(source, f"{folder}/parts", until, every) for until, every in (*stops, (None, 1)))]


def joined(parts: list[dict[int, list[Any]]]) -> dict[int, list[Any]]:
    """The epochs of parts that follow each other."""
    return {epoch: list(chain(*(part.get(epoch, []) for part in parts))) for epoch in range(EPOCHS)}


STOPS = {"in an epoch": ((2, 1),), "in the second epoch": ((-2, 1),), "at an epoch's end": ((-2, None),), "often": ((1, 1), (3, 1), (-3, 1))}


def of_each_source(sources: dict[str, Any], folder: Path, stops: list[Any]) -> dict[str, list[Any]]:
    """In one launch: to fork ranks takes longer than to fit."""
    return {name: never_stopped_and_resumed(source, folder / name, *stops) for name, source in sources.items()}


@READ_AGAIN
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stops", STOPS.values(), ids=STOPS)
def test_a_resumed_fit_is_the_one_that_never_stopped(ranks, tmp_path, stops, world_size):
    sources, per_epoch = SOURCES | OF_EACH_RANK, N // BS // world_size
    at = [(step if step > 0 else 2 * per_epoch + step, every) for step, every in stops]
    if world_size == 1: by_rank = [of_each_source(sources, tmp_path, at)]
    else: by_rank = ranks(world_size, of_each_source, sources, tmp_path, at, timeout=120)
    for name, (whole, *parts) in chain.from_iterable(one.items() for one in by_rank):
        assert [len(batches) for batches in whole[0].values()] == [per_epoch] * EPOCHS
        told = joined([seen for seen, _ in parts])
        if stops is STOPS["at an epoch's end"]: told[1] = told[1][per_epoch - 2:]       # what had been trained on of the epoch that was cut
        assert (name, told) == (name, whole[0])
        assert (name, parts[-1][1]) == (name, whole[1])


def fits(sources: dict[str, Any], folder: Path, until: int | None) -> dict[str, Any]:
    return {name: fit(source, str(folder / name), until)[0] for name, source in sources.items()}


@READ_AGAIN
@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (1, 3), (2, 3, 1)], ids=str)
def test_on_another_number_of_ranks_the_rest_of_the_epoch_is_the_same_and_so_are_the_epochs_after_it(ranks, tmp_path, worlds):
    whole = fits(SOURCES, tmp_path / "whole", None)
    found: dict[str, dict[int, list[int]]] = {name: {epoch: [] for epoch in range(EPOCHS)} for name in SOURCES}
    for k, world_size in enumerate(worlds):
        by_rank = ranks(world_size, fits, SOURCES, tmp_path, None if k == len(worlds) - 1 else 2 * (k + 1), timeout=120)
        for name in SOURCES:
            for epoch, seen in found[name].items():
                for step in zip(*(one[name].get(epoch, []) for one in by_rank), strict=True): seen.extend(chain(*step))
    for name, epochs in whole.items():
        orders = {epoch: list(chain(*batches)) for epoch, batches in epochs.items()}
        n = len(found[name][0])     # what is left of the first epoch may not be enough for one more batch of each rank
        assert N - n < BS * max(worlds)
        assert (name, found[name]) == (name, {**orders, 0: orders[0][:n]})
