"""Text files that grow line by line, and go on after a step: what a killed process left of a line is cut off."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from learnkit.checkpoint.files import explained_os_error, sync_folder


class Lines:
    """A text file to which lines are added, each in it when `add` returns.

    `step_of` returns the step of a line, None for a line that stays in any case; it raises ValueError for an incomplete
    line. `epoch_of` returns the epoch of an epoch's line, None for other lines.
    """

    def __init__(self, path: Path, step_of: Callable[[str], int | None], epoch_of: Callable[[str], int | None]) -> None:
        self.path, self.step_of, self.epoch_of = path, step_of, epoch_of
        self.file: IO[str] | None = None

    def open(self, after: int | None, *, epoch: int | None = None) -> bool:
        """Open the file: a new one with `after=None`, else with the lines up to this step, except that of an `epoch`
        which is continued. Returns whether any line was kept.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [] if after is None or not self.path.exists() else self.lines_until(after, epoch)
            part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
            part.write_text("".join(kept), encoding="utf-8")
            os.replace(part, self.path)
            sync_folder(self.path.parent)
            self.file = self.path.open("a", encoding="utf-8", newline="")
        except OSError as error:
            raise explained_os_error(error, self.path, 0) from error
        return bool(kept)

    def lines_until(self, step: int, epoch: int | None) -> list[str]:
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                own = self.step_of(line)
            except ValueError:
                continue
            if not line.endswith("\n"):
                continue
            if own is None or own < step or (own == step and (epoch is None or self.epoch_of(line) != epoch)):
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
