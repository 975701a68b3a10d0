"""`learn.to_distributed()` compared with a hand-written DistributedDataParallel loop, on two ranks of one thread each,
or of one device each if there are accelerators.

    python benchmarks/ddp.py [--rounds 11] [--images 12800] [--epochs 2] [--clock wall]
                             [--cases "no extras" default sync_bn]

no extras   only the loop, with one cycle
default     a bar, the recorded losses, accuracy, validation on shards; also with `from_tensors` instead of DataLoaders
sync_bn     the same with a net with batch normalization over both ranks; by hand with
            `learnkit.distributed.sync_batchnorm`. Only on request: most of its time is the normalization

It uses the small net and the images of epoch.py, 64 per rank and batch. Both sides get the same batches: losses,
accuracy and, at the end, all weights must agree to 1e-6 (on devices, whose sums have no fixed order, to 1e-2), or the
script fails. By hand the model is wrapped once for all fits, by learnkit for each fit. Fits of 5 steps show, in
milliseconds, the cost of this and of everything else that is done once per fit.

Prints the ratio of times round by round, from all ranks ready to all ranks done, as median and middle half (`--clock
cpu`: rank 0's CPU time, which varies less on a busy machine, but does not include waiting). It also counts the
collectives of both sides, including DDP's own, and the reads of numbers from the device: for one additional training
step, for the bar in such a step, and for the rest of a fit. Goals: 1.03 × the time, as many collectives per step, no
read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from epoch import LR, Terminal, cnn, images, sgd
from measure import Traffic, finish, interleave, machine, spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, Sampler, TensorDataset

from learnkit import DataBunch, Learner, accuracy
from learnkit.callbacks import Progress, Recorder
from learnkit.data.order import mix
from learnkit.distributed import get_device, get_rank, init_process_group, launch, sync_batchnorm

BATCH, N_RANKS, SEED = 64, 2, 0
GLOBAL_BATCH = BATCH * N_RANKS
N_SHORT = 5  # steps of a short fit
Fit = Callable[
    [], list[float]
]  # continues after the last fit; returns the last train_loss, valid_loss and accuracy, over all ranks
Way = Callable[[int, int, int], tuple[nn.Module, Fit]]  # arguments: (training images, validation images, epochs)


def net(*, norm: bool) -> nn.Module:
    """Return the net of epoch.py; with `norm`, with batch normalization after each of its convolutions."""
    plain = cnn()
    if not norm:
        return plain
    return nn.Sequential(
        *(
            part
            for layer in plain.children()
            for part in ((layer, nn.BatchNorm2d(layer.out_channels)) if isinstance(layer, nn.Conv2d) else (layer,))
        )
    )


class Share(Sampler[int]):
    """A DistributedSampler with learnkit's rule, so that both sides get the same batches: the order of an epoch comes
    from a seed, and each rank gets a contiguous part of each global batch.
    """

    def __init__(self, n: int, *, shuffle: bool) -> None:
        self.n, self.shuffle, self.epoch = n, shuffle, -1

    def __len__(self) -> int:
        return self.n // N_RANKS

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        order = torch.arange(self.n)
        if self.shuffle:
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(mix(SEED, self.epoch)))
        return iter(order.view(-1, N_RANKS, BATCH)[:, get_rank()].flatten().tolist())


def shard(n: int, *, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(n)), batch_size=BATCH, sampler=Share(n, shuffle=shuffle))


def one_cycle(opt: torch.optim.Optimizer, n_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return torch's OneCycleLR, with its peak at the same step as learnkit's."""
    return torch.optim.lr_scheduler.OneCycleLR(
        opt, LR, total_steps=n_steps, pct_start=(int(n_steps * 0.3) + 1) / n_steps
    )


def hand_bare(n: int, n_valid: int, n_epochs: int) -> tuple[nn.Module, Fit]:
    train_dl, model = shard(n, shuffle=True), net(norm=False)
    device = get_device()
    ddp = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=True)

    def fit() -> list[float]:
        scheduler = one_cycle(opt, n_epochs * len(train_dl))
        model.train()
        for _ in range(n_epochs):
            for xb, yb in train_dl:
                xb, yb = xb.to(device, non_blocking=True), yb.to(device, non_blocking=True)
                loss = F.cross_entropy(ddp(xb), yb)
                loss.backward()
                opt.step()
                opt.zero_grad()
                scheduler.step()
        return []

    return model, fit


