"""One epoch of epoch.py's small convolutional net with ten additional callbacks, compared with the same fit without
them and with a hand-written loop.

    python benchmarks/callbacks.py [--rounds 11] [--images 12800]

Prints the ratios round by round, as median and middle half, of CPU time and of wall time. Goal: 1.03 × the hand-written
loop.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

from epoch import LR, Terminal, cnn, hand, loaders, sgd
from measure import interleave, machine, ratios, spread
from torch.nn import functional as F

from learnkit import DataBunch, Learner, accuracy
from learnkit.callbacks import (
    ActivationStats,
    ClipGradients,
    CSVLogger,
    EarlyStopping,
    GradientStats,
    JSONLogger,
    SaveBest,
    StopAfter,
    TerminateOnNaN,
    Timer,
)


def ten() -> list[Any]:
    return [
        EarlyStopping(),
        SaveBest(),
        StopAfter(steps=10**6),
        TerminateOnNaN(),
        Timer(),
        ClipGradients(10.0),
        CSVLogger(),
        JSONLogger(every_n_steps=50),
        GradientStats(every=50),
        ActivationStats(every=50),
    ]


def ours(n: int, *, callbacks: Callable[[], list[Any]]) -> Callable[[], None]:
    learn = Learner(
        DataBunch(*loaders(n)),
        cnn(),
        loss_func=F.cross_entropy,
        opt_func=sgd,
        wd=0.0,
        metrics=accuracy,
        callbacks=callbacks(),
    )

    def fit() -> None:
        with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
            learn.fit_one_cycle(1, LR)

    return fit


WAYS: dict[str, Callable[[int], Callable[[], None]]] = {
    "hand": hand,
    "learnkit": partial(ours, callbacks=list),
    "learnkit, ten callbacks": partial(ours, callbacks=ten),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, default=12_800)
    args = parser.parse_args()
    print(
        machine(),
        f"n = {args.rounds} rounds of {args.images:,} training and {args.images // 5:,} validation images",
        sep="\n",
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ways = {name: way(args.images) for name, way in WAYS.items()}
        for kind, clock in (("CPU time", time.process_time), ("time", time.perf_counter)):
            seconds = interleave(ways, args.rounds, clock)
            for base in ("hand", "learnkit"):
                print(f"ten callbacks / {base:10} {kind:8} {spread(ratios(seconds, 'learnkit, ten callbacks', base))}")
        os.chdir("/")


if __name__ == "__main__":
    sys.exit(main())
