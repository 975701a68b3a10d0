"""What one rank asks of all ranks, and what all agree to do at an epoch's end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from learnkit.distributed.compare import check_same, digest_of_facts
from learnkit.distributed.reduce import agree_all

STOP, WANTED = 2, 100  # codes of what a rank has at an epoch's end: a stop, or a request, with its number added


@dataclass(frozen=True)
class Request:
    """What all ranks do after the current batch.

    `kind` is "save", "signal" (save, then leave because of the signal `number`), or a stage that ends: "train",
    "epoch", "fit".
    """

    kind: str
    number: int = 0

    @property
    def text(self) -> str:
        """As it is in the store that the ranks share."""
        return f"{self.kind} {self.number}"

    @classmethod
    def from_text(cls, text: str) -> Request:
        kind, number = text.split()
        return cls(kind, int(number))


SAVE = Request("save")


class Settled(NamedTuple):
    """What all ranks do at an epoch's end. `pending`: whether any rank had something to settle."""

    pending: bool
    request: Request | None
    fit_ends: bool


def settle(request: Request | None, *, fit_ends: bool, pending: bool, facts: dict[str, int]) -> Settled:
    """Agree on the strongest of what the ranks have, in one collective; raises ValueError where facts differ.

    `request` is a save or a signal; of signals the one with the largest number counts.
    """
    own = WANTED + request.number if request is not None else STOP if fit_ends else int(pending)
    found = digest_of_facts(facts)
    strongest, ends, largest, negative = agree_all([own, int(fit_ends), found, -found])
    if largest != -negative:
        check_same(facts)
    number = strongest - WANTED
    agreed = None if number < 0 else Request("signal", number) if number else SAVE
    return Settled(strongest > 0, agreed, bool(ends))
