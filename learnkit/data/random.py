"""Random numbers for the samples of a batch: a pure function of (seed, epoch, sample), whatever batch, rank or run a
sample is in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learnkit.data.order import mix

GOLDEN_RATIO_SIGNED = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed number


class Draws:
    """What is random about the samples of one batch, for one transform.

    Counters are hashed (splitmix64: Steele, Lea & Flood, 2014), so a draw needs no state, and no other draw before it.

    seed, epoch     decide the numbers, together with
    index           each sample's number in its data set: int64 (n,), on the device of the batch
    place           number of the transform among those of its loader: each has numbers of its own

    >>> draws = Draws(seed=1, epoch=0, index=torch.tensor([7, 3]))
    >>> bool(draws.uniform()[1] == Draws(1, 0, torch.tensor([3])).uniform()[0])
    True
    """

    def __init__(self, seed: int, epoch: int, index: Tensor, place: int = 0) -> None:
        self.seed, self.epoch, self.index, self.place = seed, epoch, index, place
        self.n_drawn = 0

    def __len__(self) -> int:
        return len(self.index)

    def at(self, *, epoch: int | None = None, place: int | None = None) -> Draws:
        """Those of another epoch, or for another transform, from their beginning."""
        return Draws(
            self.seed, self.epoch if epoch is None else epoch, self.index, self.place if place is None else place
        )

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        """New numbers in [low, high), one a sample, or `shape` of them: float32 (n, *shape)."""
        return low + (high - low) * (self.bits(*shape) & 0xFFFFFF).float() * 2**-24

    def integers(self, n: int, *shape: int) -> Tensor:
        """New whole numbers of range(n), n up to 2**24: int64 (n samples, *shape)."""
        return (self.bits(*shape) & 0x7FFFFFFF) * n >> 31

    def chance(self, p: float) -> Tensor:
        """Whether something of probability `p` happens: bool (n,)."""
        return self.uniform() < p

    def seeds(self) -> list[int]:
        """A new seed for each sample, for generators of other kinds; read from the device."""
        return (self.bits() & 0x7FFFFFFFFFFFFFFF).tolist()

    def bits(self, *shape: int) -> Tensor:
        """64 new random bits: int64 (n, *shape)."""
        n_each = 1
        for size in shape:
            n_each *= size
        key = mix(self.seed, self.epoch, self.place, self.n_drawn)
        self.n_drawn += 1
        bits = scramble(scramble(self.index + 1) ^ key)
        if not shape:
            return bits
        within = torch.arange(n_each, device=bits.device) * GOLDEN_RATIO_SIGNED
        return scramble(bits.unsqueeze(1) + within).view(-1, *shape)


def scramble(z: Tensor) -> Tensor:
    """The finalizer of splitmix64, on int64; torch's wraps around, and its shifts drag the sign along, hence the
    masks.
    """
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


class SampleTransform(ABC):
    """A transform of batches that is random per sample: it is handed the batch and the `Draws` of its samples.

    >>> class Noise(SampleTransform):
    ...     def __call__(self, x, draws):
    ...         return x + draws.uniform(-.1, .1, *x.shape[1:])
    """

    @abstractmethod
    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        """The batch (n, …), transformed; sample i is that of draws.index[i]."""


BatchTransform = Callable[[Tensor], Tensor] | SampleTransform


def transform_batch(
    x: Tensor, transforms: Sequence[BatchTransform], seed: int, epoch: int, index: Callable[[], Tensor]
) -> Tensor:
    """`x` after all transforms, in order. `index`: gives the samples' numbers, where a transform asks for draws."""
    draws: Draws | None = None
    for place, transform in enumerate(transforms):
        if isinstance(transform, SampleTransform):
            if draws is None:
                draws = Draws(seed, epoch, index())
            x = transform(x, draws.at(place=place))
        else:
            x = transform(x)
    return x
