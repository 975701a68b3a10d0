"""Folders of state that appear completely or not at all, can be verified, and are read without executing anything.

    checkpoints/
        000007-step-1200/           appears by one rename, when every byte of it is on the disk
            manifest.json           format, sha256 and size of each file, information on the run, sha256 of all that
            model.pt, …             torch.save of plain types and tensors: torch.load(…, weights_only=True) reads them
            shard-….safetensors     optional, for a sharded model: each rank's own rows; model.pt then has the shapes

The newest snapshot is the one with the highest serial number that passes verification. This is not guaranteed on
network file systems and object stores, whose renames are not atomic.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnkit.checkpoint.files import (
    Damaged,
    explained_os_error,
    hash_file,
    partial,
    read_state,
    size_of,
    sync_folder,
    write_bytes,
    writing,
)
from learnkit.devices.dtensor import is_shard
from learnkit.devices.staging import bytes_of, fetch_bytes, is_simple

SNAPSHOT_FORMAT = 2  # 1: everything in .pt files
SNAPSHOT_NAME = re.compile(r"(\d{6,})-step-(\d+)")
FILE = re.compile(r"\w[\w-]*\.(pt|safetensors)")


# --- writing -----------------------------------------------------------------
def write_snapshot(folder: Path, name: str, parts: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Write `parts`, one file each, as folder/name, durably; return the path.

    If another process has taken the name, the next free one is used. Raises OSError with path, needed and free space.
    """
    return finish_snapshot(folder / name, made(folder / name, size_of(parts)), parts, about)


def begin_snapshot(folder: Path, step: int, need: int) -> tuple[Path, Path]:
    """Return (final path, path while writing) of a snapshot to which other ranks write files first."""
    final = folder / next_name(folder, step)
    return final, made(final, need)


def made(final: Path, need: int) -> Path:
    """Create and return the hidden folder in which a snapshot of `need` bytes is written."""
    hidden = partial(final)
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise explained_os_error(error, final, need) from error
    return hidden


def finish_snapshot(
    final: Path,
    hidden: Path,
    parts: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    others: Mapping[str, Any] | None = None,
    error: OSError | None = None,
) -> Path:
    """Write `parts` next to the files of `others`, and put everything in place.

    If another rank failed with `error`, clean up and raise it.
    """
    try:
        if error is not None:
            raise error
        with writing({hidden / f"{part}.pt": state for part, state in parts.items()}) as files:
            told = {**(others or {}), **{path.name: told for path, told in files.items()}}
            manifest = {"format": 2 if others else 1, "files": told, "about": dict(about)}
            write_bytes(hidden / "manifest.json", as_text({"manifest": manifest, "sha256": hash_of(manifest)}))
            sync_folder(hidden)
        final = put_in_place(hidden, final)
        sync_folder(final.parent)
    except BaseException as raised:
        shutil.rmtree(hidden, ignore_errors=True)
        need = size_of(parts) + sum(told["bytes"] for told in (others or {}).values())
        if isinstance(raised, OSError):
            raise explained_os_error(raised, final, need) from raised
        raise
    return final


def put_in_place(hidden: Path, final: Path) -> Path:
    while True:
        try:
            os.rename(hidden, final)  # may replace an empty folder, but never a snapshot
        except OSError as error:
            match = SNAPSHOT_NAME.fullmatch(final.name)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or match is None:
                raise
            final = final.with_name(next_name(final.parent, int(match[2])))
        else:
            return final


# --- reading -----------------------------------------------------------------
def read_snapshot(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (parts, about) of a snapshot after verifying it; raise Damaged, and execute nothing."""
    manifest = verify_snapshot(path)
    parts = [name for name in manifest["files"] if name.endswith(".pt")]
    return {name.removesuffix(".pt"): read_state(path / name, device) for name in parts}, manifest["about"]


def verify_snapshot(path: Path) -> dict[str, Any]:
    """Return the manifest, if every file exists with every byte as it was written."""
    manifest = read_manifest(path)
    for name in manifest["files"]:
        if not FILE.fullmatch(name):
            raise Damaged(f"{path}: the manifest lists {name!r}, which is not a file of a checkpoint.")
    extra = {file.name for file in path.iterdir()} - {*manifest["files"], "manifest.json"}
    if extra:
        raise Damaged(f"{path} has {', '.join(sorted(extra))}, which the manifest does not list.")
    for name, told in manifest["files"].items():
        try:
            digest, n = hash_file(own_file(path / name))
        except OSError as error:
            raise Damaged(f"{path / name} cannot be read: {error.strerror or error}.") from None
        if n != told["bytes"]:
            raise Damaged(f"{path / name} has {n} bytes, expected {told['bytes']}: it is incomplete, or was replaced.")
        if digest != told["sha256"]:
            raise Damaged(f"{path / name} was changed after it was written (sha256 differs).")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    try:
        text = own_file(file).read_bytes()
        content = json.loads(text)
    except OSError as error:
        raise Damaged(f"{path} has no readable manifest.json: {error.strerror or error}.") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{file} is not valid JSON.") from None
    if (
        not isinstance(content, dict)
        or set(content) != {"manifest", "sha256"}
        or hash_of(content["manifest"]) != content["sha256"]
    ):
        raise Damaged(f"{file} was changed after it was written (sha256 differs).")
    if as_text(content) != text:
        raise Damaged(f"{file} was changed after it was written: the content is equal, but its bytes differ.")
    manifest = content["manifest"]
    if not is_manifest(manifest):
        raise Damaged(f"{file} is not a manifest of a checkpoint.")
    if manifest["format"] > SNAPSHOT_FORMAT:
        raise Damaged(
            f"{path} has format {manifest['format']}, this version of learnkit reads formats up to {SNAPSHOT_FORMAT}: "
            f"install a newer version."
        )
    return manifest


def own_file(path: Path) -> Path:
    """Return the path if it is a regular file: a link leads elsewhere, and reading a pipe would block."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError("it is a link, a folder or a pipe, not a file")
    return path


def is_manifest(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("format")) is int
        and isinstance(value.get("about"), dict)
        and isinstance(value.get("files"), dict)
        and all(isinstance(told, dict) and set(told) == {"sha256", "bytes"} for told in value["files"].values())
    )


