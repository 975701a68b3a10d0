"""The cost of the Learner compared with a hand-written loop, for a model that costs nothing: a 16-16-2 perceptron with
batches of 8.

    python benchmarks/step_cost.py [--rounds 31] [--steps 1000]

no extras   only the loop: no bar, recorder, metric, or validation; at a constant rate, and with one cycle, for which
            the hand-written loop steps torch's OneCycleLR
default     a bar, the recorded losses, accuracy, validation, one cycle; the hand-written loop does the same with tqdm

Prints the Python calls per step, and the ratio of CPU times round by round, as median and middle half.
tests/test_step_cost.py tests the calls; this script measures the seconds. Goals: calls 1.5 × and 2 ×, CPU time 1.08 ×.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

import torch
from measure import interleave, machine, python_calls, ratios, spread
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from learnkit import DataBunch, Learner, accuracy
from learnkit.callbacks import Progress, Recorder

LR, MOMENTUM = 0.05, 0.9


class Batches:
    """Prepared batches behind a DataLoader, so that loading costs both sides the same small time."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(n, 8, 16, generator=generator)
        self.rows = list(zip(x, (x[..., :4].sum(-1) > 0).long(), strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def loader(n: int) -> DataLoader[Any]:
    return DataLoader(Batches(n), batch_size=None)  # type: ignore[arg-type]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


sgd = partial(torch.optim.SGD, momentum=MOMENTUM)


class Terminal(io.StringIO):
    """An invisible terminal, so that both sides draw their bars."""

    def isatty(self) -> bool:
        return True


def hand_bare(n: int, *, one_cycle: bool) -> Callable[[], None]:
    net, train_dl = model(), loader(n)

    def fit() -> None:
        opt = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=n) if one_cycle else None
        net.train()
        for xb, yb in train_dl:
            loss = F.cross_entropy(net(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            if scheduler:
                scheduler.step()

    return fit


def ours_bare(n: int, *, one_cycle: bool) -> Callable[[], object]:
    learn = Learner((loader(n), None), model(), loss_func=F.cross_entropy, opt_func=sgd, wd=0.0)
    learn.remove_callback(Progress).remove_callback(Recorder)
    return lambda: learn.fit_one_cycle(1, LR) if one_cycle else learn.fit(1, LR)


def hand_default(n: int) -> Callable[[], None]:
    from tqdm import tqdm

    net, train_dl, valid_dl = model(), loader(n), loader(n // 10)

    def fit() -> None:
        opt = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=n)
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
                    totals += torch.stack(
                        [F.cross_entropy(out, yb) * len(yb), (out.argmax(1) == yb).sum(), torch.tensor(float(len(yb)))]
                    )
            print(torch.stack(losses).mean().item(), (totals[:2] / totals[2]).tolist())

    return fit


def ours_default(n: int) -> Callable[[], None]:
    learn = Learner(
        DataBunch(loader(n), loader(n // 10)),
        model(),
        loss_func=F.cross_entropy,
        opt_func=sgd,
        wd=0.0,
        metrics=accuracy,
    )

    def fit() -> None:
        with redirect_stdout(Terminal()), redirect_stderr(Terminal()):
            learn.fit_one_cycle(1, LR)

    return fit


CASES: dict[str, tuple[Callable[[int], Callable[[], object]], Callable[[int], Callable[[], object]]]] = {
    "no extras, constant rate": (lambda n: hand_bare(n, one_cycle=False), lambda n: ours_bare(n, one_cycle=False)),
    "no extras, one cycle": (lambda n: hand_bare(n, one_cycle=True), lambda n: ours_bare(n, one_cycle=True)),
    "default": (hand_default, ours_default),
}


def calls_per_step(make: Callable[[int], Callable[[], object]], few: int = 100, many: int = 300) -> float:
    """Return the Python calls of one additional step, without those that a fit makes once."""
    counts = []
    for n in (few, many):
        fit = make(n)
        fit()
        counts.append(python_calls(fit))
    return (counts[1] - counts[0]) / (many - few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), f"n = {args.rounds} rounds of {args.steps} steps", sep="\n")
    print(f"{'':26} {'calls/step':>16}  {'calls':>6}  {'CPU µs/step':>18}  CPU time, ratio")
    for name, (hand, ours) in CASES.items():
        calls = calls_per_step(hand), calls_per_step(ours)
        seconds = interleave({"hand": hand(args.steps), "ours": ours(args.steps)}, args.rounds)
        micros = [sorted(seconds[side])[args.rounds // 2] / args.steps * 1e6 for side in ("hand", "ours")]
        print(
            f"{name:26} {calls[0]:7.1f} {calls[1]:8.1f}  {calls[1] / calls[0]:5.2f}×  {micros[0]:8.1f} "
            f"{micros[1]:9.1f}  {spread(ratios(seconds, 'ours', 'hand'))}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
