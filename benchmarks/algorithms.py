"""Bytes that each `to_distributed(algorithm=…)`, and `to_fsdp`, sends per training step, compared with its formula; and
the difference of its final loss from all-reduce's.

    python benchmarks/algorithms.py [--only bytes losses] [--ranks 2 3 4] [--seeds 5]

bytes       what arrives over the (gloo) connections between the ranks, as the kernel counts it for each connection
            (TCP_INFO: payloads, without headers); the difference between two fits of different lengths, to exclude
            validation, barriers and everything before the first step. The store has other connections. `2 x 2` is four
            ranks as two machines of two, also with the bytes between machines. Goal: within 5 % of the formula in
            benchmarks/wire.py
losses      scikit-learn's digits, a perceptron of 64, 128 and 10, batches of 64 over all ranks, SGD with momentum, one
            cycle to 0.2 over 6 epochs (138 steps); the loss on 360 images at the end, and the mean over the seeds of
            its difference from all-reduce's with the same seed. Goal: the mean within BOUNDS

The exit code is 1 when a goal is not reached.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import Counter
from functools import partial
from typing import Any

import torch
import torch._dynamo  # optimizers import it; the forked ranks then need not, which takes 2 s each
from connections import to_ranks
from measure import machine
from torch import nn
from wire import GLOO_ROUNDS, WORDS, Settings, collectives, crossing
from wire import sent as formula

from learnkit import DataBunch, Learner
from learnkit.distributed import barrier, launch
from learnkit.distributed.reduce import gather_objects

WIDTH, BATCH, SETTINGS = 1024, 8, Settings(period=4, rank=32)
N_STEPS = 16  # of hierarchical's longest period
OPTIONS: dict[str, dict[str, Any]] = {
    "powersgd": {"warmup_steps": 2, "rank": SETTINGS.rank},
    "decentralized": {"period": SETTINGS.period},
    **{name: {"period": SETTINGS.period, "warmup_steps": 0} for name in ("local_sgd", "hierarchical")},
}
TOLERANCE = 0.05

DIGITS: dict[str, dict[str, Any]] = {
    "powersgd": {"rank": 4},
    "decentralized": {"period": 4},
    **{name: {"period": 4, "warmup_steps": 50} for name in ("local_sgd", "hierarchical")},
}
BOUNDS = {
    "fp16": 0.001,
    "bf16": 0.001,
    "powersgd": 0.005,
    "bytegrad": 0.002,
    "local_sgd": 0.01,
    "hierarchical": 0.02,
    "decentralized": 0.01,
    "to_fsdp": 1e-5,
}


# --- bytes -------------------------------------------------------------------
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))


def spread(learn: Learner, word: str, options: dict[str, Any]) -> Learner:
    if word == "to_fsdp":
        return learn.to_fsdp(blocks=nn.Linear)
    return learn.to_distributed(algorithm=word, **options)


def traffic(word: str, m: int) -> tuple[float, float]:
    """Return (bytes of all ranks, bytes between machines of `m` ranks) per step."""
    os.environ["LOCAL_WORLD_SIZE"] = str(m)
    counts = [count_of_fit(word, n) for n in (N_STEPS, 2 * N_STEPS)]
    added = counts[1] - counts[0]
    between = sum(n for (sender, receiver), n in added.items() if sender // m != receiver // m)
    return added.total() / N_STEPS, between / N_STEPS


def count_of_fit(word: str, n_steps: int) -> Counter[tuple[int, int]]:
    w = int(os.environ["WORLD_SIZE"])
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n_steps * BATCH * w, WIDTH, generator=g)
    data = DataBunch.from_tensors((x, x[:, :10].argmax(1)), (x[:w], x[:w, :10].argmax(1)), bs=BATCH, seed=0)
    learn = spread(
        Learner(data, net(), opt_func=partial(torch.optim.SGD, momentum=0.9), wd=0.0), word, OPTIONS.get(word, {})
    )
    before = between_ranks()
    with learn.no_logging():
        learn.fit(1, 1e-3)
    return between_ranks() - before


def between_ranks() -> Counter[tuple[int, int]]:
    """Return {(sender, receiver): bytes that have arrived so far}."""
    barrier()
    ends: list[dict[str, int]] = gather_objects({ends: counts.received for ends, counts in to_ranks().items()})
    owners = {end: rank for rank, own in enumerate(ends) for end in own}
    counts: Counter[tuple[int, int]] = Counter()
    for receiver, own in enumerate(ends):
        for end, n in own.items():
            sender = owners.get(" ".join(reversed(end.split())))
            if sender is not None:
                counts[sender, receiver] += n
    return counts


def report_bytes(worlds: list[int]) -> bool:
    shapes = [tuple(p.shape) for p in net().parameters()]
    print(
        f"{sum(p.numel() for p in net().parameters()):,} parameters, {N_STEPS} steps; MB that all ranks send a step\n"
    )
    print(f"{'word':14} {'ranks':>6} {'measured':>9} {'formula':>8} {'ratio':>6}   between machines")
    good = True
    for word in WORDS:
        for w, m in [*((w, w) for w in worlds), *([(4, 2)] if 4 in worlds else [])]:
            parts = collectives(word, shapes, w, m, SETTINGS)
            found = launch(traffic, w, word, m)
            expected = [sum(f(part, w, m, GLOO_ROUNDS) for part in parts) for f in (formula, crossing)]
            ratios = [a / b for a, b in zip(found, expected, strict=True) if b]
            good = good and all(abs(ratio - 1) <= TOLERANCE for ratio in ratios)
            sizes = f"{found[0] / 1e6:9.2f} {expected[0] / 1e6:8.2f} {ratios[0]:6.3f}"
            line = f"{word:14} {w if w == m else '2 x 2':>6} {sizes}"
            print(
                line + (f"   {found[1] / 1e6:.2f} {expected[1] / 1e6:.2f} {ratios[1]:.3f}" if len(ratios) > 1 else ""),
                flush=True,
            )
    return good


# --- losses ------------------------------------------------------------------
def digits() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    from sklearn.datasets import load_digits

    x, y = map(torch.as_tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x.float() / 16)[order], y[order]
    return (x[360:], y[360:]), (x[:360], y[:360])


def final_losses(word: str, seeds: int, m: int) -> list[float]:
    os.environ["LOCAL_WORLD_SIZE"] = str(m)
    return [final_loss(word, seed) for seed in range(seeds)]


def final_loss(word: str, seed: int, n_epochs: int = 6) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    train, valid = digits()
    data = DataBunch.from_tensors(train, valid, bs=64 // int(os.environ["WORLD_SIZE"]), seed=seed)
    learn = spread(
        Learner(data, model, opt_func=partial(torch.optim.SGD, momentum=0.9), wd=0.0), word, DIGITS.get(word, {})
    )
    with learn.no_logging():
        learn.fit_one_cycle(n_epochs, 0.2)
    return learn.values["valid_loss"]


def report_losses(n_seeds: int) -> bool:
    good = True
    for w, m in ((2, 2), (4, 2)):
        base = launch(final_losses, w, "allreduce", n_seeds, m)
        print(
            f"\n{w if w == m else '2 x 2'} ranks, {n_seeds} seeds: allreduce's final loss {statistics.mean(base):.4f} "
            f"({min(base):.4f}–{max(base):.4f})\n\n{'word':14} {'mean difference':>16} {'of the seeds':>20} {'goal':>8}"
        )
        for word in WORDS[1:]:
            found = launch(final_losses, w, word, n_seeds, m)
            differences = [a - b for a, b in zip(found, base, strict=True)]
            mean = statistics.mean(differences)
            good = good and abs(mean) <= BOUNDS[word]
            print(
                f"{word:14} {mean:+16.5f} {f'{min(differences):+.5f} to {max(differences):+.5f}':>20} {BOUNDS[word]:8}",
                flush=True,
            )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("bytes", "losses"), default=["bytes", "losses"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    good = [report_bytes(args.ranks)] if "bytes" in args.only else []
    if "losses" in args.only:
        good.append(report_losses(args.seeds))
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
