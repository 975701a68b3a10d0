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
            if how == "wrong" and kind_of(found) == kind:
                c, lines, progress = smaller, found, True
                break
    return c, lines


def kind_of(lines: list[str]) -> str:
    """What a failure is, without its numbers: the first one's check and place, or an error's type and text."""
    first = next((line for line in lines), "")
    error = re.search(r"(\w+(Error|Exception|Warning)|hang|signal \w+)[^\n]*", first)
    text = error.group(0) if error and "failed" in first else first
    return re.sub(r"[\d.e+-]+|\(.*?\)|\[.*?\]", "#", text)[:60]


def simpler(c: Configuration) -> Iterator[Configuration]:
    """Each with one thing less, the largest steps first."""
    for field in fields(c):
        value, simplest = getattr(c, field.name), getattr(SIMPLEST, field.name)
        if field.name == "check" or value == simplest:
            continue
        if isinstance(value, tuple) and len(value) > 1 and field.name != "stop":
            yield from (c.changed(**{field.name: shorter}) for shorter in with_one_less(value))
        if allowed(field.name, simplest):
            yield c.changed(**{field.name: simplest})
        yield from (c.changed(**{field.name: less}) for less in less_than(field.name, value))


def with_one_less(values: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield from (values[:k] + values[k + 1 :] for k in range(len(values)))


def allowed(name: str, simplest: Any) -> bool:
    return name not in ("interruptions", "fits") or bool(simplest)


def less_than(name: str, value: Any) -> Iterator[Any]:
    """Values between this one and the simplest."""
    if name == "world" and value == 3:
        yield 2
    if name == "spread" and value != "to_distributed":
        yield "to_distributed"
    if name == "spread" and value.startswith("fsdp,"):
        yield "fsdp"
    if name == "epochs" and value > 2:
        yield 2
    if name == "n" and value != 36:
        yield 36
    if name == "fits" and len(value) == 1 and value != ("fit_one_cycle",):
        yield ("fit_one_cycle",)
    if name == "interruptions":
        for k, own in enumerate(value):
            for smaller in simpler_interruptions(own):
                yield (*value[:k], smaller, *value[k + 1 :])


def simpler_interruptions(i: Interruption) -> Iterator[Interruption]:
    for field in fields(i):
        if getattr(i, field.name) != field.default and field.name != "world":
            yield Interruption(**{**vars(i), field.name: field.default})
    if i.step > 1:
        yield Interruption(**{**vars(i), "step": i.step - 1})
