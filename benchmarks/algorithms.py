"""Bytes on the wire per training step of each `to_distributed(algorithm=…)`, against its formula, and how far its final loss is from
all-reduce's on a small task.

    python benchmarks/algorithms.py [--ranks 2 3 4] [--steps 8]

Ranks talk by gloo over the loopback device of a network namespace of their own (needs root, else that of the machine, which others use
too). Printed: bytes sent by all ranks together per step, measured and by the formula, and their ratio: the formula counts payloads, the
device counts headers and acknowledgements too. Goal: within 5 %.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial

import torch
from torch import nn

from learnkit import DataBunch, Learner
from learnkit.distributed import launch

WIDTH, BATCH, PERIOD, RANK = 1024, 8, 4, 32
OPTIONS = {"allreduce": {}, "fp16": {}, "bf16": {}, "powersgd": {"warmup_steps": 2, "rank": RANK}, "bytegrad": {},
           "local_sgd": {"period": PERIOD, "warmup_steps": 0}, "decentralized": {"period": PERIOD}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))


def learner(name: str, n_steps: int, n_ranks: int) -> Learner:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n_steps * BATCH * n_ranks, WIDTH, generator=g)
    data = DataBunch.from_tensors((x, x[:, :10].argmax(1)), (x, x[:, :10].argmax(1)), bs=BATCH, seed=0)
    learn = Learner(data, net(), opt_func=partial(torch.optim.SGD, momentum=.9), wd=0.)
    return learn.to_distributed(algorithm=name, **OPTIONS[name])


def formula(name: str, w: int) -> float:
    """Bytes that all `w` ranks send per step: a ring all-reduce of n bytes sends 2 (w − 1) n, an all-gather w (w − 1) of each one's."""
    shapes = [tuple(p.shape) for p in net().parameters()]
    n = sum(p.numel() for p in net().parameters())
    allreduce = 2 * (w - 1)
    if name in ("fp16", "bf16"): return allreduce * 2 * n
    if name == "bytegrad": return w * (w - 1) * n
    if name == "powersgd":
        compressed = [s for s in shapes if len(s) == 2 and sum(s) * min(*s, RANK) * 2 < s[0] * s[1]]
        rest = n - sum(a * b for a, b in compressed)
        return allreduce * 4 * (sum((a + b) * RANK for a, b in compressed) + rest)
    if name in ("local_sgd", "decentralized"): return allreduce * 4 * n / PERIOD
    return allreduce * 4 * n


def sent() -> int:
    """Bytes that have left through the loopback device."""
    with open("/proc/net/dev") as file: line = next(line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def traffic(name: str, n_steps: int, n_ranks: int) -> float:
    """What `n_steps` steps more send."""
    from learnkit.distributed import barrier
    totals = []
    for n in (8, 8 + n_steps):
        learn = learner(name, n, n_ranks)
        barrier()
        before = sent()
        with learn.no_logging(): learn.fit(1, 1e-3)
        barrier()
        totals.append(sent() - before)
    return (totals[1] - totals[0]) / n_steps


def final_loss(name: str) -> float:
    learn = learner(name, 30, 2)
    with learn.no_logging(): learn.fit(4, .02)
    return learn.values["valid_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    if args.steps % PERIOD: parser.error(f"--steps: a multiple of {PERIOD}, the period of those that average")
    if os.geteuid() == 0 and "ALONE" not in os.environ:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(command, env={**os.environ, "ALONE": "1"}).returncode)
    torch.set_num_threads(1)
    n = sum(p.numel() for p in net().parameters())
    print(f"{n:,} parameters; {args.steps} steps; final loss after 120 steps on 2 ranks")
    losses = {name: launch(final_loss, 2, name) for name in OPTIONS}
    print(f"{'algorithm':14} {'ranks':>5} {'MB a step':>10} {'formula':>8} {'ratio':>6} {'loss − allreduce''s':>20}")
    for name in OPTIONS:
        for w in args.ranks:
            measured, expected = launch(traffic, w, name, args.steps, w), formula(name, w)
            loss = f"{losses[name] - losses['allreduce']:+.4f} of {losses['allreduce']:.4f}" if w == args.ranks[0] else ""
            print(f"{name:14} {w:5} {measured / 1e6:10.2f} {expected / 1e6:8.2f} {measured / expected:6.3f} {loss:>20}", flush=True)


if __name__ == "__main__":
    main()
