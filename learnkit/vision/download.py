"""Downloads that resume after an interruption. A file with a wrong checksum is rejected."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from learnkit.checkpoint.files import Damaged, explained_os_error
from learnkit.vision.archives import Remote
from learnkit.vision.pictures import bar

DOWNLOAD_PIECE = 1 << 18
TIMEOUT = 30  # seconds without a byte
N_TRIES = 5  # attempts for one address; each continues where the last one ended


class NotFound(OSError):
    """None of a file's addresses worked."""


def download(remote: Remote, path: Path) -> Path:
    """Download a file to `path` from its first address that works, and verify it.

    An interrupted download is kept in `path` + ".part". If the file has a checksum, this part is not downloaded again.

    Raises:
        NotFound: when no address works, or no file has the right checksum
        OSError: when the disk is full
    """
    part = path.with_name(f"{path.name}.part")
    if remote.checksum is None:
        part.unlink(missing_ok=True)
    reasons = []
    for address in remote.addresses:
        try:
            fetch_whole(address, part)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reasons.append(f"{address}: {getattr(error, 'reason', None) or error or type(error).__name__}")
            continue
        try:
            verify_checksum(part, remote.checksum, address)
        except Damaged as error:
            part.unlink()
            reasons.append(str(error))
            continue
        part.replace(path)
        return path
    raise NotFound("; ".join(reasons))


def fetch_whole(address: str, part: Path) -> None:
    """Complete the file `part`; what was downloaded before an error is kept."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{address} is not an http or https address. For a local file, pass archive=….")
    for k in range(N_TRIES):
        n_before = part.stat().st_size if part.exists() else 0
        try:
            if fetch_rest(address, part, n_before):
                return
        except urllib.error.HTTPError as error:
            if error.code != 416 or not n_before:
                raise  # 416: the part already has all bytes
            error.close()
            if str(n_before) == (error.headers.get("Content-Range") or "").rpartition("/")[2]:
                return
            part.unlink()
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError):
            grew = part.exists() and part.stat().st_size > n_before
            if k == N_TRIES - 1 or not grew:
                raise
    raise ConnectionError(f"the connection was lost {N_TRIES} times before the file was complete")


def fetch_rest(address: str, part: Path, n_before: int) -> bool:
    """Download over one connection; return whether the file is complete."""
    request = urllib.request.Request(
        address, headers={"User-Agent": "learnkit", **({"Range": f"bytes={n_before}-"} if n_before else {})}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        goes_on = response.status == 206 and (response.headers.get("Content-Range") or "").startswith(
            f"bytes {n_before}-"
        )
        if not goes_on:
            n_before = 0
        length = response.headers.get("Content-Length")
        n_whole = None if length is None else n_before + int(length)
        try:
            with part.open("ab" if goes_on else "wb") as file:
                n = copy(response, file, n_before, n_whole, address)
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)) or error.errno is None:
                raise
            raise explained_os_error(error, part, n_whole or 0) from None
    return n_whole is None or n >= n_whole


def copy(response: http.client.HTTPResponse, file: BinaryIO, n: int, n_whole: int | None, address: str) -> int:
    """Copy the response to the file, and return the number of bytes in it."""
    with bar(n_whole or 0, address.rpartition("/")[2]) as progress:
        while piece := response.read(DOWNLOAD_PIECE):
            file.write(piece)
            n += len(piece)
            if progress is not None and n_whole:
                progress(n)
    return n


def verify_checksum(path: Path, checksum: str | None, source: object) -> None:
    """Raise Damaged unless the file has the checksum "md5:…" or "sha256:…"."""
    if checksum is None:
        return
    kind, _, wanted = checksum.partition(":")
    digest = {"md5": lambda: hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256}.get(kind)
    if digest is None:
        raise ValueError(f"checksum={checksum!r}: expected 'sha256:…' or 'md5:…'.")
    found = digest()
    with path.open("rb") as file:
        while piece := file.read(DOWNLOAD_PIECE):
            found.update(piece)
    if found.hexdigest() != wanted.lower():
        raise Damaged(
            f"{source}: the {kind} of {os.path.getsize(path):,} bytes is {found.hexdigest()}, expected {wanted}"
        )
