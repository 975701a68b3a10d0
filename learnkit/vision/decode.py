"""Pictures in any format as uint8 of one size. Pillow decodes them, so the pixels are the same as ImageFolder's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, get_start_method
from typing import Any
from warnings import catch_warnings, simplefilter

FEW = 256  # decoding fewer pictures than this takes less time than starting worker processes
PICTURES_A_TASK = 64  # pictures in one task


@dataclass(frozen=True)
class Shape:
    """The shape of every decoded picture: channels (3: RGB, 1: grey), height and width."""

    channels: int
    height: int
    width: int

    @property
    def n_bytes(self) -> int:
        return self.channels * self.height * self.width


class OtherSize(ValueError):
    """Raised when pictures differ in size and no size was given."""


def read_picture(file: str, channels: int) -> Any:
    """Return the file as a Pillow image, RGB or grey, without transparency; raise OSError if it is damaged."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return picture.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise OSError(damage(file, error)) from None


def damage(file: str, error: BaseException) -> str:
    try:
        n_bytes = os.path.getsize(file)
    except OSError:
        return "it is a link to a file that does not exist, or it cannot be read"
    return (
        "it is empty"
        if n_bytes == 0
        else str(error).replace(repr(file), "it").replace(file, "it") or type(error).__name__
    )


def picture_size(file: str) -> tuple[int, int]:
    """Return (height, width), read from the header."""
    from PIL import Image

    with Image.open(file) as picture:
        return picture.height, picture.width


def decode(file: str, shape: Shape, *, resize: bool) -> bytes:
    """Return the pixels in the order channel, row, column.

    With `resize`, the shorter side is resized to the shape, and the middle is cut out.
    """
    picture = read_picture(file, shape.channels)
    if resize:
        picture = fitted_picture(picture, shape.height, shape.width)
    elif picture.size != (shape.width, shape.height):
        raise OtherSize(
            f"{file} is {picture.height}×{picture.width}, other pictures are {shape.height}×{shape.width} "
            "(height × width)"
        )
    pixels = picture.tobytes()
    return pixels if shape.channels == 1 else b"".join([pixels[channel::3] for channel in range(3)])


def fitted_picture(picture: Any, height: int, width: int) -> Any:
    """Resize a picture so that it covers height × width, and cut out its middle.

    Bilinear with antialiasing, like torchvision's Resize and CenterCrop.
    """
    from PIL import Image

    if picture.size == (width, height):
        return picture
    scale = max(height / picture.height, width / picture.width)
    covering = max(width, int(picture.width * scale)), max(height, int(picture.height * scale))
    picture = picture.resize(covering, Image.Resampling.BILINEAR)
    left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def decode_all(
    files: Sequence[str], into: Any, shape: Shape, *, resize: bool, progress: Callable[[int], None] | None = None
) -> dict[int, str]:
    """Decode all files with all cores into a writable buffer that processes share.

    Returns {number: what is wrong} for the damaged files.
    """
    tasks = [(first, files[first : first + PICTURES_A_TASK]) for first in range(0, len(files), PICTURES_A_TASK)]
    damaged: dict[int, str] = {}
    with workers(len(files), into, shape, resize) as run:
        for k, found in enumerate(run(tasks), 1):
            damaged.update(found)
            if progress is not None:
                progress(min(k * PICTURES_A_TASK, len(files)))
    return damaged


@contextmanager
def workers(n: int, into: Any, shape: Shape, resize: bool) -> Iterator[Callable[[Any], Iterator[dict[int, str]]]]:
    """Yield a function that decodes tasks, in order, with one process per core.

    It uses threads if processes cannot be forked.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if n < FEW or n_cores == 1:
        start(into, shape, resize)
        try:
            yield lambda tasks: map(decode_some, tasks)
        finally:
            start(None, shape, resize)
        return
    with catch_warnings():
        simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns of a fork while threads run: these processes use Pillow only, not torch
        pool: Executor
        if get_start_method() == "fork":
            pool = ProcessPoolExecutor(n_cores, get_context("fork"), start, (into, shape, resize))
        else:
            pool = ThreadPoolExecutor(n_cores, "decode", start, (into, shape, resize))
        try:
            yield lambda tasks: pool.map(decode_some, tasks)
        finally:
            pool.shutdown(cancel_futures=True)


target: Any = None  # (buffer, shape, resize) of a worker: inherited, because a buffer cannot be sent


def start(into: Any, shape: Shape, resize: bool) -> None:
    global target
    target = None if into is None else (into, shape, resize)


def decode_some(task: tuple[int, list[str]]) -> dict[int, str]:
    """Decode into the rows from task[0] on; skip what is damaged, and return it with the reason."""
    into, shape, resize = target
    damaged, (first, files) = {}, task
    with catch_warnings():
        simplefilter("ignore")  # Pillow warns of minor damage, and of palettes with transparency
        for row, file in enumerate(files, first):
            try:
                pixels = decode(file, shape, resize=resize)
            except OSError as error:
                damaged[row] = str(error)
            else:
                into[row * shape.n_bytes : (row + 1) * shape.n_bytes] = pixels
    return damaged
