"""A Learner on many ranks trains as alone: whatever its data look like, the k-th global batch is the same, and so is
all else.
"""

import random
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.distributed import ShardedStream, get_rank, get_world_size

N, GLOBAL = 41, 12  # three whole global batches and one of 5 samples, which neither 2, 3 nor 4 ranks share evenly


def tensors(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def dataset(n: int = N) -> TensorDataset:
    return TensorDataset(*tensors(n))


def valid() -> DataLoader:
    return DataLoader(TensorDataset(*tensors(11, seed=2)), batch_size=GLOBAL // get_world_size())


class Net(nn.Sequential):
    """Takes what the forms of a batch need: positions, or keywords."""

    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x, other=None):
        return super().forward(x if other is None else x + other)  # type: ignore[override]


class OwnLoss(Net):
    def forward(self, x, labels=None):  # type: ignore[override]
        logits = super().forward(x)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels, label_smoothing=0.1))


def net(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def history(learn: Learner) -> tuple[list[float], ...]:
    weights = torch.cat([p.detach().reshape(-1) for p in learn.model.state_dict().values()])
    return learn.recorder.losses, list(chain(*learn.recorder.values)), weights.tolist()


def difference(a: Any, b: Any) -> float:
    assert len(a) == len(b)
    return max(difference(p, q) if isinstance(p, (list, tuple)) else abs(p - q) for p, q in zip(a, b, strict=True))


# --- sample ------------------------------------------------------------------
class Shuffled(Sampler[int]):
    """As users write them: draws from whichever global generator it likes."""

    def __init__(self, shuffle):
        self.shuffle = shuffle

    def __len__(self):
        return N

    def __iter__(self):
        order = list(range(N))
        self.shuffle(order)
        yield from order


class Unsized(Sampler[int]):
    def __iter__(self):
        return iter(torch.randperm(N).tolist())


class ByLength(Sampler[list[int]]):
    """Batches of 1 to 6 samples, shuffled; `join` puts so many together."""

    SIZES = (2, 4, 1, 5, 3, 3, 6, 2)

    def __init__(self, join: int):
        self.join = join

    def __len__(self):
        return len(self.SIZES) // self.join

    def __iter__(self):
        parts = torch.arange(sum(self.SIZES)).split(self.SIZES)
        parts = [parts[i].tolist() for i in torch.randperm(len(parts))]
        for i in range(0, len(parts), self.join):
            yield list(chain(*parts[i : i + self.join]))


class Stream(IterableDataset):
    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        return zip(*tensors(self.n), strict=True)


class Lengthless:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def torch_shuffle(order: list[int]) -> None:
    order[:] = [order[i] for i in torch.randperm(len(order))]


def own() -> torch.Generator:
    return torch.Generator().manual_seed(100 * get_rank() + 7)  # rank 0's is the one that counts


def bs() -> int:
    return GLOBAL // get_world_size()


def weighted(**options) -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0, 3.0] * 20, N, **options)


def by_keyword(batch):
    return {"x": (b := default_collate(batch))[0], "other": b[0] * 2, "labels": b[1]}


def default_collate(batch):
    return torch.utils.data.default_collate(batch)


