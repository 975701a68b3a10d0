"""A picture in a file, as the tensor that an exported model takes."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_picture(path: Path, info: dict[str, Any]) -> Tensor:
    """Float (channels, height, width), in [0, 1], of the size that the model takes, normalized by the file's stats."""
    shapes = [entry["shape"] for entry in info["inputs"]]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] not in (1, 3):
        raise ValueError(f"the model takes inputs of shape {', '.join(map(str, shapes))}, expected one picture: [1 or 3, height, width].")
    channels, height, width = shapes[0]
    x = decode(path, "L" if channels == 1 else "RGB", height, width).permute(2, 0, 1).float() / 255
    if info.get("stats") is None: return x
    mean, std = (torch.tensor(part, dtype=torch.float32)[:, None, None] for part in info["stats"])
    return (x - mean) / std


def decode(path: Path, mode: str, height: int, width: int) -> Tensor:
    """uint8 (height, width, channels): upright as the camera was held, the shorter side brought to size, the middle cut out."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as image: upright = ImageOps.exif_transpose(image).convert(mode)
        if upright.size != (width, height): upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    except OSError as error: raise ValueError(f"{path} is no picture that can be read: {error}") from None
    return torch.frombuffer(bytearray(upright.tobytes()), dtype=torch.uint8).reshape(height, width, len(mode))
