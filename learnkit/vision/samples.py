"""Pictures that a dataset makes one by one, in worker processes, with their own random numbers.

The batches are transformed on the device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from learnkit.data.loaders import default_workers
from learnkit.data.order import (
    EpochOrder,
    EpochSampler,
    PrivateGenerator,
    mix,
    parts_of,
    private_state,
    seed_process,
    swapped,
)
from learnkit.data.random import BatchTransform, transform_batch
from learnkit.devices.accelerator import can_pin
from learnkit.devices.transfer import mover


class SampleLoader(DataLoader[Any]):
    """A DataLoader over a dataset of (picture, …, target) whose pictures are a pure function of (seed, epoch, sample).

    The generators of torch, Python and numpy are seeded for each sample while the dataset makes it, with and without
    workers.

    Args:
        dataset: the dataset
        bs: batch size
        shuffle: whether the order is random
        drop_last: whether to skip an incomplete last batch
        batch_tfms: transforms that are applied to the batch of pictures, on `device`
        device: where batches are transformed
        seed: seed of order and transforms
        num_workers: number of worker processes; None: chosen automatically
    """

    def __init__(
        self,
        dataset: Any,
        *,
        bs: int,
        shuffle: bool,
        drop_last: bool,
        batch_tfms: Sequence[BatchTransform],
        device: torch.device,
        seed: int | None = None,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=bs,
            sampler=EpochSampler(len(dataset), shuffle=shuffle, seed=seed),
            drop_last=drop_last,
            num_workers=default_workers(dataset) if num_workers is None else num_workers,
            pin_memory=can_pin(device),
            generator=PrivateGenerator(),
        )
        self.batch_tfms, self.device = tuple(batch_tfms), device

    def in_dataset_order(self) -> SampleLoader:
        """Return a loader of the same samples in dataset order, each once."""
        seed = self.sampler.seed if isinstance(self.sampler, EpochOrder) else None
        return SampleLoader(
            self.dataset,
            bs=self.batch_size or 1,
            shuffle=False,
            drop_last=False,
            batch_tfms=self.batch_tfms,
            device=self.device,
            seed=seed,
            num_workers=self.num_workers,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        order = next(part for part in parts_of(self) if isinstance(part, EpochOrder))
        seed, epoch = order.seed, order.epoch
        own = copy.copy(self)
        object.__setattr__(own, "dataset", Numbered(self.dataset, seed, epoch))  # DataLoader forbids a plain assignment
        for x, *others, index in map(mover(self.device), DataLoader.__iter__(own)):
            yield (transform_batch(x, self.batch_tfms, seed, epoch, lambda index=index: index), *others)


class Numbered:
    """A dataset's samples with their indices; the generators are seeded for each sample."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        seed = mix(self.seed, self.epoch, index)
        if get_worker_info() is not None:
            seed_process(seed)
            sample = self.dataset[index]
        else:
            with swapped(private_state(seed)):
                sample = self.dataset[index]
        return (picture_tensor(sample[0]), *sample[1:], index)


def picture_tensor(picture: Any) -> Tensor:
    """Return a Pillow image as uint8 (channels, height, width), and a tensor unchanged."""
    if isinstance(picture, Tensor):
        return picture
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(picture)
