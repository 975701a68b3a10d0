"""Draws, a few at a time, each in a process of its own; counts by check and by world, and the failures."""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch._dynamo

from tests.fuzz.checks import check
from tests.fuzz.configuration import Configuration, Interruption
from tests.fuzz.draw import draw
from tests.fuzz.isolate import Crashed, Process

SECONDS = 200  # for one draw: several lives, each of which has its own limit

Verdict = tuple[str, list[str]]


def prepare() -> None:
    """Before the first fork: what children would import each, and sums in one order."""
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:10")  # see tests/distributed/conftest.py
    torch.set_num_threads(1)


def verdict_of(process: Process) -> Verdict:
    try:
        return process.result()
    except (Crashed, TimeoutError) as error:
        return "wrong", [f"{type(error).__name__}: {error}"]


def verdicts(draws: Iterable[tuple[int, Configuration]], n_jobs: int) -> Iterator[tuple[int, Configuration, Verdict]]:
    """As they come; this process has no threads, so that it can fork."""
    running: list[tuple[int, Configuration, Process]] = []
    draws, more = iter(draws), True
    while running or more:
        while more and len(running) < n_jobs:
            number, c = next(draws, (None, None))
            if number is None or c is None:
                more = False
            else:
                running.append((number, c, Process(check, c, seconds=SECONDS)))
        for one in [one for one in running if one[2].poll()]:
            running.remove(one)
            yield one[0], one[1], verdict_of(one[2])
        time.sleep(0.01)


def until(first: int, count: int | None, minutes: float | None) -> Iterator[tuple[int, Configuration]]:
    end = None if minutes is None else time.monotonic() + 60 * minutes
    number = first
    while (count is None or number < first + count) and (end is None or time.monotonic() < end):
        yield number, draw(number)
        number += 1


def table(counts: Counter[tuple[str, int, str]]) -> str:
    """Rows of a check on a number of ranks: right, refused, wrong."""
    rows = sorted({(name, world) for name, world, _ in counts})
    lines = [f"{'check':16} {'ranks':>5} {'right':>7} {'refused':>8} {'wrong':>6}"]
    for name, world in rows:
        lines.append(
            f"{name:16} {world:5} {counts[name, world, 'right']:7} {counts[name, world, 'refused']:8} "
            f"{counts[name, world, 'wrong']:6}"
        )
    sums = [sum(n for (_, _, how), n in counts.items() if how == which) for which in ("right", "refused", "wrong")]
    return "\n".join([*lines, f"{'all':16} {'':5} {sums[0]:7} {sums[1]:8} {sums[2]:6}"])


def run(
    draws: Iterable[tuple[int, Configuration]], n_jobs: int, *, shown: int = 8
) -> list[tuple[int, Configuration, list[str]]]:
    """The failures, printed as they come."""
    counts: Counter[tuple[str, int, str]] = Counter()
    failures = []
    for number, c, (how, lines) in verdicts(draws, n_jobs):
        counts[c.check, c.world, how] += 1
        if how == "wrong":
            failures.append((number, c, lines))
            print(f"\n{number} {c}\n    " + "\n    ".join(line[:1500] for line in lines[:shown]), flush=True)
    print(f"\n{table(counts)}", flush=True)
    return failures


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Draws configurations, and checks what must hold of each."
    )
    parser.add_argument("--minutes", type=float, help="go on for so long; without any option: 10")
    parser.add_argument("--jobs", type=int, default=2, help="draws at a time")
    parser.add_argument(
        "--from",
        dest="first",
        type=int,
        default=None,
        help="the first number; without it, one that depends on the time",
    )
    parser.add_argument("--count", type=int, help="so many draws")
    parser.add_argument("--only", type=int, help="one draw, and its script")
    parser.add_argument(
        "--shrink",
        type=int,
        help="find the smallest configuration with which this draw's check still fails, and print its script",
    )
    parser.add_argument("--read", help="a configuration as it was printed, in the place of a number")
    given = parser.parse_args(arguments)
    prepare()
    if given.only is not None or given.shrink is not None or given.read is not None:
        return one(given)
    minutes = given.minutes if given.minutes is not None or given.count is not None else 10.0
    first = given.first if given.first is not None else int(time.time()) * 1000
    print(f"draws from {first} on", flush=True)
    failures = run(until(first, given.count, minutes), given.jobs)
    if failures:
        print(
            f"failed: {' '.join(str(number) for number, _, _ in failures)}; python -m tests.fuzz --shrink "
            f"{failures[0][0]}"
        )
    return 1 if failures else 0


def one(given: argparse.Namespace) -> int:
    from tests.fuzz.script import script
    from tests.fuzz.shrink import shrunk

    number = given.only if given.only is not None else given.shrink
    c = (
        eval(given.read, {"Configuration": Configuration, "Interruption": Interruption})
        if given.read is not None
        else draw(number)
    )
    [(_, _, (how, lines))] = verdicts([(0, c)], 1)
    print(f"{c}\n{how}\n    " + "\n    ".join(lines[:40]), flush=True)
    if how == "wrong" and given.only is None:
        c, lines = shrunk(c, lines)
        print(f"\nthe smallest one that fails alike:\n{c}\n    " + "\n    ".join(lines[:40]))
    print(f"\n{script(c)}")
    return 1 if how == "wrong" else 0
