"""A fixed sample of draws, which is part of every test run; `make fuzz` goes on where it ends."""

from __future__ import annotations

import pytest

from tests.fuzz.command import prepare, verdicts
from tests.fuzz.configuration import Configuration
from tests.fuzz.draw import draw
from tests.fuzz.regressions import REGRESSIONS

N_DRAWS, N_GROUPS = 150, 15


def failures(draws: list[tuple[str, Configuration]]) -> list[str]:
    """What is wrong with each, with the command that shrinks it."""
    prepare()
    numbered = dict(enumerate(draws))
    found = verdicts(((k, c) for k, (_, c) in numbered.items()), n_jobs=1)
    return [
        f"{numbered[k][0]}: {c}\n    " + "\n    ".join(lines[:12]) + f"\n  python -m tests.fuzz --shrink 0 --read "
        f'"{c!r}"'
        for k, c, (how, lines) in found
        if how == "wrong"
    ]


@pytest.mark.parametrize("group", range(N_GROUPS))
def test_what_must_hold_of_every_draw_holds_of_these(group: int):
    wrong = failures([(f"draw {number}", draw(number)) for number in range(group, N_DRAWS, N_GROUPS)])
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_once_failed_does_not(name: str):
    wrong = failures([(name, REGRESSIONS[name])])
    assert not wrong, "\n\n".join(wrong)
