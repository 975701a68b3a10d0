"""Random numbers for the samples of a batch: a pure function of (seed, epoch, sample).

They do not depend on the batch, rank or run that a sample is in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learnkit.data.order import mix

GOLDEN_RATIO_SIGNED = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed number


class Draws:
    """The random numbers of the samples of one batch, for one transform.

    Counters are hashed (splitmix64: Steele, Lea & Flood, 2014), so a number depends on no state and on no earlier
    number.

    Args:
        seed: seed of the loader
        epoch: number of the epoch
        index: index of each sample in its dataset: int64 `(n,)`, on the device of the batch
        place: number of the transform among those of its loader; each transform has its own numbers

    Example:
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
        """Return the random numbers of another epoch or another transform, from their beginning."""
        return Draws(
            self.seed, self.epoch if epoch is None else epoch, self.index, self.place if place is None else place
        )

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        """Return new numbers in [low, high): float32 `(n, *shape)`.

        Args:
            low: lower bound
            high: upper bound
            *shape: shape of the numbers of one sample; none: one number per sample
        """
        return low + (high - low) * (self.bits(*shape) & 0xFFFFFF).float() * 2**-24

    def integers(self, n: int, *shape: int) -> Tensor:
        """Return new integers of range(n): int64 `(n samples, *shape)`.

        Args:
            n: upper bound, exclusive, up to 2**24
            *shape: as in `uniform`
        """
        return (self.bits(*shape) & 0x7FFFFFFF) * n >> 31

    def chance(self, p: float) -> Tensor:
        """Return for each sample whether an event of probability `p` happens: bool `(n,)`."""
        return self.uniform() < p

    def seeds(self) -> list[int]:
        """Return a new seed for each sample, for generators of other kinds. Waits for the device."""
        return (self.bits() & 0x7FFFFFFFFFFFFFFF).tolist()

    def bits(self, *shape: int) -> Tensor:
        """Return 64 new random bits per number: int64 `(n, *shape)`."""
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
    """Apply the finalizer of splitmix64 to int64.

    torch's integers wrap around, and its right shifts copy the sign bit, hence the masks.
    """
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


class SampleTransform(ABC):
    """A transform of batches that is random per sample: it is called with the batch and the `Draws` of its samples.

    Example:
        >>> class Noise(SampleTransform):
        ...     def __call__(self, x, draws):
        ...         return x + draws.uniform(-.1, .1, *x.shape[1:])
    """

    @abstractmethod
    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        """Return the batch `(n, …)`, transformed; sample i has the index draws.index[i]."""


BatchTransform = Callable[[Tensor], Tensor] | SampleTransform


def transform_batch(
    x: Tensor, transforms: Sequence[BatchTransform], seed: int, epoch: int, index: Callable[[], Tensor]
) -> Tensor:
    """Return `x` after all transforms, in order.

    `index` returns the sample indices; it is called only if a transform needs them.
    """
    draws: Draws | None = None
    for place, transform in enumerate(transforms):
        if isinstance(transform, SampleTransform):
            if draws is None:
                draws = Draws(seed, epoch, index())
            x = transform(x, draws.at(place=place))
        else:
            x = transform(x)
    return x
