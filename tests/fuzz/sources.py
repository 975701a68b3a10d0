"""Data of all kinds, whose samples can be told apart: the first number of sample i is i / 64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, default_collate

from learnkit.vision.pictures import Pictures
from tests.fuzz.models import CLASSES, WIDTH
from tests.fuzz.part import Part, part

SCALE = 64  # a power of two: numbers come back from x exactly, in every dtype drawn


def samples(n: int, form: str, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, ...]:
    """(x, y), or (x, x2, y) of a pair; y are classes that a model can learn."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 1, 6, 6) if form == "pictures" else (n, WIDTH)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = (x.reshape(n, -1)[:, 1:4].argmax(1)) % CLASSES
    x.view(n, -1)[:, 0] = torch.arange(n) / SCALE
    more = (torch.randn(n, 2, generator=generator, dtype=torch.float64).to(dtype),) if form == "pair" else ()
    return (x.to(dtype), *more, y)


def numbers(inputs: Any) -> list[int]:
    """The numbers of a batch's samples."""
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]
    return [round(float(value) * SCALE) for value in first.detach().reshape(len(first), -1)[:, 0]]


def dataset(train: tuple[Tensor, ...]) -> TensorDataset:
    return TensorDataset(*train)


class Noisy(Dataset[Any]):
    """Samples with noise that is drawn whenever they are read: of torch's, Python's and numpy's generators."""

    def __init__(self, train: tuple[Tensor, ...]) -> None:
        self.train = train

    def __len__(self) -> int:
        return len(self.train[0])

    def __getitem__(self, i: int) -> Any:
        sample = [t[i] for t in self.train]
        noise = torch.rand(sample[0].shape, dtype=torch.float64) + random.random() + float(np.random.rand())
        noise.view(-1)[0] = 0
        return (sample[0] + noise.to(sample[0].dtype), *sample[1:])


class OwnSampler(Sampler[int]):
    """Draws from Python's generator, as a user's may."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(self.n), self.n))


class WithEpoch(OwnSampler):
    """Has an epoch of its own, which it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.RandomState(self.epoch).permutation(self.n).tolist())


class OwnBatches(Sampler[list[int]]):
    """Batches of a user's own making: neighbours together, their order drawn from numpy's generator."""

    def __init__(self, n: int, bs: int) -> None:
        self.starts, self.n, self.bs = list(range(0, n, bs)), n, bs

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        for k in np.random.permutation(len(self.starts)):
            yield list(range(self.starts[k], min(self.n, self.starts[k] + self.bs)))


class Batches(Dataset[Any]):
    """Whole batches, for DataLoader(…, batch_size=None)."""

    def __init__(self, train: tuple[Tensor, ...], bs: int) -> None:
        self.parts = list(zip(*(t.split(bs) for t in train), strict=True))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> Any:
        return self.parts[k]


class Stream(IterableDataset[Any]):
    """Samples one after the other, which cannot be indexed; with a length or without."""

    def __init__(self, train: tuple[Tensor, ...]) -> None:
        self.train = train

    def __iter__(self) -> Iterator[Any]:
        return zip(*self.train, strict=True)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.train[0])


class Generated:
    """A loader of a class of its own: nothing but __iter__."""

    def __init__(self, train: tuple[Tensor, ...], bs: int) -> None:
        self.train, self.bs = train, bs

    def __iter__(self) -> Iterator[Any]:
        yield from zip(*(t.split(self.bs) for t in self.train), strict=True)


class GeneratedShuffled(Generated):
    """With a length, an order that depends on the epoch, and `set_epoch` to hear of it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.train[0]) // self.bs)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(self.epoch))
        yield from zip(*(t[order].split(self.bs) for t in self.train), strict=True)


class Zipped:
    """Two shuffled loaders side by side: samples and their classes from one, noise from the other."""

    def __init__(self, train: tuple[Tensor, ...], bs: int, *, drop_last: bool) -> None:
        self.first = DataLoader(TensorDataset(*train), bs, shuffle=True, drop_last=drop_last)
        self.second = DataLoader(TensorDataset(train[0] / 10), bs, shuffle=True, drop_last=drop_last)

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[Any]:
        for (x, *rest), (noise,) in zip(self.first, self.second, strict=True):
            noise = noise.clone()
            noise.view(len(x), -1)[:, 0] = 0
            yield (x + noise, *rest)


def as_mapping(batch: Any) -> dict[str, Tensor]:
    """A collate_fn: the model's arguments by name, and the labels."""
    *inputs, y = default_collate(batch)
    names = ("first", "second") if len(inputs) == 2 else ("x",)
    return {**dict(zip(names, inputs, strict=True)), "labels": y}