def hand(n: int, n_valid: int, n_epochs: int, *, sync_bn: bool = False) -> tuple[nn.Module, Fit]:
    from tqdm import tqdm

    train_dl, valid_dl, model = shard(n, shuffle=True), shard(n_valid, shuffle=False), net(norm=sync_bn)
    if sync_bn:
        model = sync_batchnorm(model)
    device = get_device()
    ddp = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=True)

    def fit() -> list[float]:
        scheduler = one_cycle(opt, n_epochs * len(train_dl))
        for epoch in range(n_epochs):
            model.train()
            losses = []
            for xb, yb in tqdm(train_dl, leave=False, disable=get_rank() > 0):
                xb, yb = xb.to(device, non_blocking=True), yb.to(device, non_blocking=True)
                loss = F.cross_entropy(ddp(xb), yb)
                loss.backward()
                opt.step()
                opt.zero_grad()
                scheduler.step()
                losses.append(loss.detach())
            model.eval()
            totals, n_samples = torch.zeros(2, dtype=torch.float64, device=device), 0
            with torch.no_grad():
                for xb, yb in valid_dl:
                    xb, yb = xb.to(device, non_blocking=True), yb.to(device, non_blocking=True)
                    out = model(xb)
                    totals += torch.stack([F.cross_entropy(out, yb) * len(yb), (out.argmax(1) == yb).sum()])
                    n_samples += len(yb)
            counted = torch.tensor([n_samples], dtype=torch.float64, device=device)
            totals = torch.cat([torch.stack(losses).double().mean()[None], totals, counted])
            dist.all_reduce(totals)
            train_loss, valid_loss, right, n_of_all = totals.tolist()
            values = [train_loss / N_RANKS, valid_loss / n_of_all, right / n_of_all]
            if get_rank() == 0:
                print(epoch, *values)
        return values

    return model, fit


def ours(
    n: int, n_valid: int, n_epochs: int, *, bare: bool = False, sync_bn: bool = False, tensors: bool = False
) -> tuple[nn.Module, Fit]:
    train, valid = images(n), images(n_valid)
    data = (
        DataBunch.from_tensors(train, valid, bs=BATCH)
        if tensors
        else DataBunch(
            DataLoader(TensorDataset(*train), batch_size=BATCH, shuffle=True, drop_last=True),
            None if bare else DataLoader(TensorDataset(*valid), batch_size=BATCH),
        )
    )
    learn = Learner(
        data,
        net(norm=sync_bn),
        loss_func=F.cross_entropy,
        opt_func=sgd,
        wd=0.0,
        seed=SEED,
        metrics=() if bare else accuracy,
    )
    if bare:
        learn.remove_callback(Progress).remove_callback(Recorder)
    learn.to_distributed(sync_bn=sync_bn)

    def fit() -> list[float]:
        learn.fit_one_cycle(n_epochs, LR)
        return list(learn.values.values())

    return learn.model, fit


CASES: dict[str, dict[str, Way]] = {
    "no extras": {"hand": hand_bare, "learnkit": partial(ours, bare=True)},
    "default": {"hand": hand, "learnkit": ours, "learnkit, from_tensors": partial(ours, tensors=True)},
    "sync_bn": {"hand": partial(hand, sync_bn=True), "learnkit": partial(ours, sync_bn=True)},
}


@dataclass
class Side:
    """The results of one rank for one way."""

    seconds: list[float]  # of each round's fit
    short: list[float]  # of each round's fit of N_SHORT steps
    results: list[list[float]]  # what each fit returns, see Fit
    weights: Tensor  # after all fits
    per_step: Counter[str]  # collectives and reads from the device for one additional training step
    once: Counter[str]  # the same for the rest of a fit
    tolerance: float  # largest allowed difference between the two ways


