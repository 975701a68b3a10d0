"""What must be equal on all ranks is compared before the first step: with another learning rate on one rank, training
would continue with wrong results, and without an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from learnkit.distributed.reduce import agree_all, gather_objects, hashed

Fact = str | int | float | bool | None
MISSING = "(not there)"


def check_same(facts: Mapping[str, Fact]) -> None:
    """Check that the ranks have the same facts. All ranks must call it.

    If all are equal only two numbers are sent, the facts only if they differ.

    Args:
        facts: this rank's values by name.

    Raises:
        ValueError: on every rank, when facts differ. It names the entry, the ranks that differ from most ranks (from
            rank 0, if no value has a majority), and the values.
    """
    own = digest_of_facts(facts)
    largest, negative = agree_all([own, -own])
    if largest == -negative:
        return
    differences = differing(gather_objects(dict(facts)))
    if differences:
        raise ValueError(
            "the ranks disagree on what must be equal everywhere:\n  "
            + "\n  ".join(differences)
            + "\nStart every rank with the same script, arguments, seed and versions."
        )


def digest_of_facts(facts: Mapping[str, Fact]) -> int:
    """The same number for the same facts, in any order."""
    return hashed(sorted((name, repr(value)) for name, value in facts.items()))


def differing(by_rank: Sequence[Mapping[str, Fact]]) -> list[str]:
    """One line for each entry that is not the same on all ranks."""
    names = dict.fromkeys(name for facts in by_rank for name in facts)
    shown = {name: [repr(facts[name]) if name in facts else MISSING for facts in by_rank] for name in names}
    return [sentence(name, values) for name, values in shown.items() if len(set(values)) > 1]


def sentence(name: str, values: Sequence[str]) -> str:
    """A line such as `lr: rank 2 has 0.1; ranks 0, 1 have 0.3`. Values are compared as they are shown: 1 and 1.0
    differ, nan equals nan.
    """
    usual = Counter(values).most_common(1)[0][0]  # of equally frequent ones the first: rank 0's
    odd = {value: [rank for rank, v in enumerate(values) if v == value] for value in values if value != usual}
    told = "; ".join(f"{listed_ranks(ranks)} {value}" for value, ranks in odd.items())
    return f"{name}: {told}; {listed_ranks([rank for rank, v in enumerate(values) if v == usual])} {usual}"


def listed_ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    return f"ranks {', '.join(map(str, ranks[:8]))}{' …' if len(ranks) > 8 else ''} have"
