"""Archives are unpacked into one folder, and never outside of it."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from learnkit.checkpoint.files import Damaged

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".zip")


def extract(archive: Path, folder: Path) -> None:
    """Unpack a tar or zip file into `folder`.

    Links are rejected, even harmless ones; permissions and owners are ignored.

    Raises:
        Damaged: when it is not an archive, is incomplete, or contains anything but folders and files inside its folder
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            extract_zip(archive, folder)
        else:
            extract_tar(archive, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, *decompression_errors()) as error:
        what = str(error).partition(":\n")[0] or type(error).__name__
        raise Damaged(
            f"{archive} cannot be unpacked: {what}. It is not a {', '.join(ENDINGS)} file, or it is incomplete."
        ) from None


def decompression_errors() -> tuple[type[Exception], ...]:
    import gzip
    import lzma
    import zlib

    return (gzip.BadGzipFile, lzma.LZMAError, zlib.error)


def extract_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as file:
        for member in file:
            place = checked(member.name, archive, folder)
            if member.isdir():
                place.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                with opened(file.extractfile(member)) as source:
                    write_entry(source, place)
            else:
                kind = f"a link to {member.linkname}" if member.issym() or member.islnk() else "a device"
                raise Damaged(
                    f"{archive} contains {member.name}, {kind}, expected folders and files only: nothing was unpacked."
                )


def extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            place = checked(member.filename, archive, folder)
            if (member.external_attr >> 16) & 0o170000 == 0o120000:
                raise Damaged(
                    f"{archive} contains {member.filename}, a link, expected folders and files only: nothing was "
                    "unpacked."
                )
            if member.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                with file.open(member) as source:
                    write_entry(source, place)


def checked(name: str, archive: Path, folder: Path) -> Path:
    """Return the path of a member, inside the folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or ":" in (parts.parts or ("",))[0] or "\0" in name:
        raise Damaged(
            f"{archive} contains {name!r}, which is outside of its folder: the archive may be malicious, and nothing "
            f"was unpacked."
        )
    return folder.joinpath(*parts.parts)


@contextmanager
def opened(file: IO[bytes] | None) -> Iterator[IO[bytes]]:
    assert file is not None
    with file:
        yield file


def write_entry(source: Any, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as target:
        shutil.copyfileobj(source, target)