def listed(sizes: list[int], *, join: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of these sizes; of one rank `join` at a time."""
    sizes = [sum(sizes[i : i + join]) for i in range(0, len(sizes), join)]
    x, y = tensors(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def joined() -> int:
    return 2 // get_world_size()  # for worlds of 1 and 2


LOADERS = {
    "tensors": lambda: DataBunch.from_tensors(tensors(), tensors(11, seed=2), bs=bs(), drop_last=False).train_dl,
    "tensors, whole batches only": lambda: DataBunch.from_tensors(tensors(), bs=bs()).train_dl,
    "create": lambda: DataBunch.create(dataset(), bs=bs(), drop_last=False, num_workers=0).train_dl,
    "create, a worker": lambda: DataBunch.create(dataset(), bs=bs(), drop_last=False, num_workers=1).train_dl,
    "create, whole batches only": lambda: DataBunch.create(dataset(), bs=bs(), num_workers=0).train_dl,
    "in order": lambda: DataLoader(dataset(), bs()),
    "shuffled": lambda: DataLoader(dataset(), bs(), shuffle=True),
    "shuffled, a worker": lambda: DataLoader(dataset(), bs(), shuffle=True, num_workers=1),
    "shuffled, own generator": lambda: DataLoader(dataset(), bs(), shuffle=True, generator=own()),
    "weighted": lambda: DataLoader(dataset(), bs(), sampler=weighted()),
    "weighted, own generator": lambda: DataLoader(dataset(), bs(), sampler=weighted(generator=own())),
    "torch's generator": lambda: DataLoader(dataset(), bs(), sampler=Shuffled(torch_shuffle)),
    "random's generator": lambda: DataLoader(dataset(), bs(), sampler=Shuffled(random.shuffle)),
    "numpy's generator": lambda: DataLoader(dataset(), bs(), sampler=Shuffled(np.random.shuffle)),
    "an unsized sampler": lambda: DataLoader(dataset(), bs(), sampler=Unsized()),
    "torch's batch sampler": lambda: DataLoader(
        dataset(), batch_sampler=BatchSampler(SequentialSampler(range(N)), bs(), False)
    ),
    "mappings": lambda: DataLoader(dataset(), bs(), shuffle=True, collate_fn=by_keyword),
    "a stream, whole batches": lambda: DataLoader(ShardedStream(Stream(N), bs()), bs()),
    "a stream, whole batches, a worker": lambda: DataLoader(ShardedStream(Stream(N), bs()), bs(), num_workers=1),
}
BY_BATCH = {
    "a batch sampler": lambda: DataLoader(dataset(), batch_sampler=ByLength(joined())),
    "a list of batches": lambda: listed([6] * 6, join=joined()),
    "a list of unequal batches": lambda: listed([2, 5, 1, 6, 4, 4], join=joined()),
    "unequal batches without a length": lambda: Lengthless(listed([2, 5, 1, 6, 4, 4], join=joined())),
}


def fit(loader) -> tuple[list[float], ...]:
    torch.manual_seed(3 + get_rank()), random.seed(get_rank()), np.random.seed(get_rank())  # rank 0's torch seed counts
    learn = Learner(DataBunch(loader(), valid()), net(), lr=0.02, metrics=accuracy).to_distributed()
    with learn.no_logging():
        return history(learn.fit(1).fit(1))


def fit_all(loaders) -> dict[str, Any]:
    return {name: fit(loader) for name, loader in loaders.items()}


@pytest.fixture
def fits(ranks):
    """fits(world_size): {name: what each of so many ranks went through}; all in one launch, made once."""

    def of(world_size: int, loaders: dict[str, Any]) -> dict[str, list[Any]]:
        key = world_size, tuple(loaders)
        if key not in FITS:
            by_rank = ranks(world_size, fit_all, loaders)
            FITS[key] = {name: [one[name] for one in by_rank] for name in loaders}
        return FITS[key]

    return of


FITS: dict[Any, dict[str, list[Any]]] = {}


NO_WORKERS = {name: loader for name, loader in LOADERS.items() if "worker" not in name}


@pytest.mark.parametrize(
    "world_size, name", [(2, name) for name in LOADERS] + [(w, name) for w in (3, 4) for name in NO_WORKERS]
)
def test_any_loader_trains_as_alone(fits, name, world_size):
    [alone] = fits(1, LOADERS)[name]
    assert len(alone[0]) == (3 if "whole" in name else 4)
    for one in fits(world_size, LOADERS if world_size == 2 else NO_WORKERS)[name]:
        assert difference(one, alone) <= 1e-5


@pytest.mark.parametrize("name", BY_BATCH)
def test_two_ranks_train_as_one_whose_batches_are_joined_pairwise(fits, name):
    [alone] = fits(1, BY_BATCH)[name]
    for one in fits(2, BY_BATCH)[name]:
        assert difference(one, alone) <= 1e-5


# --- learn -------------------------------------------------------------------
def keyworded() -> DataBunch:
    return DataBunch(DataLoader(dataset(), bs(), shuffle=True, collate_fn=keywords), keyword_valid())


def keyword_valid() -> DataLoader:
    return DataLoader(dataset(11), bs(), collate_fn=keywords)


def keywords(batch):
    return dict(zip(("x", "labels"), default_collate(batch), strict=True))


def plain() -> DataBunch:
    return DataBunch.from_tensors(tensors(), tensors(11, seed=2), bs=bs(), drop_last=False)


LEARNERS = {
    "AdamW": lambda: Learner(plain(), net(), lr=0.02).to_distributed().fit(2),
    "SGD": lambda: Learner(plain(), net(), opt_func=momentum, lr=0.02, wd=0.1).to_distributed().fit(2),
    "a built optimizer": lambda: (
        Learner(plain(), model := net(), opt_func=momentum(model.parameters(), lr=0.1)).to_distributed().fit(2)
    ),
    "one cycle": lambda: Learner(plain(), net(), lr=0.02, bn_wd=False).to_distributed().fit_one_cycle(2),
    "layer groups": lambda: Learner(plain(), net(), splitter=lambda m: [m[0], m[2]]).to_distributed().fine_tune(1, 0.1),
    "a seed": lambda: Learner(plain(), net(), seed=7).to_distributed().fit(2, 0.02),
    "at most 5 steps": lambda: Learner(plain(), net(), lr=0.02).to_distributed().fit_one_cycle(3, max_steps=5),
    "a loss": lambda: (
        Learner(plain(), net(), loss_func=nn.CrossEntropyLoss(label_smoothing=0.1)).to_distributed().fit(2, 0.02)
    ),
    "an output's own loss": lambda: Learner(keyworded(), net(OwnLoss)).to_distributed().fit(2, 0.02),
    "a regression": lambda: Learner(regression(), nn.Sequential(net(), nn.Linear(3, 1))).to_distributed().fit(2, 0.02),
}


def momentum(params, lr=0.1):
    return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True)


def regression() -> DataBunch:
    return DataBunch.from_tensors(tensors_with(1), tensors_with(2), bs=bs(), drop_last=False)


def tensors_with(seed: int) -> tuple[Tensor, Tensor]:
    return (x := tensors(seed=seed)[0]), x[:, :1] * 2 + 1


def learn_all() -> dict[str, Any]:
    found = {}
    for name, make in LEARNERS.items():
        torch.manual_seed(5 + get_rank())
        found[name] = history(make())
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_learner_trains_as_alone(ranks, world_size):
    alone = learn_all()
    for one in ranks(world_size, learn_all):
        assert max((difference(one[name], alone[name]), name) for name in LEARNERS) <= (1e-5, "")


# --- who sees what -----------------------------------------------------------
class Ids(Callback):
    """The first feature of each training sample is its number: [epoch][step] -> numbers."""

    def __init__(self):
        self.seen: list[list[list[int]]] = []

    def before_train(self, learn):
        self.seen.append([])

    def before_batch(self, learn):
        if learn.training:
            self.seen[-1].append(learn.inputs[0][:, 0].long().tolist())


SIZES, SIX = range(6, 19), 6  # samples; in a global batch


def seen(n: int, *, drop_last: bool, from_tensors: bool) -> list[list[list[int]]]:
    x, y, ids = torch.arange(n).float()[:, None], torch.zeros(n, 1), Ids()
    options: dict[str, Any] = {"bs": SIX // get_world_size(), "drop_last": drop_last, "seed": 4}
    if from_tensors:
        data = DataBunch.from_tensors((x, y), **options)
    else:
        data = DataBunch.create(TensorDataset(x, y), **options)
    with (learn := Learner(data, nn.Linear(1, 1), lr=1e-3, callbacks=ids).to_distributed()).no_logging():
        learn.fit(2)
    return ids.seen


CASES = [
    {"n": n, "drop_last": drop_last, "from_tensors": from_tensors}
    for n in SIZES
    for drop_last in (False, True)
    for from_tensors in (False, True)
]


def seen_in_all() -> list[Any]:
    return [seen(**case) for case in CASES]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_kth_global_batch_is_the_same_and_each_sample_comes_once(ranks, world_size):
    for case, alone, *by_rank in zip(CASES, seen_in_all(), *ranks(world_size, seen_in_all, timeout=60), strict=True):
        rest = case["n"] % SIX
        left_out = rest if case["drop_last"] or rest < world_size else 0
        for epoch in range(2):
            steps = [one[epoch] for one in by_rank]
            whole = [list(chain(*parts)) for parts in zip(*steps, strict=True)]  # strict: equally many steps
            assert whole == alone[epoch][: len(whole)]
            assert len(set(chain(*whole))) == len(list(chain(*whole))) == case["n"] - left_out
        assert case["n"] < 12 or alone[0] != alone[1]


# --- strea -------------------------------------------------------------------
class Numbers(IterableDataset):
    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        return ((torch.tensor([float(i)]), torch.zeros(1)) for i in range(self.n))


def fit_stream(stream: Any, epochs: int = 1, **options) -> tuple[list[list[list[int]]], int, list[float]]:
    ids = Ids()
    learn = Learner(
        DataBunch(DataLoader(stream, 2, **options)), nn.Linear(1, 1), callbacks=ids, lr=1e-3
    ).to_distributed()
    learn.fit(epochs)
    return ids.seen, learn.step, learn.recorder.losses


def test_a_stream_that_is_not_sharded_is_refused_with_the_recipe(ranks):
    def fn():
        with pytest.raises(
            TypeError,
            match=r"Numbers is an IterableDataset: each rank(.|\n)*DataLoader\(ShardedStream\(Numbers\(…\), "
            r"batch_size\), batch_size\)(.|\n)*Numbers.is_sharded = True",
        ):
            fit_stream(Numbers(8))
        return fit_stream(ShardedStream(Numbers(9), 2))[:2]

    assert ranks(2, fn) == [([[[0, 1], [4, 5]]], 2), ([[[2, 3], [6, 7]]], 2)]


@pytest.mark.parametrize("lengths", [(11, 6), (6, 11), (5, 5)])
def test_loaders_without_a_length_stop_together_although_one_has_more(ranks, lengths):
    def fn():
        stream = Numbers(lengths[get_rank()])
        stream.is_sharded = True
        return fit_stream(stream, epochs=2)[1:]

    (step, losses), other = ranks(2, fn)
    assert step == 6 and other == (step, losses)


def test_loaders_that_tell_unequal_lengths_are_refused(ranks):
    class Sized(Numbers):
        is_sharded = True

        def __len__(self):
            return self.n

    def fn():
        with pytest.raises(ValueError, match=r"the number of steps: rank 1 has 3; rank 0 has 6"):
            fit_stream(Sized((11, 6)[get_rank()]))

    ranks(2, fn)


@pytest.mark.parametrize("kind", ["map", "map, own generator", "stream", "distributed sampler"])
def test_augmentations_in_workers_differ_between_ranks_and_epochs(ranks, kind):
    class Noises(IterableDataset):
        is_sharded = True

        def __iter__(self):
            return ((torch.rand(1), torch.zeros(1)) for _ in range(2))

    class Noise(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.rand(1), torch.zeros(1)

    def loader():
        if kind == "stream":
            return DataLoader(Noises(), 1, num_workers=1)
        options = {"sampler": DistributedSampler(range(4))} if kind == "distributed sampler" else {"shuffle": True}
        if kind == "map, own generator":
            options["generator"] = torch.Generator()
        return DataLoader(Noise(), 1, num_workers=1, **options)

    def fn():
        values = Values()
        Learner(DataBunch(loader()), nn.Linear(1, 1), callbacks=values, lr=1e-3).to_distributed().fit(2)
        return values.seen

    drawn = list(chain(*ranks(2, fn)))
    assert len(set(drawn)) == len(drawn) == 8


class Values(Callback):
    def __init__(self):
        self.seen: list[float] = []

    def before_batch(self, learn):
        self.seen += learn.inputs[0].flatten().tolist()
