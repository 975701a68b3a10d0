"""A folder's pictures in memory: read from its cache file, which is written first if necessary."""

from __future__ import annotations

import hashlib
import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnkit.checkpoint.files import Damaged, as_path
from learnkit.distributed.reduce import rank0_first
from learnkit.vision.cache import close_up, read_pixels, write_pixels
from learnkit.vision.decode import OtherSize, Shape, decode_all, picture_size, read_picture
from learnkit.vision.folder import Folder
from learnkit.vision.lock import one_at_a_time

CACHE = "LEARNKIT_CACHE"  # the variable that names the folder of cache files


class Pictures:
    """Decoded pictures, uint8 (n, channels, height, width), their classes, int64 (n,), and their files."""

    def __init__(self, pixels: Tensor, labels: Tensor, files: list[str], classes: list[str]) -> None:
        self.pixels, self.labels, self.files, self.classes = pixels, labels, files, classes

    def __len__(self) -> int:
        return len(self.labels)


def load_pictures(
    folder: Folder,
    *,
    size: tuple[int, int] | None = None,
    n_channels: int = 3,
    on_error: str = "raise",
    cache: str | Path | None = "auto",
) -> Pictures:
    """Decode a folder, or read the pixels from an existing cache file; see `ImageDataBunch.from_folder`."""
    shape = Shape(n_channels, *(size or first_size(folder)))
    pixels, damaged = decoded(folder, shape, size is not None, cache)
    if damaged:
        complain(folder, damaged, on_error)
    kept = [row for row in range(len(folder)) if row not in damaged]
    files = folder.files()
    return Pictures(
        pixels, torch.tensor([folder.labels[row] for row in kept]), [files[row] for row in kept], folder.classes
    )


def first_size(folder: Folder) -> tuple[int, int]:
    """Return (height, width) of the first picture whose header can be read."""
    for file in folder.files():
        try:
            return picture_size(file)
        except (OSError, ValueError, SyntaxError):
            continue
    raise ValueError(
        f"none of the {len(folder)} pictures of {folder.path} can be read: {folder.names[0]} and the others are "
        f"damaged."
    )


def decoded(folder: Folder, shape: Shape, resize: bool, cache: str | Path | None) -> tuple[Tensor, dict[int, str]]:
    """Return (pixels, damaged). One process of each machine decodes first; the others read its file."""

    def fill(buffer: Any) -> dict[int, str]:
        try:
            with bar(len(folder), f"decoding {folder.path.name}") as progress:
                return decode_all(folder.files(), buffer, shape, resize=resize, progress=progress)
        except OtherSize as error:
            raise ValueError(
                f"{error}. Pass size=… to resize all of them: from_folder(path, size=({shape.height}, {shape.width}))."
            ) from None

    if cache is None:
        return decoded_in_memory(shape, len(folder), fill)
    path = cache_file(folder, shape, resize, cache)
    facts = {"fingerprint": folder.fingerprint, "resized": resize}
    with rank0_first():
        try:
            with one_at_a_time(path.with_suffix(".lock")):
                found = known(path, facts, folder, shape)
                if found is None:
                    write_pixels(path, shape, len(folder), fill, facts)
        except OSError as error:
            found = decoded_in_memory(shape, len(folder), fill, error)
    if found is None:
        found = read_pixels(path, facts)
    if found is None:
        raise RuntimeError(
            f"{path} was replaced before it was read: another process decodes {folder.path} differently."
        )
    return found


def known(path: Path, facts: dict[str, Any], folder: Folder, shape: Shape) -> tuple[Tensor, dict[int, str]] | None:
    """Return the content of the cache file if it is valid, else None.

    It is valid if it has these pictures, is intact, and the damaged pictures are still damaged.
    """
    try:
        found = read_pixels(path, {**facts, "shape": vars(shape)})
    except FileNotFoundError:
        return None
    except Damaged as error:
        warnings.warn(f"{error} The pictures are decoded again.", stacklevel=2)
        return None
    files = folder.files()
    return found if found is None or not any(is_readable(files[row], shape) for row in found[1]) else None


def is_readable(file: str, shape: Shape) -> bool:
    try:
        read_picture(file, shape.channels)
    except OSError:
        return False
    return True


def decoded_in_memory(
    shape: Shape, n: int, fill: Callable[[Any], dict[int, str]], error: OSError | None = None
) -> tuple[Tensor, dict[int, str]]:
    """Decode without a file, into at most half of the free memory; `error`: why there is no file."""
    n_bytes, n_free = n * shape.n_bytes, free_memory()
    need = f"{n:,} pictures of {shape.channels}×{shape.height}×{shape.width} take {n_bytes / 1e6:,.0f} MB"
    if n_bytes > n_free / 2:
        raise MemoryError(
            f"{need}, expected at most half of the {n_free / 1e6:,.0f} MB of free memory. Pass a smaller size=…, or a "
            f"cache folder on a disk with enough space: cache=… or {CACHE}.{'' if error is None else f' ({error})'}"
        )
    if error is not None:
        warnings.warn(
            f"{error}. The pictures are decoded into memory instead ({n_bytes / 1e6:,.0f} MB in each process), and "
            f"again in the next run. Choose a folder with enough space: cache=… or {CACHE}.",
            stacklevel=2,
        )
    memory = mmap.mmap(-1, max(n_bytes, 1))  # shared with the worker processes
    damaged = fill(memoryview(memory))
    n_left = close_up(memoryview(memory), shape.n_bytes, n, damaged)
    pixels = (
        torch.frombuffer(memory, dtype=torch.uint8, count=n_left * shape.n_bytes)
        if n_left
        else torch.zeros(0, dtype=torch.uint8)
    )
    return pixels.view(n_left, shape.channels, shape.height, shape.width), damaged


def free_memory() -> int:
    """Return the number of bytes that processes can use without swapping."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def complain(folder: Folder, damaged: dict[int, str], on_error: str) -> None:
    """Name the damaged pictures in an error or a warning."""
    shown = "; ".join(f"{folder.names[row]}: {why}" for row, why in sorted(damaged.items())[:10])
    more = "; …" if len(damaged) > 10 else ""
    text = f"{len(damaged)} of {len(folder):,} pictures of {folder.path} cannot be read: {shown}{more}."
    if on_error == "raise":
        raise ValueError(f"{text} Repair or remove them, or skip them with on_error='skip'.")
    if len(damaged) == len(folder):
        raise ValueError(f"{text} No picture is left.")
    warnings.warn(f"{text} They are skipped.", stacklevel=2)


def cache_file(folder: Folder, shape: Shape, resize: bool, cache: str | Path) -> Path:
    """Return one path for each folder and way of decoding, so that a changed folder replaces its old file."""
    place = (
        as_path(os.environ.get(CACHE) or Path.home() / ".cache" / "learnkit" / "pictures")
        if cache == "auto"
        else as_path(cache)
    )
    way = f"{os.path.realpath(folder.path)} {vars(shape)} {resize}"
    return place / f"{folder.path.name}-{hashlib.sha256(way.encode(errors='surrogateescape')).hexdigest()[:16]}.pixels"


@contextmanager
def bar(n: int, name: str) -> Iterator[Callable[[int], None] | None]:
    """Yield a function that shows how many of n are done, if in a terminal or notebook; else None."""
    from learnkit.callbacks.progress import is_interactive

    if not is_interactive():
        yield None
        return
    from fastprogress.fastprogress import progress_bar

    shown = progress_bar(range(n), total=n, leave=False)
    shown.comment = name
    shown.update(0)
    try:
        yield shown.update
    finally:
        if shown.last_v is not None:
            shown.on_iter_end()
