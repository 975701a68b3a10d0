"""Whatever decides the order of samples, a resumed fit goes on with it: at any step, at an epoch's end, on any number
of ranks.
"""

import random
import shutil
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
from learnkit.checkpoint.snapshot import all_in, read_manifest
from learnkit.distributed import ShardedStream, barrier, get_rank, get_world_size

N, BS, EPOCHS = 24, 4, 3


def dataset() -> TensorDataset:
    return TensorDataset(torch.arange(float(N))[:, None], torch.randn(N, 1, generator=seeded(1)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Drawn(Sampler[int]):
    """Draws from a generator of its own, or from Python's."""

    def __init__(self, rng: Any = random) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        order = list(range(N))
        self.rng.shuffle(order)
        return iter(order)


class ByLength(Drawn):
    """Batches of neighbours."""

    def __len__(self) -> int:
        return N // BS

    def __iter__(self) -> Iterator[Any]:
        return ([(i + k) % N for k in range(BS)] for i in list(super().__iter__())[::BS])


class WithState(Sampler[int]):
    """Counts its epochs, and says itself how to go on."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return N

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(N, generator=seeded(self.epoch)).tolist())


class Noisy(Dataset[Any]):
    """Adds to a sample what a generator of its own gives."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([float(i)]), torch.tensor([self.rng.random()], dtype=torch.float32)


class Shuffled(IterableDataset[Any]):
    """A stream that is shuffled by a buffer, from the global generator or from its own."""

    def __init__(self, rng: Any = random) -> None:
        self.rng = rng

    def __iter__(self) -> Iterator[Any]:
        buffer, samples = [], dataset()
        for i in range(N):
            buffer.append(samples[i])
            if len(buffer) == 6:
                yield buffer.pop(self.rng.randrange(6))
        self.rng.shuffle(buffer)
        yield from buffer


class Zipped:
    """Two loaders side by side, as in contrastive learning."""

    def __init__(self, *loaders: Any) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return min(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        for (x, y), (other, _) in zip(*self.loaders, strict=True):
            yield x, y + other


class Wrapper:
    """A loader around another one, as many scripts have it, which draws from a generator of its own."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.rng = loader, random.Random(4)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for x, y in self.loader:
            yield x, y + self.rng.random()


class Lazy:
    """Draws each batch when it is asked for it, from all three global generators."""

    def __len__(self) -> int:
        return N // BS

    def __iter__(self) -> Iterator[Any]:
        x, y = dataset().tensors
        for _ in range(len(self)):
            i = [*random.sample(range(N), BS - 1), int(np.random.randint(N))]
            yield x[i], y[i] + torch.rand(BS, 1)


def over(sampler: Any, **options: Any) -> Any:
    return DataLoader(dataset(), BS, sampler=sampler, **options), DataLoader(dataset(), 5)


SOURCES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: DataBunch.from_tensors(dataset().tensors, dataset().tensors, bs=BS),
    "create": lambda: DataBunch.create(dataset(), dataset(), bs=BS),
    "unshuffled": lambda: (DataLoader(dataset(), BS), DataLoader(dataset(), 5)),
    "shuffled": lambda: (DataLoader(dataset(), BS, shuffle=True), None),
    "own generator": lambda: (DataLoader(dataset(), BS, shuffle=True, generator=seeded(7)), DataLoader(dataset(), 5)),
    "one generator for both": lambda: (
        DataLoader(dataset(), BS, shuffle=True, generator=(g := seeded(7))),
        DataLoader(dataset(), 5, generator=g),
    ),
    "sampler with a generator": lambda: over(RandomSampler(dataset(), generator=seeded(7))),
    "replacement": lambda: over(RandomSampler(dataset(), replacement=True, generator=seeded(7))),
    "weighted": lambda: over(WeightedRandomSampler([1.0 + i for i in range(N)], N, generator=seeded(7))),
    "weighted, global": lambda: over(WeightedRandomSampler([1.0 + i for i in range(N)], N)),
    "weighted validation": lambda: (
        DataLoader(dataset(), BS),
        DataLoader(dataset(), 5, sampler=WeightedRandomSampler([1.0] * N, 9, generator=seeded(7))),
    ),
    "own sampler": lambda: over(Drawn()),
    "own sampler, random.Random": lambda: over(Drawn(random.Random(4))),
    "own sampler, numpy": lambda: over(Drawn(np.random.default_rng(4))),
    "own sampler, RandomState": lambda: over(Drawn(np.random.RandomState(4))),
    "own sampler with a state": lambda: over(WithState()),
    "own batch sampler": lambda: (DataLoader(dataset(), batch_sampler=ByLength()), None),
    "own batch sampler, random.Random": lambda: (DataLoader(dataset(), batch_sampler=ByLength(random.Random(4))), None),
    "torch's batch sampler": lambda: (
        DataLoader(dataset(), batch_sampler=BatchSampler(Drawn(), BS, drop_last=True)),
        None,
    ),
    "DistributedSampler": lambda: over(DistributedSampler(dataset(), get_world_size(), get_rank(), seed=3)),
    "workers": lambda: (DataLoader(dataset(), BS, shuffle=True, generator=seeded(7), num_workers=1), None),
    "list": lambda: (list(DataLoader(dataset(), BS)), None),
    "zipped": lambda: (Zipped(DataLoader(dataset(), BS, shuffle=True), DataLoader(dataset(), BS, shuffle=True)), None),
    "zipped, own generators": lambda: (
        Zipped(*(DataLoader(dataset(), BS, shuffle=True, generator=seeded(i)) for i in range(2))),
        None,
    ),
    "lazy": lambda: (Lazy(), None),
    "wrapped": lambda: (Wrapper(DataLoader(dataset(), BS, shuffle=True, generator=seeded(7))), None),
    "wrapped, drawn samples": lambda: (Wrapper(DataLoader(Noisy(), BS, shuffle=True)), None),
}
OF_EACH_RANK = {  # what ranks draw by themselves: not the same on another number of them
    "own noise": lambda: (DataLoader(Noisy(), BS, shuffle=True), None),
    "stream": lambda: (DataLoader(ShardedStream(Shuffled(), BS), BS), None),
    "stream, random.Random": lambda: (DataLoader(ShardedStream(Shuffled(random.Random(4)), BS), BS), None),
}
READ_AGAIN = pytest.mark.filterwarnings("ignore:the first batches of this epoch")


class Watch(Callback):
    """{epoch: [numbers of this rank's samples in each batch]}."""

    def __init__(self) -> None:
        self.seen: dict[int, list[list[int]]] = {}

    def before_batch(self, learn: Learner) -> None:
        if learn.training:
            self.seen.setdefault(learn.epoch, []).append(learn.inputs[0].flatten().int().tolist())


def fit(
    source: Callable[[], Any], folder: Path, seed: int = 3, every: int | None = None
) -> tuple[dict[int, list[list[int]]], Any]:
    """(what `Watch` saw, the state at the end) of a fit that goes on from what is in the folder. Another process has
    another seed.
    """
    torch.manual_seed(3), random.seed(seed), np.random.seed(seed)
    net = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.3), nn.Linear(4, 1)).double()
    net.register_forward_pre_hook(lambda _, inputs: tuple(x.double() for x in inputs))
    learn = Learner(
        source(),
        net,
        loss_func=lambda pred, y: nn.functional.mse_loss(pred, y.double()),
        opt_func=torch.optim.SGD,
        callbacks=[watch := Watch(), Checkpoint(folder, every_n_steps=every, keep=99)],
    ).to_distributed()
    if seed != 3:
        torch.manual_seed(seed)
    with learn.no_logging():
        learn.fit(EPOCHS, 1e-4, resume=True)
    values = [[repr(v) for v in row] for row in learn.recorder.values]
    return watch.seen, ([p.tolist() for p in net.state_dict().values()], learn.recorder.losses, values, learn.step)


def killed(folder: Path, place: tuple[int, int], left: Path) -> Path:
    """The folder that a fit leaves that was killed at a place (epoch, step): the checkpoint until then, of all that it
    wrote.
    """
    [found] = [
        path
        for path in all_in(folder)
        if tuple(read_manifest(path)["about"][key] for key in ("epoch", "step")) == place
    ]
    shutil.copytree(found, left / found.name, dirs_exist_ok=True)
    return left


def fits(sources: dict[str, Any], folder: Path, *places: tuple[int, int]) -> dict[str, list[Any]]:
    """Of each source, in one launch, as forking ranks takes longer: a fit that never stopped, and those that were
    killed at these places.
    """
    found: dict[str, list[Any]] = {}
    for name, source in sources.items():
        found[name] = [fit(source, folder / name / "whole", every=1)]
        for i, place in enumerate(places):
            if get_rank() == 0:
                killed(folder / name / "whole", place, folder / name / str(i))
            barrier()
            found[name].append(fit(source, folder / name / str(i), seed=50 + i))
    return found


ALL = SOURCES | OF_EACH_RANK


@READ_AGAIN
@pytest.mark.parametrize("names", [list(ALL)[::2], list(ALL)[1::2]], ids=["these", "those"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_fit_is_the_one_that_never_stopped(ranks, tmp_path, names, world_size):
    n = N // BS // world_size
    places = [(0, 1), (1, n), (1, 2 * n - 1)]  # the second one is at an epoch's end
    for by_name in ranks(world_size, fits, {name: ALL[name] for name in names}, tmp_path, *places, timeout=120):
        for name, (whole, *parts) in by_name.items():
            assert [len(batches) for batches in whole[0].values()] == [n] * EPOCHS
            for (epoch, step), (seen, state) in zip(places, parts, strict=True):
                rest = {
                    e: batches[step - n * e :] if e == epoch else batches
                    for e, batches in whole[0].items()
                    if e >= epoch
                }
                assert (name, seen) == (name, rest)
                assert (name, state) == (name, whole[1])


def fit_each(sources: dict[str, Any], folder: Path, every: int | None = None) -> dict[str, Any]:
    return {name: fit(source, folder / name, seed=50, every=every)[0] for name, source in sources.items()}


@READ_AGAIN
@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (2, 3)], ids=str)
def test_on_another_number_of_ranks_the_rest_of_the_epoch_is_the_same_and_so_are_the_epochs_after_it(
    ranks, tmp_path, worlds
):
    alone = fit_each(SOURCES, tmp_path / "alone")
    ranks(worlds[0], fit_each, SOURCES, tmp_path / "first", N // BS // worlds[0] - 1, timeout=120)
    for name in SOURCES:
        killed(tmp_path / "first" / name, (0, N // BS // worlds[0] - 1), tmp_path / "second" / name)
    by_rank = ranks(worlds[1], fit_each, SOURCES, tmp_path / "second", timeout=120)
    for name, epochs in alone.items():
        orders = [list(chain(*epochs[epoch])) for epoch in range(EPOCHS)]
        found = [
            [i for step in zip(*(one[name].get(epoch, []) for one in by_rank), strict=True) for i in chain(*step)]
            for epoch in range(EPOCHS)
        ]
        rest = orders[0][N - BS * worlds[0] :]
        assert len(rest) - len(found[0]) < BS * worlds[1]  # not enough for one more batch of each rank
        assert (name, found) == (name, [rest[: len(found[0])], *orders[1:]])
