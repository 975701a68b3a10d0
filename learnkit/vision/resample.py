"""Resampling of batches, with its own parameters for each picture: affine maps, and crops resized with antialiasing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from learnkit.devices.accelerator import can_float64


def affine_batch(x: Tensor, angle: Tensor, scale: Tensor, mode: str) -> Tensor:
    """Rotate pictures around their centres by `angle` and enlarge them by `scale`.

    Args:
        x: the pictures
        angle: counter-clockwise, in radians, `(n,)`
        scale: `(n,)`
        mode: padding mode of `grid_sample`
    """
    height, width = x.shape[2:]
    cos, sin, zero = angle.cos() / scale, angle.sin() / scale, torch.zeros_like(angle)
    rows = torch.stack(
        [cos, -sin * height / width, zero, sin * width / height, cos, zero], 1
    )  # output -> input, in [-1, 1]
    grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=mode, align_corners=False)


def crop_weights(start: Tensor, length: Tensor, n_in: int, n_out: int, *, antialias: bool) -> Tensor:
    """Return the weight of each input row in each output row, for a crop that is resized to n_out rows.

    The crop consists of the input rows start … start + length - 1. The weights are a triangle around the position of
    the output row, as wide as the larger one of an input and an output row; rows outside the crop have weight 0.
    torch's interpolate and Pillow do the same. Shape: (n, n_out, n_in).
    """
    at = torch.arange(n_in, device=start.device) - start[:, None]  # of the input rows, within the crop
    distance = (distances if can_float64(start.device) else distances_in_float32)(
        at, length, n_out, antialias=antialias
    )
    weights = (1 - distance.abs()).clamp(min=0) * ((at >= 0) & (at < length[:, None]))[:, None, :]
    return (weights / weights.sum(2, keepdim=True)).float()


def distances(at: Tensor, length: Tensor, n_out: int, *, antialias: bool) -> Tensor:
    """Return the distance from each output row to the input rows `at` (n, n_in): float64 (n, n_out, n_in).

    The unit is the triangle's half width.
    """
    scale = length.double() / n_out
    support = scale.clamp(min=1) if antialias else torch.ones_like(scale)
    out = torch.arange(n_out, device=at.device, dtype=torch.float64)
    centre = scale[:, None] * (out + 0.5)
    if not antialias:
        centre = centre.clamp(min=0.5).minimum(length[:, None] - 0.5)
    return (at[:, None, :] + 0.5 - centre[:, :, None]) / support[:, None, None]


def distances_in_float32(at: Tensor, length: Tensor, n_out: int, *, antialias: bool) -> Tensor:
    """Like `distances`, for a device without float64.

    Positions are integer multiples of 1 / (2 n_out) rows, and therefore exact until the single division.
    """
    centre = length[:, None] * (2 * torch.arange(n_out, device=at.device) + 1)
    if not antialias:
        centre = centre.clamp(min=n_out).minimum(((2 * length - 1) * n_out)[:, None])
    half_width = 2 * (length.clamp(min=n_out) if antialias else torch.full_like(length, n_out))
    return ((2 * at + 1)[:, None, :] * n_out - centre[:, :, None]).float() / half_width[:, None, None].float()


def resize_batch(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resize float (n, channels, height, width) with weights (n, out_height, height) and (n, out_width, width)."""
    return torch.matmul(rows.unsqueeze(1), torch.matmul(x, columns.transpose(1, 2).unsqueeze(1)))
