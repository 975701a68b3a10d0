"""Random transforms of batches of pictures: `(batch, channels, height, width)`, uint8 or float in [0, 1].

The random numbers of each picture are a pure function of (seed, epoch, sample). They are the same in every batch, on
every rank and after resuming.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from learnkit.data.random import Draws, SampleTransform
from learnkit.devices.transfer import sent
from learnkit.vision.resample import affine_batch, crop_weights, resize_batch

Range = float | tuple[float, float]
MODES = ("reflection", "border", "zeros")


def to_float(x: Tensor) -> Tensor:
    """Return uint8 pictures as float32 in [0, 1], and float pictures unchanged."""
    return x if x.is_floating_point() else x.float().mul_(1 / 255)


# --- crops and flips, which move pixels and do not c -------------------------
def rand_pad(padding: int, size: int | tuple[int, int], mode: str = "reflection") -> list[SampleTransform]:
    """Pad each picture on all sides, and crop it to `size` at a random position.

    Args:
        padding: pixels on each side
        size: pixels, or (height, width)
        mode: content of the padding: "reflection", "border" (the nearest pixel) or "zeros"

    Returns:
        A list, as in fastai v1, so write `[*rand_pad(4, 32), …]`.
    """
    return [RandomCrop(padding, as_pair("size", size), mode)]


@final
class RandomCrop(SampleTransform):
    """The transform that `rand_pad` returns."""

    def __init__(self, padding: int, size: tuple[int, int], mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
        if padding < 0:
            raise ValueError(f"padding={padding}: expected 0 or more.")
        self.padding, self.size, self.mode = padding, size, mode

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        corners = [
            draws.integers(length + 2 * self.padding - size + 1)
            for length, size in zip(self.checked(x), self.size, strict=True)
        ]
        rows, columns = (
            self.places(corner, size, length)
            for corner, size, length in zip(corners, self.size, x.shape[2:], strict=True)
        )
        n, channels, width = len(x), x.shape[1], x.shape[3]
        inside = None
        if self.mode == "zeros":
            inside = (is_inside(rows, x.shape[2])[:, :, None] & is_inside(columns, width)[:, None, :]).unsqueeze(1)
            rows, columns = rows.clamp(0, x.shape[2] - 1), columns.clamp(0, width - 1)
        flat = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
        y = x.reshape(n, channels, -1).gather(2, flat).view(n, channels, *self.size)
        return y if inside is None else y * inside

    def checked(self, x: Tensor) -> tuple[int, int]:
        height, width = x.shape[2:]
        if self.size[0] > height + 2 * self.padding or self.size[1] > width + 2 * self.padding:
            raise ValueError(
                f"pictures of {height}×{width} with a padding of {self.padding} are smaller than size={self.size}: "
                "reduce size or increase padding."
            )
        if self.mode == "reflection" and self.padding >= min(height, width):
            raise ValueError(
                f"padding={self.padding} is too large to reflect pictures of {height}×{width}: use mode='border'."
            )
        return height, width

    def places(self, corner: Tensor, size: int, length: int) -> Tensor:
        """Return which rows (or columns) of the picture are seen: int64 (n, size). With "zeros", some do not exist."""
        at = corner[:, None] - self.padding + torch.arange(size, device=corner.device)
        if self.mode == "reflection":
            return (length - 1) - ((length - 1) - at.abs()).abs()
        return at.clamp(0, length - 1) if self.mode == "border" else at


def is_inside(at: Tensor, length: int) -> Tensor:
    return (at >= 0) & (at < length)


@final
class flip_lr(SampleTransform):
    """Mirror each picture left to right with probability p, or, if `alternating`, in every second epoch.

    If `alternating`, half of the pictures are mirrored in the first epoch, the other half in the second, and so on: in
    two epochs each one is seen both ways (Jordan, 2024, arXiv:2404.00498).

    Args:
        p: probability; must be 0.5 if `alternating`
        alternating: mirror each picture in every second epoch

    Example:
        >>> flip_lr(p=0.5)(torch.rand(8, 3, 4, 4), Draws(0, 0, torch.arange(8))).shape
        torch.Size([8, 3, 4, 4])
    """

    def __init__(self, p: float = 0.5, *, alternating: bool = False) -> None:
        self.p, self.alternating = as_probability(p), alternating
        if alternating and p != 0.5:
            raise ValueError(
                f"p={p} with alternating=True: expected p=0.5: each picture is mirrored every second epoch."
            )

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        chosen = draws.at(epoch=0).integers(2) == draws.epoch % 2 if self.alternating else draws.chance(self.p)
        return torch.where(chosen.view(-1, 1, 1, 1), x.flip(3), x)


@final
class cutout(SampleTransform):
    """Fill `n_holes` squares of `length` pixels at random positions (DeVries & Taylor, 2017, arXiv:1708.04552).

    Centres can be anywhere in the picture, so parts of a square may lie outside of it.

    Args:
        length: side of each square, in pixels
        n_holes: number of squares
        p: probability that a picture is changed
        fill: value in [0, 1], for all channels

    Example:
        >>> cutout(length=2)(torch.ones(8, 3, 4, 4), Draws(0, 0, torch.arange(8))).min()
        tensor(0.)
    """

    def __init__(self, length: int = 16, n_holes: int = 1, p: float = 1.0, fill: float = 0.0) -> None:
        if length < 1 or n_holes < 1:
            raise ValueError(f"length={length}, n_holes={n_holes}: expected 1 or more.")
        self.length, self.n_holes, self.p, self.fill = length, n_holes, as_probability(p), fill

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        happens = draws.chance(self.p)
        hole = torch.zeros(len(x), *x.shape[2:], dtype=torch.bool, device=x.device)
        for _ in range(self.n_holes):
            rows, columns = (self.covered(draws.integers(size), size) for size in x.shape[2:])
            hole |= rows[:, :, None] & columns[:, None, :]
        fill = self.fill if x.is_floating_point() else round(self.fill * 255)
        return x.masked_fill((hole & happens.view(-1, 1, 1)).unsqueeze(1), fill)

    def covered(self, centre: Tensor, size: int) -> Tensor:
        first = centre[:, None] - self.length // 2
        at = torch.arange(size, device=centre.device)
        return (at >= first) & (at < first + self.length)


# --- resampling --------------------------------------------------------------
@final
class rotate(SampleTransform):
    """Rotate each picture by a random angle, counter-clockwise.

    Like torchvision's rotate with bilinear interpolation, except for the content outside of the picture: see `mode`.

    Args:
        degrees: range (low, high) of the angle; a number d: -d to d
        p: probability that a picture is rotated
        mode: content outside of the picture: "reflection", "border" (the nearest pixel) or "zeros"
    """

    def __init__(self, degrees: Range = 10.0, p: float = 1.0, mode: str = "reflection") -> None:
        self.degrees, self.p, self.mode = as_range(degrees, lambda d: -d), as_probability(p), as_mode(mode)

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        happens = draws.chance(self.p)
        angle = torch.deg2rad(draws.uniform(*self.degrees)) * happens
        return affine_batch(to_float(x), angle, torch.ones_like(angle), self.mode)


@final
class zoom(SampleTransform):
    """Enlarge each picture around its centre by a random factor.

    Args:
        scale: range (low, high) of the factor, above 0; a number s: 1 to s
        p: probability that a picture is enlarged
        mode: content outside of the picture, as in `rotate`
    """

    def __init__(self, scale: Range = 1.1, p: float = 1.0, mode: str = "reflection") -> None:
        self.scale, self.p, self.mode = as_range(scale, lambda s: 1.0), as_probability(p), as_mode(mode)
        if min(self.scale) <= 0:
            raise ValueError(f"scale={scale}: expected factors above 0.")

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        happens = draws.chance(self.p)
        scale = torch.where(happens, draws.uniform(*self.scale), 1.0)
        return affine_batch(to_float(x), torch.zeros_like(scale), scale, self.mode)


@final
class rand_resize_crop(SampleTransform):
    """Cut out a random part and resize it to `size`, bilinear with antialiasing: torchvision's RandomResizedCrop, per
    sample.

    Args:
        size: pixels, or (height, width)
        scale: range (low, high) of the part's area, as a fraction of the picture's area
        ratio: range (low, high) of its width divided by its height, uniform in the logarithm
        antialias: whether to antialias
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        *,
        antialias: bool = True,
    ) -> None:
        self.size, self.scale, self.ratio, self.antialias = as_pair("size", size), scale, ratio, antialias
        if not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"scale={scale}, ratio={ratio}: expected (low, high) with 0 < low <= high.")

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        top, left, height, width = self.boxes(x, draws)
        rows = crop_weights(top, height, x.shape[2], self.size[0], antialias=self.antialias)
        columns = crop_weights(left, width, x.shape[3], self.size[1], antialias=self.antialias)
        return resize_batch(to_float(x), rows, columns)

    def boxes(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (top, left, height, width), int64 (n,) each.

        The first of ten attempts that fits is used, else a box in the centre whose ratio is allowed.
        """
        in_height, in_width = x.shape[2:]
        area = in_height * in_width * draws.uniform(*self.scale, 10)
        low, high = torch.tensor(self.ratio).log().tolist()
        ratio = draws.uniform(low, high, 10).exp()
        widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (widths > 0) & (widths <= in_width) & (heights > 0) & (heights <= in_height)
        first = fits.int().argmax(1, keepdim=True)
        any_fits = fits.any(1)
        whole_height, whole_width = self.whole(in_height, in_width)
        height = torch.where(any_fits, heights.gather(1, first).squeeze(1), whole_height)
        width = torch.where(any_fits, widths.gather(1, first).squeeze(1), whole_width)
        top = torch.where(
            any_fits, (draws.uniform() * (in_height - height + 1)).long(), (in_height - whole_height) // 2
        )
        left = torch.where(any_fits, (draws.uniform() * (in_width - width + 1)).long(), (in_width - whole_width) // 2)
        return top, left, height, width

    def whole(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of the largest part whose ratio is allowed."""
        if width / height < self.ratio[0]:
            return round(width / self.ratio[0]), width
        if width / height > self.ratio[1]:
            return height, round(height * self.ratio[1])
        return height, width


# --- colours -----------------------------------------------------------------
@final
class brightness(SampleTransform):
    """Multiply each picture by a random factor.

    Args:
        scale: range (low, high) of the factor; a number s: 1 - s to 1 + s
        p: probability that a picture is changed
    """

    def __init__(self, scale: Range = 0.2, p: float = 1.0) -> None:
        self.scale, self.p = as_factors(scale), as_probability(p)

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        return (to_float(x) * factors(self.scale, self.p, draws)).clamp_(0, 1)


@final
class contrast(SampleTransform):
    """Blend each picture with its mean grey by a random factor.

    Args:
        scale: range (low, high) of the factor; a number s: 1 - s to 1 + s
        p: probability that a picture is changed
    """

    def __init__(self, scale: Range = 0.2, p: float = 1.0) -> None:
        self.scale, self.p = as_factors(scale), as_probability(p)

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        x = to_float(x)
        mean = grey(x).mean((1, 2, 3), keepdim=True)
        return torch.lerp(mean.expand_as(x), x, factors(self.scale, self.p, draws).expand_as(x)).clamp_(0, 1)


def grey(x: Tensor) -> Tensor:
    """Return the luma of ITU-R BT.601 with torchvision's weights: (n, 1, height, width)."""
    if x.shape[1] == 1:
        return x
    weights = sent(torch.tensor([0.2989, 0.587, 0.114], dtype=x.dtype), x.device)
    return (x * weights.view(3, 1, 1)).sum(1, keepdim=True)


def factors(scale: tuple[float, float], p: float, draws: Draws) -> Tensor:
    happens = draws.chance(p)
    return torch.where(happens, draws.uniform(*scale), 1.0).view(-1, 1, 1, 1)


# --- for every picture -------------------------------------------------------
@final
class normalize:
    """Compute (x - mean) / std by channel, for pictures in [0, 1].

    uint8 pictures are scaled to [0, 1] in the same pass.

    Args:
        mean: mean of each channel
        std: standard deviation of each channel, above 0

    Example:
        >>> normalize([.5], [.25])(torch.full((1, 1, 2, 2), .75)).mean()
        tensor(1.)
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std) or any(s <= 0 for s in std):
            raise ValueError(f"mean={mean}, std={std}: expected equal lengths, and standard deviations above 0.")
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        if self.mean.device != x.device:
            self.mean, self.std = sent(self.mean, x.device), sent(self.std, x.device)
        if x.is_floating_point():
            return (x - self.mean) / self.std
        return torch.addcmul(-self.mean / self.std, x, 1 / (255 * self.std))

    def undo(self, x: Tensor) -> Tensor:
        """Return the pictures in [0, 1] again."""
        return x * self.std.to(x.device) + self.mean.to(x.device)


@final
class per_sample(SampleTransform):
    """Apply a transform of one picture, such as torchvision's, to each picture of a batch, random per sample.

    The transform draws from torch's global generator, which is seeded by (seed, epoch, sample) and restored.
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            pictures = []
            for picture, seed in zip(x, draws.seeds(), strict=True):  # reads the device, once a batch
                torch.manual_seed(seed)
                pictures.append(self.transform(picture))
        return torch.stack(pictures)


def accepted(transform: Any) -> Any:
    """Return a transform unchanged; torchvision's are wrapped so that they are random per sample."""
    if isinstance(transform, SampleTransform):
        return transform
    if isinstance(transform, type):
        raise TypeError(f"{transform.__name__} is a class, expected an instance: write {transform.__name__}(…).")
    if not callable(transform):
        raise TypeError(f"{transform!r} is {type(transform).__name__}, expected a transform: a function x -> x.")
    return per_sample(transform) if type(transform).__module__.startswith("torchvision.transforms") else transform


# --- arguments ---------------------------------------------------------------
def as_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(f"{name}={value!r}: expected an integer number of pixels, or (height, width).")
    return pair


def as_range(value: Range, low: Callable[[float], float]) -> tuple[float, float]:
    first, last = (low(value), value) if isinstance(value, (int, float)) else value
    if first > last:
        raise ValueError(f"the range ({first}, {last}) is empty: expected (low, high).")
    return first, last


def as_factors(scale: Range) -> tuple[float, float]:
    factors = (1 - scale, 1 + scale) if isinstance(scale, (int, float)) else scale
    if min(factors) < 0:
        raise ValueError(f"scale={scale}: expected factors of 0 or more.")
    return as_range(factors, lambda s: s)


def as_probability(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"p={p}: expected a probability, 0 to 1.")
    return p


def as_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
    return mode
