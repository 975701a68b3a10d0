"""Pages of documentation whose blocks are run: python blocks in their order, and the text blocks right after them,
which they print.
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the page, of the block's first line of code
    start: int  # the place in the page's text
    end: int


class Page:
    """A page and its blocks."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_text(encoding="utf-8")
        self.blocks = [
            Block(match[1], match[2], self.text.count("\n", 0, match.start(2)) + 1, match.start(), match.end())
            for match in re.finditer(r"^```(\w+)\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        ]

    def outputs(self) -> dict[int, Block]:
        """The text blocks that stand right after a python block, with one line or none between, by that one's first
        line.
        """
        return {
            block.line: after
            for block, after in pairwise(self.blocks)
            if (block.language, after.language) == ("python", "text")
            and "\n" not in self.text[block.end : after.start].strip()
        }

    def run(self, but: int | None = None) -> None:
        """Run all python blocks in one namespace, and compare what they print, but of the block that begins at line
        `but`.
        """
        namespace: dict[str, object] = {"__name__": "__main__"}
        expected = self.outputs()
        for block in (b for b in self.blocks if b.language == "python"):
            source = "\n" * (block.line - 1) + block.code  # so that a traceback names the page's own line
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile(source, str(ROOT / self.path), "exec"), namespace)
            if block.line in expected and block.line != but:
                ours, shown = words(without_epochs(printed.getvalue())), words(expected[block.line].code)
                assert ours == shown, f"the block at {self.path}:{block.line}"


def form(text: str) -> str:
    """What must agree of two outputs whose numbers may differ from machine to machine."""
    text = re.sub(r"\d+(\.\d+)(e-?\d+)?", lambda m: "0." + "0" * (6 if len(m[1]) == 7 else 1), text)
    return re.sub(r"\b\d\d:\d\d\b", "00:00", text)


def words(text: str) -> str:
    return " ".join(form(text).split())


def without_epochs(text: str) -> str:
    """An output without the plain lines of the epochs, which most blocks print too."""
    return re.sub(r"^epoch \d+/\d+  .*\n", "", text, flags=re.MULTILINE)