def as_text(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode()


def hash_of(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# --- the folder --------------------------------------------------------------
def all_in(folder: Path) -> list[Path]:
    """Return the snapshots in a folder, oldest first, valid or not."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := SNAPSHOT_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_snapshot(
    folder: Path, device: torch.device | str = "cpu", *, run: str | None = None
) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """Return (path, parts, about) of the newest valid snapshot, of this run if given.

    Damaged snapshots are skipped with a warning.
    """
    for path in reversed(all_in(folder) if run is None else snapshots_of_run(folder, run)):
        try:
            return path, *read_snapshot(path, device)
        except Damaged as damage:
            warnings.warn(f"skipped a damaged checkpoint: {damage}", stacklevel=2)
    return None


def snapshots_of_run(folder: Path, run: str, whole: str = "") -> list[Path]:
    """Return the snapshots whose manifest names this run, oldest first, but those after `whole` before all others.

    `whole` is the name of the newest valid snapshot. A damaged manifest does not say to which run it belongs.
    """
    found: list[Path] = []
    for path in all_in(folder):
        with suppress(Damaged):
            if read_manifest(path)["about"].get("run") == run:
                found.append(path)
    n = next((i for i, path in enumerate(found, 1) if path.name == whole), len(found))
    return found[n:] + found[:n]


def next_name(folder: Path, step: int) -> str:
    serials = [int(match[1]) for path in all_in(folder) if (match := SNAPSHOT_NAME.fullmatch(path.name))]
    return f"{max(serials, default=0) + 1:06d}-step-{step}"


def remove_snapshot(path: Path) -> None:
    """Remove a snapshot; do nothing if it does not exist.

    It is hidden by one rename first, so that a half-removed folder is never taken for a snapshot.
    """
    hidden = partial(path)
    try:
        os.rename(path, hidden)
    except FileNotFoundError:
        return
    if hidden.is_symlink():
        hidden.unlink()  # the target of the link is not ours
    else:
        shutil.rmtree(hidden)


def copied_to_host(parts: Any, into: Any = None) -> Any:
    """Return a copy on the CPU that further training does not change; tensors that share memory become one.

    Tensors of a device have the values that the next work enqueued there would see. The host waits once for all of
    them.

    Args:
        parts: a nested structure
        into: an earlier copy that is no longer needed; its memory is reused, because new pages cost up to ten times the
            copy (see docs/decisions.md)
    """
    copies = Copies()
    made = copies.of(parts, into)
    fetch_bytes(copies.away)
    return made


class Copies:
    """The copies of one snapshot: made at once for tensors on the CPU, collected in `away` for tensors on a device."""

    def __init__(self) -> None:
        self.of_memory: dict[Any, Tensor] = {}  # by location and layout
        self.used: set[Any] = set()  # the memory of the copies
        self.away: list[tuple[Tensor, Tensor]] = []  # bytes on a device, and their destination

    def of(self, parts: Any, earlier: Any) -> Any:
        if isinstance(parts, Tensor):
            return self.of_tensor(parts.detach(), earlier)
        if isinstance(parts, Mapping):
            of_key = earlier if isinstance(earlier, Mapping) else {}
            return {k: self.of(v, of_key.get(k)) for k, v in parts.items()}
        if isinstance(parts, (list, tuple)):
            of_each = (
                earlier if isinstance(earlier, (list, tuple)) and len(earlier) == len(parts) else [None] * len(parts)
            )
            return type(parts)(self.of(v, own) for v, own in zip(parts, of_each, strict=True))
        return parts

    def of_tensor(self, tensor: Tensor, earlier: Any) -> Tensor:
        if tensor.is_meta:
            return tensor  # only the shape: rank 0 has the values
        key = memory_of(tensor)
        if key in self.of_memory:
            return self.of_memory[key].detach()  # another tensor with the same memory
        fits = (
            isinstance(earlier, Tensor)
            and (earlier.shape, earlier.dtype) == (tensor.shape, tensor.dtype)
            and memory_of(earlier) not in self.used
        )
        if not is_simple(tensor):
            made = earlier.copy_(tensor) if fits else tensor.to("cpu", copy=True)
        else:
            made = earlier if fits else torch.empty_like(tensor, device="cpu")
            if made.stride() != tensor.stride():
                tensor = torch.empty_like(made, device=tensor.device).copy_(tensor)  # without gaps
            self.away.append((bytes_of(tensor), bytes_of(made)))
        if key is not None:
            self.of_memory[key] = made
            self.used.add(memory_of(made))
        return made


def memory_of(tensor: Tensor) -> Any:
    """Return a key that is equal for tensors with the same memory and layout; None if they cannot be compared."""
    if tensor.layout is not torch.strided or tensor.numel() == 0 or is_shard(tensor) or tensor.is_meta:
        return None
    return (
        tensor.data_ptr(),
        tensor.device,
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )
