"""What a table of parts holds: Python source that makes the part, and what a draw has to know of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """`code` is an expression, or for some tables a statement; it is run for a draw and printed in a failure's script.

    traits      what holds of it; see each table
    weight      how often it is drawn, beside the table's others
    """

    code: str
    traits: frozenset[str] = frozenset()
    weight: float = 1.0

    def has(self, trait: str) -> bool:
        return trait in self.traits


def part(code: str, *traits: str, weight: float = 1.0) -> Part:
    return Part(code, frozenset(traits), weight)
