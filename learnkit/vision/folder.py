"""The pictures of a folder and their classes: `folder/<class>/…/picture.jpg`, as in torchvision's ImageFolder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


@dataclass(frozen=True)
class Folder:
    """The pictures of one folder, in the order of their classes and names. No picture has been read yet.

    Attributes:
        path: the folder
        names: paths relative to `path`
        labels: class index of each picture
        classes: all classes, sorted, also those without pictures
        fingerprint: changes when a picture is added, removed, renamed or written
    """

    path: Path
    names: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    def files(self) -> list[str]:
        return [os.path.join(self.path, name) for name in self.names]


def read_folder(path: Path, classes: Sequence[str] | None = None) -> Folder:
    """List a folder's pictures.

    Links are followed, each folder once. Hidden files and files of other kinds are skipped.

    Args:
        path: the folder
        classes: the classes of the training set, whose indices are used here too
    """
    if not path.is_dir():
        raise FileNotFoundError(f"the folder {path} does not exist: expected {path}/<class>/<picture>.{near(path)}")
    own = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    if not own:
        raise ValueError(
            f"{path} has no folders: expected {path}/<class>/<picture>, one folder per class. It contains "
            f"{', '.join(sorted(os.listdir(path))[:3]) or 'nothing'}."
        )
    known = list(own) if classes is None else list(classes)
    if strange := [name for name in own if name not in known]:
        raise ValueError(
            f"{path} has classes that the training folder does not have: {', '.join(strange[:5])}. Its classes are "
            f"{', '.join(known[:5])}{', …' if len(known) > 5 else ''}."
        )
    names, labels, digest = [], [], hashlib.sha256()
    for name in own:
        for relative, n_bytes, changed in sorted(pictures_under(path, name)):
            names.append(relative)
            labels.append(known.index(name))
            digest.update(f"{relative}\0{n_bytes}\0{changed}\0".encode(errors="surrogateescape"))
    if not names:
        raise ValueError(
            f"{path} has {len(own)} folders ({', '.join(own[:3])}{', …' if len(own) > 3 else ''}), but they contain no "
            f"pictures: expected files that end in {', '.join(EXTENSIONS)}."
        )
    return Folder(path, names, labels, known, digest.hexdigest())


def pictures_under(path: Path, folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield (name, bytes, time of the last change in ns) of each picture in path/folder; a broken link has 0 and 0."""
    waiting, seen = [folder], set()
    while waiting:
        relative = waiting.pop()
        place = os.path.realpath(path / relative)
        if place in seen:
            continue  # a link to a folder above it
        seen.add(place)
        with os.scandir(path / relative) as entries:
            for entry in entries:
                name = f"{relative}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    try:
                        stat = entry.stat()
                    except OSError:
                        yield name, 0, 0
                    else:
                        yield name, stat.st_size, stat.st_mtime_ns


def near(path: Path) -> str:
    """Return a sentence that lists the existing folders."""
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    folders = sorted(entry.name for entry in os.scandir(place) if entry.is_dir())[:5]
    return f" {place} has {', '.join(folders) or 'no folders'}."
