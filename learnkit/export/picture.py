"""A picture file as the tensor that an exported model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_picture(path: Path, info: dict[str, Any]) -> Tensor:
    """Return the picture as float (channels, height, width) in [0, 1], normalized with the file's stats.

    The shorter side is resized, and the middle is cut out.
    """
    shapes = [entry["shape"] for entry in info["inputs"]]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] not in (1, 3):
        raise ValueError(
            f"the model takes inputs of shape {', '.join(map(str, shapes))}, expected one picture: [1 or 3, height, "
            f"width]."
        )
    channels, height, width = shapes[0]
    x = pixels_of(path, channels, height, width).float() / 255
    if info.get("stats") is None:
        return x
    mean, std = (torch.tensor(part, dtype=torch.float32)[:, None, None] for part in info["stats"])
    return (x - mean) / std


def pixels_of(path: Path, channels: int, height: int, width: int) -> Tensor:
    """Return uint8 (channels, height, width), with the same steps as for the training pictures of a folder."""
    from learnkit.vision.decode import fitted_picture, read_picture

    try:
        picture = fitted_picture(read_picture(str(path), channels), height, width)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        .reshape(height, width, channels)
        .permute(2, 0, 1)
    )
