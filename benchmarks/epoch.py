"""One epoch of a small convolutional net on 28×28 images, batch 128, one cycle, accuracy and validation, compared with
a hand-written loop.

    python benchmarks/epoch.py [--rounds 11] [--images 12800] [--device cuda]

Prints the time ratios round by round, as median and middle half, with the same DataLoader and with `from_tensors`, and
the peak memory of new processes. Goals: 1.02 × with the same DataLoader, below 1 × with from_tensors, 15 MB over the
hand-written loop's peak.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

import torch
from measure import CPU, add_device_option, clock_of, interleave, machine, ratios, spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

LR = 0.08
sgd = partial(torch.optim.SGD, momentum=0.9)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def images(n: int) -> tuple[Tensor, Tensor]:
    """Return class prototypes with noise, and the classes: float (n, 1, 28, 28), int64 (n,)."""
    generator = torch.Generator().manual_seed(7)
    y = torch.randint(10, (n,), generator=generator)
    return torch.randn(10, 1, 28, 28, generator=generator)[y] + torch.randn(n, 1, 28, 28, generator=generator), y


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def loaders(n: int, *, pin_memory: bool = False) -> tuple[DataLoader, DataLoader]:
    return (
        DataLoader(TensorDataset(*images(n)), batch_size=128, shuffle=True, drop_last=True, pin_memory=pin_memory),
        DataLoader(TensorDataset(*images(n // 5)), batch_size=128, pin_memory=pin_memory),
    )


def hand(n: int, device: torch.device = CPU) -> Callable[[], None]:
    from tqdm import tqdm

    net, (train_dl, valid_dl) = cnn().to(device), loaders(n, pin_memory=device.type != "cpu")

    def move(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def fit() -> None:
        opt = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=len(train_dl))
        with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
            net.train()
            losses = []
            for xb, yb in tqdm(train_dl, leave=False):
                if device != CPU:
                    xb, yb = move(xb, yb)
                loss = F.cross_entropy(net(xb), yb)
                loss.backward()
                opt.step()
                opt.zero_grad()
                scheduler.step()
                losses.append(loss.detach())
            net.eval()
            totals, n_samples = torch.zeros(2, device=device), 0
            with torch.no_grad():
                for xb, yb in valid_dl:
                    if device != CPU:
                        xb, yb = move(xb, yb)
                    out = net(xb)
                    totals += torch.stack([F.cross_entropy(out, yb) * len(yb), (out.argmax(1) == yb).sum()])
                    n_samples += len(yb)
            print(torch.stack(losses).mean().item(), (totals / n_samples).tolist())

    return fit


def ours(n: int, device: torch.device = CPU, *words: str, tensors: bool, **options: Any) -> Callable[[], None]:
    """`words` are methods of the Learner, such as "to_bf16"; `options` are those of `compile()`."""
    from learnkit import DataBunch, Learner, accuracy

    data = (
        DataBunch.from_tensors(images(n), images(n // 5), bs=128, device=device)
        if tensors
        else DataBunch(*loaders(n, pin_memory=device.type != "cpu"))
    )
    learn = Learner(data, cnn(), loss_func=F.cross_entropy, opt_func=sgd, wd=0.0, metrics=accuracy, device=device)
    for word in words:
        getattr(learn, word)(**(options if word == "compile" else {}))

    def fit() -> None:
        with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
            learn.fit_one_cycle(1, LR)

    return fit


WAYS: dict[str, Callable[..., Callable[[], None]]] = {
    "hand": hand,
    "learnkit, same DataLoader": partial(ours, tensors=False),
    "learnkit, from_tensors": partial(ours, tensors=True),
}


def peak_mb(name: str, n: int) -> float:
    """Return the peak memory of a new process that runs one epoch."""
    command = [sys.executable, __file__, "--images", str(n), "--one", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--images", type=int, default=12_800)
    parser.add_argument("--one", choices=WAYS, help="run one epoch and print the peak memory in MB")
    add_device_option(parser)
    args = parser.parse_args()
    if args.one:
        WAYS[args.one](args.images)()
        with open("/proc/self/status") as status:  # ru_maxrss would count the parent's memory too
            print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
        return
    print(
        machine(),
        f"n = {args.rounds} rounds of {args.images:,} training and {args.images // 5:,} validation images",
        sep="\n",
    )
    seconds = interleave(
        {name: way(args.images, args.device) for name, way in WAYS.items()}, args.rounds, clock_of(args.device)
    )
    peaks = {name: [peak_mb(name, args.images) for _ in range(3)] for name in WAYS}
    print(f"{'':28} {'s/epoch':>8}  {'time, ratio':22}  peak MB over hand (n = 3, range)")
    for name in WAYS:
        over = [mb - statistics.median(peaks["hand"]) for mb in peaks[name]]
        print(
            f"{name:28} {statistics.median(seconds[name]):8.3f}  {spread(ratios(seconds, name, 'hand')):22}  "
            f"{statistics.median(over):+.1f} ({min(over):+.1f} to {max(over):+.1f})"
        )


if __name__ == "__main__":
    sys.exit(main())
