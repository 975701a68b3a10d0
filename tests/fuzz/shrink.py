"""From a configuration that fails to the smallest one that fails alike."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from tests.fuzz.configuration import SIMPLEST, Configuration, Interruption

BUDGET = 240.0  # seconds


def shrunk(c: Configuration, lines: list[str], budget: float = BUDGET) -> tuple[Configuration, list[str]]:
    """Greedily, until no smaller one fails alike or the time is over. Nothing of it depends on chance."""
    from tests.fuzz.command import verdicts

    end, kind, tried = time.monotonic() + budget, kind_of(lines), {c}
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for smaller in simpler(c):
            if smaller in tried or time.monotonic() > end:
                continue
            tried.add(smaller)
            [(_, _, (how, found))] = verdicts([(0, smaller)], 1)
            if how == "wrong" and kind & kind_of(found):
                c, lines, progress = smaller, found, True
                break
    return c, lines


def kind_of(lines: list[str]) -> frozenset[str]:
    """What a failure is, without its numbers: an error's type and text, or the places that differ, of which one in
    common is enough.
    """
    first = next((line for line in lines), "")
    if error := re.search(r"\w+(Error|Exception|Warning): [^\n]*|hang", first):
        return frozenset({plain(error.group(0))})
    return frozenset(
        plain(line.split(":")[0] + ":" + line.split(":")[1].split(".")[0]) if ":" in line else plain(line)
        for line in lines
        if not says_little(line)
    )


def says_little(line: str) -> bool:
    """Whether it only follows from the others: what is measured in the end, of whatever differs."""
    return ": measured" in line or ": validated" in line or ": predicted" in line or ": history" in line


def plain(text: str) -> str:
    return re.sub(r"[\d.e+-]+|\(.*?\)|\[.*?\]", "#", text)[:60]


# --- what is smaller ---------------------------------------------------------
def simpler(c: Configuration) -> Iterator[Configuration]:
    """Many fields at once, then each with one thing less."""
    names = [f.name for f in fields(c) if can_be_reset(f.name) and getattr(c, f.name) != getattr(SIMPLEST, f.name)]
    size = len(names)
    while size > 1:
        size = (size + 1) // 2
        for start in range(0, len(names), size):
            yield c.changed(**{name: getattr(SIMPLEST, name) for name in names[start : start + size]})
    for field in fields(c):
        value, simplest = getattr(c, field.name), getattr(SIMPLEST, field.name)
        if field.name == "check" or value == simplest:
            continue
        if isinstance(value, tuple) and len(value) > 1 and field.name != "stop":
            yield from (c.changed(**{field.name: value[:k] + value[k + 1 :]}) for k in range(len(value)))
        if can_be_reset(field.name):
            yield c.changed(**{field.name: simplest})
        yield from (c.changed(**{field.name: less}) for less in less_than(field.name, value))


def can_be_reset(name: str) -> bool:
    return name not in ("check", "interruptions")


def less_than(name: str, value: Any) -> Iterator[Any]:
    """Values between this one and the simplest."""
    if name == "world" and value == 3:
        yield 2
    if name == "spread" and value != "to_distributed":
        yield "to_distributed"
        if value.startswith("fsdp,"):
            yield "fsdp"
    if name == "epochs" and value > 2:
        yield 2
    if name == "n" and value != 36:
        yield 36
    if name == "fits" and len(value) == 1 and value != ("fit_one_cycle",):
        yield ("fit_one_cycle",)
    if name == "interruptions":
        for k, own in enumerate(value):
            yield from ((*value[:k], smaller, *value[k + 1 :]) for smaller in simpler_interruptions(own))


def simpler_interruptions(i: Interruption) -> Iterator[Interruption]:
    for field in fields(i):
        if getattr(i, field.name) != field.default and field.name != "world":
            yield Interruption(**{**vars(i), field.name: field.default})
    if i.step > 1:
        yield Interruption(**{**vars(i), "step": i.step - 1})
