"""The floor that everything written stands on: hashed while it is written, on the disk when it is said to be, verified when read."""
from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

CHUNK = 1 << 20
LARGE = 1 << 16         # bytes from which handing a piece to another thread is worth it
SEAL = b"sha256:"       # begins the comment that a sealed file ends with: a zip file may have one, and torch ignores it


class Damaged(ValueError):
    """A file that does not verify; the message says which one and why."""


# ---------------------------------------------------------------------- writing
class Hashing:
    """A file opened for writing, whose bytes are hashed on their way, large pieces by another core while they are written."""

    def __init__(self, file: BinaryIO, helper: Executor) -> None:
        self.file, self.helper, self.hash, self.n_bytes = file, helper, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        hashed = self.helper.submit(self.hash.update, data) if len(data) >= LARGE else None
        try: n = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            if hashed is not None: hashed.result()      # the memory is the writer's again when we return
        if hashed is None: self.hash.update(data)
        self.n_bytes += n
        return n

    def flush(self) -> None: self.file.flush()


def write_state(path: Path, state: Any, *, seal: bool = False) -> dict[str, Any]:
    """torch.save to a new file, durable when it returns; {"sha256", "bytes"} of it. `seal` puts the hash at its end."""
    check_plain(state, "the state")
    with path.open("xb") as raw, ThreadPoolExecutor(1, "hash") as helper:
        file = Hashing(raw, helper)
        try: torch.save(state, file)            # type: ignore[arg-type]
        except Exception:
            if file.error is not None: raise file.error from None       # torch makes an internal error of it
            raise
        if seal:
            comment = SEAL + file.hash.hexdigest().encode()
            raw.seek(-2, os.SEEK_END)           # the zip's last two bytes are the length of its comment, which is 0
            raw.write(len(comment).to_bytes(2, "little") + comment)
        raw.flush()
        os.fsync(raw.fileno())
    return {"sha256": file.hash.hexdigest(), "bytes": file.n_bytes}


def write_bytes(path: Path, data: bytes) -> None:
    """A new file, durable when it returns."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make what was created and renamed in it survive a power cut; there is nothing to do where folders cannot be opened."""
    if os.name != "posix": return
    handle = os.open(folder, os.O_RDONLY)
    try: os.fsync(handle)
    finally: os.close(handle)


def explained(error: OSError, path: Path, need: int) -> OSError:
    """The same error, with what was to be written, what it needs, what is free, and what to do."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    advice = f"It needs about {need / 1e6:.1f} MB; {shutil.disk_usage(place).free / 1e6:.1f} MB are free there. "
    advice += "Make room, or choose another folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else \
        "See that the folder exists and may be written to"
    return OSError(error.errno, f"could not write {path}: {error.strerror or error}. {advice}; what was written there before is intact")


def size_of(state: Any) -> int:
    """Bytes of the tensors in it."""
    return sum(t.numel() * t.element_size() for t in tensors_in(state))


def tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor): yield value
    elif isinstance(value, Mapping):
        for v in value.values(): yield from tensors_in(v)
    elif isinstance(value, (list, tuple)):
        for v in value: yield from tensors_in(v)


def check_plain(value: Any, name: str) -> None:
    """Refuse, before it is written, what could not be read again without executing code."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor, torch.dtype)): return
    if isinstance(value, Mapping):
        for key, v in value.items():
            if not isinstance(key, (str, int, float, bool, tuple)): raise refused(key, f"a key of {name}")
            check_plain(v, f"{name}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for i, v in enumerate(value): check_plain(v, f"{name}[{i}]")
    else: raise refused(value, name)


def refused(value: Any, name: str) -> TypeError:
    return TypeError(f"{name} is a {type(value).__name__}, which a file cannot keep: expected None, a bool, number, string or tensor, or a "
                     "list, tuple or dict of them. Convert it in state_dict(), and back in load_state_dict().")


# ---------------------------------------------------------------------- reading
def read_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """What torch.save wrote, if it is nothing but tensors and plain types; nothing in it is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # torch's own, before it refuses
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                          # of many kinds, where a file was made to mislead
        found = re.search(r"GLOBAL [\w.]+|Unsupported (operand|class) [\w.]+", str(error))
        raise Damaged(f"{path} cannot be read safely as a state of plain tensors: it is damaged, or holds other objects. Nothing was "
                      f"loaded. ({found[0] if found else type(error).__name__})") from None


def hash_file(path: Path, n: int | None = None) -> tuple[str, int]:
    """(sha256, bytes) of a file, or of its first n bytes followed by two zeros."""
    digest, left, n_read = hashlib.sha256(), n, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK if left is None else min(CHUNK, left)):
            digest.update(chunk)
            n_read += len(chunk)
            if left is not None: left -= len(chunk)
    if n is not None: digest.update(b"\0\0")
    return digest.hexdigest(), n_read


def check_seal(path: Path) -> None:
    """Raise Damaged where a sealed file was changed. One that others wrote has no seal, but its zip's own checksums."""
    with path.open("rb") as file: is_zip = file.read(2) == b"PK"
    if not is_zip: return                       # of torch's format before 1.6, or nothing of torch's
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
            whole = comment.startswith(SEAL) if comment else archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise Damaged(f"{path} was cut off or changed after it was written: {error}. Nothing was loaded.") from None
    if comment and whole:
        n = path.stat().st_size - len(comment) - 2
        with path.open("rb") as file: length = file.seek(n) and file.read(2)
        whole = comment == SEAL + hash_file(path, n)[0].encode() and length == len(comment).to_bytes(2, "little")
    if not whole: raise Damaged(f"{path} was changed after it was written: its checksum differs. Nothing was loaded.")
