"""Datasets on this machine as folders of pictures: `folder/train/<class>/…`."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from learnkit.checkpoint.files import Damaged, as_path
from learnkit.distributed.reduce import rank0_first
from learnkit.vision.archives import Archive, Remote, URLs
from learnkit.vision.download import NotFound, download, verify_checksum
from learnkit.vision.extract import ENDINGS, extract
from learnkit.vision.lock import one_at_a_time

DATA = "LEARNKIT_DATA"  # environment variable: a folder of datasets, one dataset, or an archive


def untar_data(
    source: Archive | str,
    dest: str | Path | None = None,
    *,
    archive: str | Path | None = None,
    checksum: str | None = None,
) -> Path:
    """Return the folder of a dataset; it is downloaded, verified and unpacked once per machine: `path/train/<class>/…`.

    $LEARNKIT_DATA may also be the dataset itself, or a local archive of it. An interrupted download is resumed.

    Args:
        source: one of `URLs`, or the address of an archive
        dest: folder of datasets; None: $LEARNKIT_DATA, else ~/.cache/learnkit/data
        archive: a local archive or folder to use instead. It may have another format or be a subset, with pictures in
            folders of classes
        checksum: "sha256:…" or "md5:…", for an address or a local archive

    Raises:
        OSError: when there is no network; the message says what to do
        Damaged: (of learnkit.checkpoint.files, a ValueError) when a file is not the expected one
    """
    if isinstance(source, str):
        source = from_address(source, checksum)
    elif checksum is not None and archive is None:
        raise ValueError(f"checksum=… is for addresses, and the checksum of {source.name} is known: remove checksum=….")
    local = as_path(archive) if archive is not None else from_environment(source) if dest is None else None
    if local is not None and not local.exists():
        raise FileNotFoundError(
            f"{local} does not exist: expected an archive ({', '.join(ENDINGS)}) or a folder of {source.name}."
        )
    if local is not None and local.is_dir():
        return local
    root = as_path(dest) if dest is not None else default_root()
    folder = root / (source.name if local is None else f"{source.name}-{identity(local)}")
    with rank0_first():
        if not folder.exists():
            with one_at_a_time(root / f".{folder.name}.lock"):
                if not folder.exists():
                    make(folder, lambda place: unpack(source, local, checksum, root, place))
    return folder


def from_address(address: str, checksum: str | None) -> Archive:
    file = address.partition("?")[0].rstrip("/").rpartition("/")[2]
    ending = next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if file.lower().endswith(ending)), None)
    if ending is None:
        raise ValueError(f"{address} is not the address of an archive: expected one that ends in {', '.join(ENDINGS)}.")
    return Archive(file[: -len(ending)], (Remote(file, (address,), checksum),))


def from_environment(source: Archive) -> Path | None:
    """Return what $LEARNKIT_DATA has of this dataset: a folder, an archive, or None."""
    place = os.environ.get(DATA)
    if not place:
        return None
    root = as_path(place)
    if not root.exists():
        raise FileNotFoundError(f"{DATA}={place} does not exist: expected a folder or an archive of {source.name}.")
    if root.is_file() or (root / "train").is_dir():
        return root
    if (root / source.name).is_dir():
        return root / source.name
    return next(
        (root / f"{source.name}{ending}" for ending in ENDINGS if (root / f"{source.name}{ending}").is_file()), None
    )


def default_root() -> Path:
    place = os.environ.get(DATA)
    if place and as_path(place).is_dir() and os.access(as_path(place), os.W_OK):
        return as_path(place)
    return Path.home() / ".cache" / "learnkit" / "data"


def identity(archive: Path) -> str:
    """Return an identifier of a local archive, from its path, size and last change."""
    stat = archive.stat()
    return hashlib.sha256(f"{os.path.realpath(archive)} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]


def make(folder: Path, fill: Callable[[Path], Path]) -> None:
    """Create a new folder, completely or not at all: `fill(place)` creates it inside `place` and returns its path."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        made = fill(place)
        made.chmod(0o777 & ~umask())  # mkdtemp's folders are private
        os.replace(made, folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def unpack(source: Archive, local: Path | None, checksum: str | None, root: Path, place: Path) -> Path:
    """Return the dataset as a folder of pictures inside `place`."""
    raw = place / "raw"
    if local is not None:
        verify_checksum(local, checksum, local)
        extract(local, raw)
    else:
        files = [fetched(source, remote, root) for remote in source.remotes]
        if source.kind == "mnist":
            return from_idx(files, source.classes, place / "pictures")
        for file in files:
            extract(file, raw)
        if files[0].parent == root / ".downloads":
            files[0].unlink()
    for kind, marker in (("cifar10", "data_batch_1.bin"), ("cifar100", "fine_label_names.txt")):
        if found := next(raw.rglob(marker), None):
            return from_cifar(found.parent, kind, place / "pictures")
    if any(next(raw.rglob(name), None) is not None for name in ("data_batch_1", "batches.meta")):
        raise Damaged(
            f"{local} contains pickles, which run code when they are read. Use the binary version, "
            f"{URLs.CIFAR.remotes[0].file}."
        )
    return top(raw)


def fetched(source: Archive, remote: Remote, root: Path) -> Path:
    """Return a file of the dataset: from the folder of datasets if the user put it there, else downloaded."""
    if (root / remote.file).is_file():
        verify_checksum(root / remote.file, remote.checksum, root / remote.file)
        return root / remote.file
    (root / ".downloads").mkdir(parents=True, exist_ok=True)
    path = root / ".downloads" / remote.file
    try:
        if path.is_file() and remote.checksum is not None:
            verify_checksum(path, remote.checksum, path)
            return path
    except Damaged:
        path.unlink()
    try:
        return download(remote, path)
    except NotFound as error:
        checksum = f" ({remote.checksum})" if remote.checksum else ""
        raise OSError(
            f"{source.name} could not be downloaded: {error}. Without a network, copy {remote.file}{checksum} from "
            f"another machine into {root}; or pass an archive or a folder of pictures: untar_data(…, "
            f"archive='/path/to/it'), or {DATA}=/path/to/it in the environment."
        ) from None


def top(raw: Path) -> Path:
    """Return the innermost folder that contains `train`, or more than one entry."""
    while True:
        inner = [path for path in raw.iterdir() if not path.name.startswith((".", "__MACOSX"))]
        if len(inner) != 1 or not inner[0].is_dir() or inner[0].name == "train":
            return raw
        raw = inner[0]


# --- other formats, as folders of pictures -----------------------------------
def from_cifar(raw: Path, kind: str, place: Path) -> Path:
    """Convert the binary versions of CIFAR-10 and CIFAR-100: records of one or two labels, then 3,072 bytes."""
    ten = kind == "cifar10"
    names = (raw / ("batches.meta.txt" if ten else "fine_label_names.txt")).read_text().split()
    batches = {
        "train": sorted(raw.glob("data_batch_*.bin")) if ten else [raw / "train.bin"],
        "test": [raw / ("test_batch.bin" if ten else "test.bin")],
    }
    n_labels = 1 if ten else 2
    for part, files in batches.items():

        def records(files: Sequence[Path] = files) -> Iterator[tuple[int, bytes]]:
            for file in files:
                data, size = file.read_bytes(), n_labels + 3072
                if len(data) % size:
                    raise Damaged(f"{file.name} has {len(data):,} bytes, expected a multiple of {size}.")
                for first in range(0, len(data), size):
                    yield data[first + n_labels - 1], data[first + n_labels : first + size]

        write_pictures(records(), place / part, names, (32, 32), n_channels=3)
    return place


def from_idx(files: Sequence[Path], classes: Sequence[str], place: Path) -> Path:
    """Convert the four files of MNIST and similar datasets: (images, labels) for training, and for test."""
    for part, images, labels in (("train", *files[:2]), ("test", *files[2:])):
        pixels, numbers = gzip.decompress(images.read_bytes()), gzip.decompress(labels.read_bytes())[8:]
        n, height, width = (int.from_bytes(pixels[at : at + 4], "big") for at in (4, 8, 12))
        if len(pixels) != 16 + n * height * width or len(numbers) != n:
            raise Damaged(f"{images.name} and {labels.name} do not match.")
        size = height * width
        records = ((numbers[i], pixels[16 + i * size : 16 + (i + 1) * size]) for i in range(n))
        write_pictures(records, place / part, classes, (height, width), n_channels=1)
    for file in files:
        if file.parent.name == ".downloads":
            file.unlink()
    return place


def write_pictures(
    records: Iterator[tuple[int, bytes]],
    folder: Path,
    classes: Sequence[str],
    size: tuple[int, int],
    *,
    n_channels: int,
) -> None:
    """Write PNG files, numbered in the order of the archive; `records`: (class, bytes by channel, row and column)."""
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True)
    shape = (size[1], size[0])
    for number, (label, pixels) in enumerate(records):
        n = len(pixels) // n_channels
        bands = [Image.frombytes("L", shape, pixels[k * n : (k + 1) * n]) for k in range(n_channels)]
        picture = bands[0] if n_channels == 1 else Image.merge("RGB", bands)
        picture.save(folder / classes[label] / f"{number:05}.png", compress_level=1)


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
