"""One epoch of a small convolutional net on 28×28 images, batch 128, one cycle, accuracy and validation, against a loop by hand.

    python benchmarks/epoch.py [--rounds 11] [--images 12800]

Printed: time ratios round by round, as median and middle half, on the same DataLoader and with `from_tensors`; and the peak memory of
fresh processes. Goals: 1.02 × on the same DataLoader, below 1 × with from_tensors, 15 MB over the hand loop's peak.
"""
from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import torch
from measure import interleave, machine, ratios, spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

LR = 0.08
sgd = partial(torch.optim.SGD, momentum=0.9)


class Terminal(io.StringIO):
    def isatty(self) -> bool: return True


def images(n: int) -> tuple[Tensor, Tensor]:
    """Class prototypes and noise: float (n, 1, 28, 28), int64 (n,)."""
    generator = torch.Generator().manual_seed(7)
    y = torch.randint(10, (n,), generator=generator)
    return torch.randn(10, 1, 28, 28, generator=generator)[y] + torch.randn(n, 1, 28, 28, generator=generator), y


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def loaders(n: int) -> tuple[DataLoader, DataLoader]:
    return (DataLoader(TensorDataset(*images(n)), batch_size=128, shuffle=True, drop_last=True),
            DataLoader(TensorDataset(*images(n // 5)), batch_size=128))


def hand(n: int) -> Callable[[], None]:
    from tqdm import tqdm
    net, (train_dl, valid_dl) = cnn(), loaders(n)

    def fit() -> None:
        opt = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=len(train_dl))
        with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
            net.train()
            losses = []
            for xb, yb in tqdm(train_dl, leave=False):
                loss = F.cross_entropy(net(xb), yb)
                loss.backward()
                opt.step()
                opt.zero_grad()
                scheduler.step()
                losses.append(loss.detach())
            net.eval()
            totals = torch.zeros(3)
            with torch.no_grad():
                for xb, yb in valid_dl:
                    out = net(xb)
                    totals += torch.stack([F.cross_entropy(out, yb) * len(yb), (out.argmax(1) == yb).sum(), torch.tensor(float(len(yb)))])
            print(torch.stack(losses).mean().item(), (totals[:2] / totals[2]).tolist())
    return fit


def ours(n: int, *, tensors: bool) -> Callable[[], None]:
    from learnkit import DataBunch, Learner, accuracy
    data = DataBunch.from_tensors(images(n), images(n // 5), bs=128) if tensors else DataBunch(*loaders(n))
    learn = Learner(data, cnn(), loss_func=F.cross_entropy, opt_func=sgd, wd=0., metrics=accuracy)

    def fit() -> None:
        with redirect_stdout(Terminal()), redirect_stderr(Terminal()): learn.fit_one_cycle(1, LR)
    return fit


WAYS: dict[str, Callable[[int], Callable[[], None]]] = {
    "hand": hand, "learnkit, same DataLoader": partial(ours, tensors=False), "learnkit, from_tensors": partial(ours, tensors=True)}


def peak_mb(name: str, n: int) -> float:
    """Peak memory of a fresh process that runs one epoch."""
    command = [sys.executable, __file__, "--images", str(n), "--one", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, default=12_800)
    parser.add_argument("--one", choices=WAYS, help="run one epoch and print the peak memory in MB")
    args = parser.parse_args()
    if args.one:
        WAYS[args.one](args.images)()
        with open("/proc/self/status") as status:      # ru_maxrss would count the parent's memory too
            print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
        return
    print(machine(), f"n = {args.rounds} rounds of {args.images:,} training and {args.images // 5:,} validation images", sep="\n")
    seconds = interleave({name: way(args.images) for name, way in WAYS.items()}, args.rounds, time.perf_counter)
    peaks = {name: [peak_mb(name, args.images) for _ in range(3)] for name in WAYS}
    print(f"{'':28} {'s/epoch':>8}  {'time, ratio':22}  peak MB over hand (n = 3, range)")
    for name in WAYS:
        over = [mb - statistics.median(peaks["hand"]) for mb in peaks[name]]
        print(f"{name:28} {statistics.median(seconds[name]):8.3f}  {spread(ratios(seconds, name, 'hand')):22}  "
              f"{statistics.median(over):+.1f} ({min(over):+.1f} to {max(over):+.1f})")


if __name__ == "__main__":
    sys.exit(main())
