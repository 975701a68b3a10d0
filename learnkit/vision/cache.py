"""The decoded pictures of a folder as one file: a header that identifies them, checksums, then uint8 pixels.

It is read as mapped memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from learnkit.checkpoint.files import Damaged, explained_os_error, sync_folder
from learnkit.vision.decode import Shape

MAGIC = b"learnkit pixels 1\n"
PAGE = 1 << 16  # mapped memory begins at a multiple of the page size; no known system has a larger one
CHECKSUM_PIECE = 1 << 24  # bytes of one checksum: all cores hash pieces in parallel


def write_pixels(
    path: Path, shape: Shape, n: int, fill: Callable[[Any], dict[int, str]], facts: dict[str, Any]
) -> dict[int, str]:
    """Write the file completely or not at all.

    The disk space is reserved before anything is decoded, so that a full disk raises an OSError here and does not kill
    a process later.

    Args:
        path: the file
        shape: shape of each picture
        n: number of pictures
        fill: decodes into the buffer and returns {row: what is wrong} for the damaged pictures, which are skipped
        facts: what identifies the pictures, for the header

    Returns:
        What `fill` returned.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "r+b") as file:
            reserve(file, PAGE + max(n * shape.n_bytes, 1))
            with mapped(file, mmap.ACCESS_WRITE) as memory:
                damaged = fill(memory[PAGE:])
                n_left = close_up(memory[PAGE:], shape.n_bytes, n, damaged)
                sums = checksums(memory[PAGE : PAGE + n_left * shape.n_bytes])
            file.truncate(PAGE + n_left * shape.n_bytes)
            write_header(file, {**facts, "n": n_left, "shape": asdict(shape)}, sums, damaged)
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~current_umask())
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explained_os_error(error, path, PAGE + n * shape.n_bytes) from None
        raise
    return damaged


def reserve(file: BinaryIO, n_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    else:
        file.truncate(n_bytes)


@contextmanager
def mapped(file: BinaryIO, access: int) -> Iterator[memoryview]:
    memory = mmap.mmap(file.fileno(), 0, access=access)
    view = memoryview(memory)
    try:
        yield view
        if access == mmap.ACCESS_WRITE:
            memory.flush()
    finally:
        view.release()


def close_up(pixels: memoryview, size: int, n: int, damaged: dict[int, str]) -> int:
    """Move the rows together so that those of damaged pictures are removed; return the number of remaining rows."""
    kept = 0
    for row in range(n):
        if row in damaged:
            continue
        if kept != row:
            pixels[kept * size : (kept + 1) * size] = pixels[row * size : (row + 1) * size]
        kept += 1
    return kept


def checksums(pixels: memoryview) -> list[str]:
    """Return the sha256 of each piece, computed by all cores."""
    pieces = [pixels[first : first + CHECKSUM_PIECE] for first in range(0, len(pixels), CHECKSUM_PIECE)]
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda piece: hashlib.sha256(piece).hexdigest(), pieces))
    for piece in pieces:
        piece.release()
    return sums


def write_header(file: BinaryIO, facts: dict[str, Any], sums: Sequence[str], damaged: dict[int, str]) -> None:
    """Write the facts at the beginning of the file and the checksums, whose number is not limited, at the end.

    The checksum of that end is among the facts.
    """
    tail = json.dumps({"sums": sums, "damaged": {str(row): why for row, why in damaged.items()}}).encode()
    head = json.dumps({**facts, "tail": len(tail), "tail_sha256": hashlib.sha256(tail).hexdigest()}).encode()
    head = MAGIC + hashlib.sha256(head).hexdigest().encode() + b"\n" + head
    if len(head) > PAGE:
        raise ValueError(f"the header has {len(head)} bytes, expected {PAGE} or fewer.")
    file.seek(0)
    file.write(head.ljust(PAGE, b" "))
    file.seek(0, os.SEEK_END)
    file.write(tail)
    file.flush()


def read_pixels(path: Path, expected: dict[str, Any]) -> tuple[Tensor, dict[int, str]] | None:
    """Return (pixels, damaged), or None if the file has other pictures.

    The pixels are uint8 (n, channels, height, width), as mapped memory. Every byte is verified.

    Raises:
        Damaged: when the file was changed
        FileNotFoundError: when there is no file
    """
    with path.open("rb") as file:
        facts = read_header(file, path)
        if any(facts.get(name) != value for name, value in expected.items()):
            return None
        shape = Shape(**facts["shape"])
        n_bytes = facts["n"] * shape.n_bytes
        if os.fstat(file.fileno()).st_size != PAGE + n_bytes + facts["tail"]:
            raise Damaged(f"{path} was cut off: its size is wrong.")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy-on-write: torch needs writable memory
    view = memoryview(memory)
    tail = bytes(view[PAGE + n_bytes :])
    if hashlib.sha256(tail).hexdigest() != facts["tail_sha256"]:
        raise Damaged(f"{path} was changed after it was written.")
    more = json.loads(tail)
    if checksums(view[PAGE : PAGE + n_bytes]) != more["sums"]:
        raise Damaged(f"{path} was changed: its checksum differs.")
    pixels = (
        torch.frombuffer(memory, dtype=torch.uint8, offset=PAGE, count=n_bytes)
        if n_bytes
        else torch.zeros(0, dtype=torch.uint8)
    )
    return pixels.view(facts["n"], shape.channels, shape.height, shape.width), {
        int(row): why for row, why in more["damaged"].items()
    }


def read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    head = file.read(PAGE)
    magic, checksum, text = head[: len(MAGIC)], head[len(MAGIC) : len(MAGIC) + 64], head[len(MAGIC) + 65 :].rstrip(b" ")
    if magic != MAGIC or hashlib.sha256(text).hexdigest().encode() != checksum:
        raise Damaged(f"{path} has no valid header.")
    return json.loads(text)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
