"""A convolutional net with batch norm on 3×32×32 images, batch 64, plain and with `compile()`, `to_channels_last()` and
`to_bf16()`, compared with a hand-written eager loop.

    python benchmarks/compiled.py [--rounds 9] [--steps 20] [--clock cpu] [--device cuda]

Prints the ratios round by round, as median and middle half; compilation takes place before the first round. Goal:
compiled and channels last below 1 × the eager bare loop. The batches are on the device from the start.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from measure import CPU, add_device_option, clock_of, interleave, machine, ratios, spread
from torch import Tensor, nn
from torch.nn import functional as F

from learnkit import DataBunch, Learner
from learnkit.callbacks import Progress, Recorder

BATCH, LR = 64, 0.05
Batches = list[tuple[Tensor, Tensor]]


def block(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *block(3, 32),
        *block(32, 64, 2),
        *block(64, 64),
        *block(64, 128, 2),
        *block(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def batches(n: int, size: int = BATCH) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(n)
    ]


def on_device(data: Batches, device: torch.device) -> Batches:
    return [(x.to(device), y.to(device)) for x, y in data]


def hand(
    data: Batches, device: torch.device = CPU, *, make: Callable[[], nn.Module] = net, half: torch.dtype | None = None
) -> Callable[[], None]:
    """Return one epoch of the hand-written loop. `half`: use autocast, and for float16 a scaled loss."""
    model, data = make().to(device).train(), on_device(data, device)
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=True)
    autocast: Any = nullcontext() if half is None else torch.autocast(device.type, half)  # type: ignore[reportPrivateImportUsage]

    def fit() -> None:
        for x, y in data:
            with autocast:
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()

    scaler = torch.amp.GradScaler(device.type)  # type: ignore[reportPrivateImportUsage]

    def fit_scaled() -> None:
        for x, y in data:
            with autocast:
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()

    return fit_scaled if half == torch.float16 else fit


def ours(
    data: Batches, *words: str, device: torch.device = CPU, make: Callable[[], nn.Module] = net, **options: Any
) -> Callable[[], None]:
    """Return one epoch of a bare Learner; `options` are those of `compile()`."""
    opt_func = partial(torch.optim.SGD, momentum=0.9)
    learn = Learner(
        DataBunch(on_device(data, device)), make(), loss_func=F.cross_entropy, opt_func=opt_func, wd=0.0, device=device
    )
    for word in words:
        getattr(learn, word)(**(options if word == "compile" else {}))
    learn.remove_callback(Progress).remove_callback(Recorder)

    def fit() -> None:
        learn.fit(1, LR)

    return fit


WAYS = {
    "hand": (),
    "learnkit": (),
    "compile": ("compile",),
    "channels last": ("to_channels_last",),
    "compile, channels last": ("to_channels_last", "compile"),
    "compile, channels last, bf16": ("to_channels_last", "compile", "to_bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    add_device_option(parser)
    args = parser.parse_args()
    print(machine(), f"n = {args.rounds} rounds of {args.steps} steps, {args.clock} time, on {args.device}", sep="\n")
    data = batches(args.steps)
    ways = {
        name: hand(data, args.device) if name == "hand" else ours(data, *words, device=args.device)
        for name, words in WAYS.items()
    }
    seconds = interleave(ways, args.rounds, clock_of(args.device) if args.clock == "wall" else time.process_time)
    for name in WAYS:
        print(
            f"{name:30} {min(seconds[name]) / args.steps * 1e3:7.1f} ms a step  {spread(ratios(seconds, name, 'hand'))}"
        )


if __name__ == "__main__":
    sys.exit(main())