def as_pictures(train: tuple[Tensor, ...]) -> Pictures:
    """uint8 pictures whose number is in both upper corners, so that a flip leaves it there."""
    pixels = ((train[0] + 3) * 40).clamp(0, 255).to(torch.uint8)
    numbers = (train[0][:, 0, 0, 0] * 255).round().to(torch.uint8)
    pixels[:, 0, 0, 0] = pixels[:, 0, 0, -1] = numbers
    return Pictures(pixels, train[1], [""] * len(pixels), ["a", "b", "c"])


class Sheets(Dataset[Any]):
    """(picture, class), for ImageDataBunch.from_dataset: not of torchvision's."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Any:
        return self.pictures.pixels[i], int(self.pictures.labels[i])


def jitter(x: Tensor) -> Tensor:
    """A transform of whole batches; the samples' numbers stay."""
    noise = torch.randn_like(x) / 20
    noise.view(len(x), -1)[:, 0] = 0
    return x + noise


# alone       on several ranks it is refused, or the user's own matter
# repeats     an epoch may have a sample twice
# draws       the samples themselves are drawn, in the process, so other ones on each rank
# drops       the last batch, or the last round of ranks, is always left out where it is not full
# own order   draws it from the global generators, or by the number of batches: in another world it is another one
# unsized     it has no length
# images      with a model of pictures alone
# float32     samples are
# x           the model's argument has to be called x
# its batches are dealt out whole: a last round without a batch for each rank is left out
SOURCES: dict[str, Part] = {
    "from_tensors": part("DataBunch.from_tensors(train, bs=bs, drop_last=drop_last).train_dl", weight=3),
    "from_tensors, seed": part("DataBunch.from_tensors(train, bs=bs, drop_last=drop_last, seed=5).train_dl"),
    "from_tensors, transforms": part(
        "DataBunch.from_tensors(train, bs=bs, drop_last=drop_last, batch_tfms=[jitter]).train_dl", "draws"
    ),
    "pictures": part(
        "ImageDataBunch.from_pictures({'train': as_pictures(train)}, ds_tfms=([flip_lr(p=0.5)], []), bs=bs, "
        "drop_last=drop_last).train_dl",
        "images",
        "float32",
    ),
    "pictures of a dataset": part(
        "ImageDataBunch.from_dataset(Sheets(as_pictures(train)), bs=bs, drop_last=drop_last, num_workers=0).train_dl",
        "images",
        "float32",
        weight=0.5,
    ),
    "TensorLoader": part("TensorLoader(train, bs=bs, drop_last=drop_last)"),
    "create": part("DataBunch.create(dataset(train), bs=bs, drop_last=drop_last).train_dl", weight=2),
    "create, noisy": part(
        "DataBunch.create(Noisy(train), bs=bs, drop_last=drop_last, num_workers=0).train_dl", "draws", weight=2
    ),
    "create, workers": part(
        "DataBunch.create(Noisy(train), bs=bs, drop_last=drop_last, num_workers=2).train_dl",
        "draws",
        "workers",
        weight=0.3,
    ),
    "DataLoader": part("DataLoader(dataset(train), bs, drop_last=drop_last)", weight=2),
    "DataLoader, shuffle": part("DataLoader(dataset(train), bs, shuffle=True, drop_last=drop_last)", weight=2),
    "DataLoader, noisy": part("DataLoader(Noisy(train), bs, shuffle=True, drop_last=drop_last)", "draws"),
    "DataLoader, own generator": part(
        "DataLoader(dataset(train), bs, shuffle=True, drop_last=drop_last, generator=torch.Generator().manual_seed(7))"
    ),
    "DataLoader, workers": part(
        "DataLoader(Noisy(train), bs, shuffle=True, drop_last=drop_last, num_workers=2)", "draws", "workers", weight=0.3
    ),
    "DataLoader, persistent workers": part(
        "DataLoader(Noisy(train), bs, shuffle=True, drop_last=drop_last, num_workers=2, persistent_workers=True)",
        "draws",
        "workers",
        weight=0.3,
    ),
    "DataLoader, mapping": part(
        "DataLoader(dataset(train), bs, shuffle=True, drop_last=drop_last, collate_fn=as_mapping)", "x"
    ),
    "DataLoader, batch_size=None": part("DataLoader(Batches(train, bs), batch_size=None, shuffle=True)", "alone"),
    "RandomSampler": part("DataLoader(dataset(train), bs, sampler=RandomSampler(range(n)), drop_last=drop_last)"),
    "RandomSampler, generator": part(
        "DataLoader(dataset(train), bs, sampler=RandomSampler(range(n), generator=torch.Generator().manual_seed(8)), "
        "drop_last=drop_last)"
    ),
    "RandomSampler, replacement": part(
        "DataLoader(dataset(train), bs, sampler=RandomSampler(range(n), replacement=True), drop_last=drop_last)",
        "repeats",
    ),
    "SubsetRandomSampler": part(
        "DataLoader(dataset(train), bs, sampler=SubsetRandomSampler(range(n)), drop_last=drop_last)"
    ),
    "SequentialSampler": part(
        "DataLoader(dataset(train), bs, sampler=SequentialSampler(range(n)), drop_last=drop_last)"
    ),
    "WeightedRandomSampler": part(
        "DataLoader(dataset(train), bs, sampler=WeightedRandomSampler([1.0] * n, n), drop_last=drop_last)", "repeats"
    ),
    "WeightedRandomSampler, generator": part(
        "DataLoader(dataset(train), bs, sampler=WeightedRandomSampler([1.0] * n, n, "
        "generator=torch.Generator().manual_seed(9)), drop_last=drop_last)",
        "repeats",
    ),
    "DistributedSampler": part(
        "DataLoader(dataset(train), bs, sampler=DistributedSampler(range(n), world, rank, seed=2, "
        "drop_last=drop_last), drop_last=drop_last)",
        "pads",
    ),
    "own sampler": part("DataLoader(dataset(train), bs, sampler=OwnSampler(n), drop_last=drop_last)"),
    "own sampler, set_epoch": part("DataLoader(dataset(train), bs, sampler=WithEpoch(n), drop_last=drop_last)"),
    "BatchSampler": part(
        "DataLoader(dataset(train), batch_sampler=BatchSampler(RandomSampler(range(n)), bs, drop_last))"
    ),
    "own batch_sampler": part("DataLoader(dataset(train), batch_sampler=OwnBatches(n, bs))", "dealt", "own order"),
    "list of batch indices": part(
        "DataLoader(dataset(train), batch_sampler=[list(range(n))[k : k + bs] for k in range(0, n, bs)])", "dealt"
    ),
    "IterableDataset": part("DataLoader(ShardedStream(Stream(train), bs), bs)", "unsized", "drops"),
    "IterableDataset, length": part("DataLoader(SizedStream(train), bs, drop_last=drop_last)", "alone"),
    "list of batches": part("list(zip(*(t.split(bs) for t in train), strict=True))", "dealt"),
    "generator class": part("Generated(train, bs)", "dealt", "unsized"),
    "generator class, set_epoch": part("GeneratedShuffled(train, bs)", "dealt"),
    "zipped": part("Zipped(train, bs, drop_last=drop_last)", "dealt", "draws", "own order"),
}

VALID: dict[str, Part] = {
    "none": part("None"),
    "from_tensors": part("DataBunch.from_tensors(valid, valid, bs=bs, val_bs=5).valid_dl", weight=2),
    "create": part("DataBunch.create(dataset(valid), dataset(valid), bs=bs, val_bs=4).valid_dl"),
    "DataLoader": part("DataLoader(dataset(valid), 5)", weight=2),
    "shuffled, drop_last": part("DataLoader(dataset(valid), 5, shuffle=True, drop_last=True)"),
    "own generator": part("DataLoader(dataset(valid), 5, shuffle=True, generator=torch.Generator().manual_seed(4))"),
    "DistributedSampler": part(
        "DataLoader(dataset(valid), 5, sampler=DistributedSampler(range(len(valid[0])), world, rank))"
    ),
    "list of batches": part("list(zip(*(t.split(4) for t in valid), strict=True))"),
    "same as train_dl": part("train_dl", weight=0.5),
}

# Of torch's samplers and learnkit's data, what no entry stands for, and why.
NOT_DRAWN = {
    "Sampler": "the base class; own samplers are drawn",
    "ImageDataBunch.from_folder": "decodes files into what from_pictures takes: tests/vision/test_data.py",
}
