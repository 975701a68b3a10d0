"""Text files that grow line by line, and go on after a step: what a killed process left of a line is cut off."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from learnkit.checkpoint.files import explained_os_error, sync_folder


class Lines:
    """A text file to which lines are added, each in it when `add` returns.

    `step_of`: the step that a line is of; None: of none, it stays; ValueError: it is no whole line. `is_epochs`:
    whether it is an epoch's.
    """

    def __init__(self, path: Path, step_of: Callable[[str], int | None], is_epochs: Callable[[str], bool]) -> None:
        self.path, self.step_of, self.is_epochs = path, step_of, is_epochs
        self.file: IO[str] | None = None

    def open(self, after: int | None, *, amid: bool = False) -> bool:
        """`after`: None to begin the file anew; a step to keep the lines up to it, `amid` an epoch, whose own line is
        not kept. Returns whether it has any.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [] if after is None or not self.path.exists() else self.lines_until(after, amid)
            part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
            part.write_text("".join(kept), encoding="utf-8")
            os.replace(part, self.path)
            sync_folder(self.path.parent)
            self.file = self.path.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise explained_os_error(error, self.path, 0) from error
        return bool(kept)

    def lines_until(self, step: int, amid: bool) -> list[str]:
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                own = self.step_of(line)
            except ValueError:
                continue
            if not line.endswith("\n"):
                continue
            if own is None or own < step or (own == step and not (amid and self.is_epochs(line))):
                kept.append(line)
        return kept

    def add(self, line: str) -> None:
        assert self.file is not None
        try:
            self.file.write(line + "\n")
            self.file.flush()
        except OSError as error:
            raise explained_os_error(error, self.path, len(line)) from error

    def close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            file.close()
