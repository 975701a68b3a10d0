"""Small folders of pictures, and a cache of the test's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LEARNKIT_DATA", raising=False)
    monkeypatch.setenv("LEARNKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """Noise; `size` is (height, width)."""
    n = len(Image.new(mode, (1, 1)).tobytes())
    pixels = torch.randint(0, 256, (*size, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.frombytes(mode, size[::-1], pixels.numpy().tobytes())


def make_folder(
    path: Path,
    *,
    n: int = 6,
    classes: tuple[str, ...] = ("cat", "dog"),
    size: tuple[int, int] = (8, 8),
    parts: tuple[str, ...] = ("train", "valid"),
) -> Path:
    """`n` pictures of each class in each part."""
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            (path / part / name).mkdir(parents=True)
            for i in range(n):
                picture(1000 * p + 100 * c + i, size).save(path / part / name / f"{i}.png")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    return lambda **options: make_folder(tmp_path / "data", **options)