def run_case(case: str, args: argparse.Namespace) -> dict[str, Side]:
    """Run every way of a case, interleaved; this runs on each rank."""
    init_process_group()
    torch.set_num_threads(1)

    device = get_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)

    def clock() -> float:
        finish(device)
        dist.barrier()  # all ranks are ready, or done
        return {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]()

    with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
        made = {name: way(args.images, args.images // 5, args.epochs) for name, way in CASES[case].items()}
        results: dict[str, list[list[float]]] = {name: [] for name in made}
        long = {name: partial(keep_result, fit, results[name]) for name, (_, fit) in made.items()}
        seconds = interleave(long, args.rounds, clock)
        short = interleave(
            {name: way(N_SHORT * GLOBAL_BATCH, GLOBAL_BATCH, 1)[1] for name, way in CASES[case].items()},
            args.rounds,
            clock,
        )
        traffic = {name: traffic_of(way) for name, way in CASES[case].items()}
    return {
        name: Side(
            seconds[name],
            short[name],
            results[name],
            parameters_to_vector(model.parameters()).detach().cpu(),
            *traffic[name],
            tolerance=1e-6 if device.type == "cpu" else 1e-2,
        )
        for name, (model, _) in made.items()
    }


def keep_result(fit: Fit, results: list[list[float]]) -> None:
    results.append(fit())


def traffic_of(way: Way, few: int = 5, many: int = 25) -> tuple[Counter[str], Counter[str]]:
    """Return the numbers of collectives and reads of (one additional training step, the rest of a fit of one epoch)."""
    counts = []
    for n_steps in (few, many):
        _, fit = way(n_steps * GLOBAL_BATCH, GLOBAL_BATCH, 1)
        fit()
        with Traffic(Progress.advance, Progress.show_loss_of_all) as traffic:
            fit()
        counts.append(traffic.counts)
    per_step = Counter({name: (counts[1][name] - counts[0][name]) / (many - few) for name in counts[1]})
    return per_step, Counter({name: counts[0][name] - few * per_step[name] for name in per_step})


def collectives(counts: Counter[str], of: str = "") -> float:
    """Return the number of collectives: of the bar (`of="bar: "`), or else of all others."""
    return sum(n for name, n in counts.items() if not name.endswith("read") and name.startswith("bar: ") == bool(of))


def difference(side: Side, hand: Side) -> float:
    """Return the largest difference between the results and weights of the two sides."""
    pairs = [
        (a, b)
        for ours, theirs in zip(side.results, hand.results, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return max([(side.weights - hand.weights).abs().max().item(), *(abs(a - b) for a, b in pairs)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    unit = 5 * GLOBAL_BATCH
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--images", type=int, default=12_800, help=f"for training, a multiple of {unit}; a fifth as many for validation"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["no extras", "default"])
    args = parser.parse_args()
    if args.images < 1 or args.images % unit:
        parser.error(f"--images {args.images}: expected a multiple of {unit}.")
    torch.set_num_threads(1)
    print(
        machine(),
        f"{N_RANKS} ranks, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {args.clock} time, n = {args.rounds} "
        f"rounds of {args.epochs} epoch(s) of {args.images:,} training and {args.images // 5:,} validation images",
        sep="\n",
    )
    print(
        f"{'':32} {'':7} {'':22} {'':20}  {'collectives':23}  reads\n{'':32} {'s/fit':>7} {'time, ratio':22} "
        f"{f'ms more, {N_SHORT} steps':20}  {'a step':>6} {'bar':>6} {'a fit':>6}    {'a step':>6} {'bar':>6} "
        f"{'a fit':>6}  difference"
    )
    for case in args.cases:
        sides = launch(run_case, N_RANKS, case, args)
        for name, side in sides.items():
            print(row(f"{case}: {name}", side, sides["hand"]), flush=True)
        for name, side in sides.items():
            if not difference(side, sides["hand"]) <= side.tolerance:
                sys.exit(f"{case}: {name} and the loop by hand did not train alike.")


def row(label: str, side: Side, hand: Side) -> str:
    ratio = [a / b for a, b in zip(side.seconds, hand.seconds, strict=True)]
    more = [(a - b) * 1e3 for a, b in zip(side.short, hand.short, strict=True)]
    compared = f"{'':22} {'':20}" if side is hand else f"{spread(ratio):22} {spread(more, 1):20}"
    counts = [
        collectives(side.per_step),
        collectives(side.per_step, "bar: "),
        collectives(side.once),
        side.per_step["read"],
        side.per_step["bar: read"],
        side.once["read"],
    ]
    sent, read = (f"{step:6.2f} {bar:6.2f} {fit:6.0f}" for step, bar, fit in (counts[:3], counts[3:]))
    return (
        f"{label:32} {statistics.median(side.seconds):7.3f} {compared}  {sent}    {read}  {difference(side, hand):.0e}"
    )


if __name__ == "__main__":
    sys.exit(main())
