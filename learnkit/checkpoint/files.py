"""The base of everything that is written: hashed while it is written, durable when finished, verified when read."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnkit.devices.staging import on_host

CHUNK = 1 << 18  # stays in a core's cache between reading and hashing: 1 MB took 5 % more processor time (2026-11-21)
LARGE = 1 << 16  # a piece with at least so many bytes wakes the other thread
PARTIAL = re.compile(
    r"\..+\.(\d+)-(\d+)\.part|\.\d{6,}-step-\d+\.(\d+)\.part"
)  # the second pattern is that of format 1
SEAL = b"sha256:"  # start of the zip comment at the end of a sealed file, which torch ignores
BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError)
_switch, _n_without, _crc32_before = threading.Lock(), 0, True


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that the user gave; `~` at its beginning is the home folder, as in a shell."""
    return Path(path).expanduser()


class Damaged(ValueError):
    """A file that cannot be verified; the message says which one and why."""


# --- writing -----------------------------------------------------------------
class Growing:
    """A new file that another thread hashes while it grows.

    The thread reads the file, whose pages were just written. It does not read the memory that is saved: that may be a
    copy that torch frees at once.
    """

    def __init__(self, path: Path, helpers: Executor) -> None:
        self.file = path.open("xb")
        self.error: OSError | None = None
        self.n_bytes = 0
        self.grown, self.ended = threading.Event(), threading.Event()
        self.digest: Future[str] = helpers.submit(self.hash, path)

    def write(self, data: Any) -> int:
        try:
            n = self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        if n >= LARGE:
            self.grown.set()
        return n

    def flush(self) -> None:
        self.file.flush()

    def hash(self, path: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        with path.open("rb", buffering=0) as file:
            while True:
                self.grown.clear()  # before the checks, so that anything later sets it again
                last = self.ended.is_set()  # checked before reading: if it is set, nothing more is written
                while n := file.readinto(buffer):
                    digest.update(buffer[:n])
                if last:
                    return digest.hexdigest()
                self.grown.wait()

    def save(self, state: Any, *, crc32: bool) -> None:
        """torch.save, into the operating system's memory."""
        try:
            with nullcontext() if crc32 else without_crc32():
                torch.save(state, self)  # type: ignore[arg-type]
            self.file.flush()
            self.n_bytes = self.file.tell()
        except Exception:
            if self.error is not None:
                raise self.error from None  # torch turns it into an internal error
            raise
        finally:
            self.end()

    def end(self) -> None:
        self.ended.set()
        self.grown.set()

    def settle(self, *, seal: bool) -> None:
        """Make the file durable and close it; the hash may still be computed while the disk works."""
        with self.file as file:
            os.fsync(file.fileno())
            if seal:
                self.put_seal()

    def put_seal(self) -> None:
        comment = SEAL + self.digest.result().encode()
        self.file.seek(-2, os.SEEK_END)  # the zip's last two bytes are the length of its comment, 0 so far
        self.file.write(len(comment).to_bytes(2, "little") + comment)
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def writing(states: Mapping[Path, Any], *, seal: bool = False) -> Iterator[dict[Path, dict[str, Any]]]:
    """Save each state to a new file with torch.save, and yield {"sha256", "bytes"} of each while the disk works.

    The files are durable after the block. While one is written, those before it are hashed and flushed. Tensors of a
    device are copied to the host, one state after the other. `seal` puts the hash at the end of the file.
    """
    for path, state in states.items():
        check_plain(state, f"the state for {path.name}")
    with ExitStack() as open_files, ThreadPoolExecutor(2 * len(states) or 1, "files") as helpers:
        files, settled = {}, []
        for path, state in states.items():
            files[path] = file = Growing(path, helpers)
            open_files.callback(file.file.close)
            file.save(on_host(state), crc32=seal)  # other tools may read a sealed file and check its crc32
            settled.append(helpers.submit(file.settle, seal=seal))
        yield {path: {"sha256": file.digest.result(), "bytes": file.n_bytes} for path, file in files.items()}
        for done in settled:
            done.result()


@contextmanager
def without_crc32() -> Iterator[None]:
    """Make torch.save skip its own checksums.

    They take a third of its time, sha256 is stronger, and torch.load never reads them. The setting is global for the
    process, and several threads may write at the same time: the last one restores it.
    """
    global _n_without, _crc32_before
    with _switch:
        if _n_without == 0:
            _crc32_before = torch.serialization.get_crc32_options()
        _n_without += 1
        torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        with _switch:
            _n_without -= 1
            if _n_without == 0:
                torch.serialization.set_crc32_options(_crc32_before)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file; it is durable when this returns."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def partial(path: Path) -> Path:
    """Return the path of a file while it is written: .<name>.<pid>-<start time of that process>.part"""
    return path.with_name(f".{path.name}.{os.getpid()}-{started(os.getpid()) or 0}.part")


def clean(folder: Path, name: str = "") -> None:
    """Remove unfinished files of killed processes from a folder: all, or those with one name."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = PARTIAL.fullmatch(path.name)
        if match is None or not path.name.startswith(f".{name}") or is_running(int(match[1] or match[3]), match[2]):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def is_running(pid: int, begun: str | None) -> bool:
    """Return whether the process that started at that time is running; another process may have its pid now."""
    from learnkit.distributed.process import is_alive

    if begun is None:
        return pid != os.getpid() and is_alive(pid)
    return is_alive(pid) and started(pid) in (int(begun), None)


def started(pid: int) -> int | None:
    """Return when a process of this machine started, in clock ticks since boot; None if that cannot be read."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def sync_folder(folder: Path) -> None:
    """Make files that were created and renamed in a folder survive a power cut.

    On systems where folders cannot be opened, this does nothing.
    """
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explained_os_error(error: OSError, path: Path, need: int) -> OSError:
    """Return the same error with the path, the space needed, the free space, and what to do."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    advice = f"It needs about {need / 1e6:.1f} MB; {shutil.disk_usage(place).free / 1e6:.1f} MB are free there. "
    advice += (
        "Make room, or choose another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "Check that the folder exists and is writable"
    )
    return OSError(
        error.errno,
        f"could not write {path}: {error.strerror or error}. {advice}; what was written there before is intact",
    )


def size_of(state: Any) -> int:
    """Return the number of bytes of the tensors in a state."""
    return sum(t.numel() * t.element_size() for t in tensors_to_write(state))


def tensors_to_write(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors_to_write(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors_to_write(v)


def check_plain(value: Any, name: str) -> None:
    """Raise TypeError, before anything is written, for objects that could not be read without executing code."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor, torch.dtype)):
        return
    if isinstance(value, Mapping):
        for key, v in value.items():
            if not isinstance(key, (str, int, float, bool, tuple)):
                raise not_plain_error(key, f"a key of {name}")
            check_plain(v, f"{name}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for i, v in enumerate(value):
            check_plain(v, f"{name}[{i}]")
    else:
        raise not_plain_error(value, name)


def not_plain_error(value: Any, name: str) -> TypeError:
    return TypeError(
        f"{name} is a {type(value).__name__}, which cannot be saved: expected None, a bool, number, string or "
        f"tensor, or a list, tuple or dict of them. Convert it in state_dict(), and back in load_state_dict()."
    )


# --- reading -----------------------------------------------------------------
def read_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """Return what torch.save wrote, if it contains only tensors and plain types; nothing in the file is executed."""
    check_records(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns before it raises
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # malicious files cause many kinds of exceptions
        found = re.search(r"GLOBAL [\w.]+|Unsupported (operand|class) [\w.]+", str(error))
        raise unsafe(
            path, f"it is damaged, or contains other objects ({found[0] if found else type(error).__name__})"
        ) from None


def check_records(path: Path) -> None:
    """Raise Damaged for compressed records and repeated names, which torch never writes.

    A compressed record could expand to any size, and of two records with one name only one would be read.
    """
    if not is_zip(path):
        return  # torch's format before 1.6, or not a file of torch
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except BAD_ZIP as error:
        raise unsafe(path, f"it is incomplete or was changed: {error}") from None
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise unsafe(
                path,
                f"{record.filename} in it is compressed, {record.compress_size} bytes that would expand to "
                f"{record.file_size}, which torch.save never does",
            )
    if len({record.filename for record in records}) < len(records):
        raise unsafe(path, "it has two records with the same name")


def unsafe(path: Path, why: str) -> Damaged:
    return Damaged(f"{path} cannot be read safely as a state of plain tensors: {why}. Nothing was loaded.")


def is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError:
        return False  # torch will report why


def hash_file(path: Path, n: int | None = None) -> tuple[str, int]:
    """Return (sha256, bytes) of a file, or of its first n bytes followed by two zeros."""
    digest, left, n_read = hashlib.sha256(), n, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK if left is None else min(CHUNK, left)):
            digest.update(chunk)
            n_read += len(chunk)
            if left is not None:
                left -= len(chunk)
    if n is not None:
        digest.update(b"\0\0")
    return digest.hexdigest(), n_read


def check_seal(path: Path) -> None:
    """Raise Damaged if a sealed file was changed.

    A file that another tool wrote has no seal; then the zip's own checksums are verified.
    """
    if not is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
            whole = comment.startswith(SEAL) if comment else archive.testzip() is None
    except BAD_ZIP as error:
        raise Damaged(
            f"{path} is incomplete or was changed after it was written: {error}. Nothing was loaded."
        ) from None
    if comment and whole:
        n = path.stat().st_size - len(comment) - 2
        with path.open("rb") as file:
            length = file.seek(n) and file.read(2)
        whole = comment == SEAL + hash_file(path, n)[0].encode() and length == len(comment).to_bytes(2, "little")
    if not whole:
        raise Damaged(f"{path} was changed after it was written: its checksum differs. Nothing was loaded.")
