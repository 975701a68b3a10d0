# pyright: reportPrivateImportUsage=false
"""The cost of checkpoints: writing one, compared with torch.save of the same state; training while one is written;
resuming from one.

    python benchmarks/checkpoint.py [--rounds 11] [--megabytes 10 100] [--dir FOLDER]

Goals: a checkpoint (hashed, on the disk, in place by a rename) takes at most 1.3 × torch.save of the same state that is
also flushed to the disk; with async_write training waits at most 5 % of that; resuming at step 10,000 of an epoch takes
as long as at step 1; the part of a step that lets another rank stop it costs at most 1 % of a step of the small CNN.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from epoch import cnn
from measure import clock_of, interleave, machine, ratios, spread
from torch import nn

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot
from learnkit.distributed.stop import StopTogether


def state_of(megabytes: int) -> dict[str, Any]:
    """Return a state of so many megabytes: float32 layers of 4 MB, and two moments for each, as AdamW has them."""
    layers = {f"layers.{i}.weight": torch.randn(1024, 1024) for i in range(max(1, megabytes // 12))}
    moments = {
        i: {"step": torch.tensor(10.0), "exp_avg": torch.randn(1024, 1024), "exp_avg_sq": torch.rand(1024, 1024)}
        for i in range(len(layers))
    }
    return {
        "model": layers,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(range(len(layers)))}]},
    }


def plain(state: dict[str, Any], path: Path, *, durable: bool, remove: bool = True) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    if remove:
        path.unlink()


def writing(folder: Path, megabytes: int, rounds: int) -> None:
    """Compare the ways to write. Each writes new files and removes them, as a fit removes its oldest checkpoint: the
    time includes both.
    """
    state, serial = state_of(megabytes), iter(range(10**6))

    def ours() -> None:
        shutil.rmtree(snapshot.write_snapshot(folder / "ours", f"{next(serial):06d}-step-1", state, {"run": "x"}))

    bases = {
        "torch.save, flushed": lambda: plain(state, folder / "a.pt", durable=True),
        "torch.save": lambda: plain(state, folder / "a.pt", durable=False),
        # Frees the memory of the last file right before it needs it again, which is faster on a machine that returns
        # free memory to its host.
        "torch.save, flushed, over the last": lambda: plain(state, folder / "b.pt", durable=True, remove=False),
    }
    seconds = interleave({"ours": ours, **bases}, rounds, time.perf_counter)
    for base in bases:
        print(f"writing / {base:34} {spread(ratios(seconds, 'ours', base))}")
    print("  " + ", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in seconds.items()))


def beside(folder: Path, rounds: int) -> None:
    """Measure how long the training thread waits for a save: in the hooks that save and that wait for the copy."""
    width, x, y = 1400, torch.randn(64, 1400), torch.randn(64, 1400)
    waited: dict[str, list[float]] = {"at once": [], "async_write": []}

    class Timed(Checkpoint):
        def after_batch(self, learn: Learner) -> None:
            self.timed(super().after_batch, learn)

        def before_step(self, learn: Learner) -> None:
            self.timed(super().before_step, learn)

        def timed(self, hook: Any, learn: Learner) -> None:
            start = time.perf_counter()
            hook(learn)
            waited["async_write" if self.async_write else "at once"][-1] += time.perf_counter() - start

    for _ in range(rounds):
        for name, values in waited.items():
            values.append(0.0)
            model = nn.Sequential(*(nn.Linear(width, width) for _ in range(6)))  # 141 MB with AdamW's moments
            keeper = Timed(
                folder / name, every_n_steps=8, every_n_epochs=None, async_write=name == "async_write", keep=1
            )
            learn = Learner(
                ([(x, y)] * 42, None), model, callbacks=[keeper]
            )  # five saves; the last one of the fit is not measured
            with learn.no_logging():
                learn.fit(1)
    print(f"waiting with async_write / without  {spread(ratios(waited, 'async_write', 'at once'))}")
    print("  " + ", ".join(f"{name} {statistics.median(values):.4f} s" for name, values in waited.items()))


class Span(Callback):
    """Measure the seconds of a training pass in which each step lasts `pace` seconds longer than the device's work."""

    order = 10_000

    def __init__(self, device: torch.device, pace: float) -> None:
        self.clock, self.pace, self.seconds = clock_of(device), pace, 0.0

    def around_train(self, learn: Learner, run: Callable[[], None]) -> None:
        start = self.clock()
        run()
        self.seconds = self.clock() - start

    def before_batch(self, learn: Learner) -> None:
        time.sleep(self.pace)


class SaveByHand(Callback):
    """Save as a hand-written loop does: torch.save of both states, flushed to the disk."""

    order = Checkpoint.order

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / "by hand.pt", every

    def after_batch(self, learn: Learner) -> None:
        if learn.step % self.every:
            return
        plain({"model": learn.model.state_dict(), "optimizer": learn.opt.state_dict()}, self.path, durable=True)


def stalls(
    folder: Path, megabytes: int, rounds: int, device: torch.device, *, every: int = 8, n_saves: int = 2
) -> dict[str, list[float]]:
    """Return the seconds that a training pass on a device waits for one save of so many megabytes: a pass with saves
    minus a pass without. The steps between two saves last twice as long as a save by hand, so that a save in the
    background has finished when the next one begins.
    """
    layers, x = max(1, megabytes // 12), torch.randn(8, 1024, device=device)  # 4 MB each, and two moments for each
    data = [(x, x)] * (every * n_saves + every // 2)  # long enough to include the wait for the last copy

    def train(pace: float, *keepers: Callback) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(layers)))
        span = Span(device, pace)
        learn = Learner(
            (data, None), model, loss_func=nn.functional.mse_loss, callbacks=[span, *keepers], device=device
        )
        with learn.no_logging():
            learn.fit(1, 1e-6)
        return span.seconds

    train(0.0)
    pace = 2 * (train(0.0, SaveByHand(folder, every)) - train(0.0)) / n_saves / every
    keep: Any = partial(Checkpoint, every_n_steps=every, every_n_epochs=None, keep=1)
    keepers = {
        "torch.save by hand": lambda own: SaveByHand(folder, every),
        "Checkpoint": keep,
        "Checkpoint(async_write=True)": partial(keep, async_write=True),
    }
    found: dict[str, list[float]] = {name: [] for name in keepers}
    for i in range(rounds):
        base = train(pace)
        for name, make in keepers.items():
            own = folder / f"{megabytes} {i} {name}"
            found[name].append((train(pace, make(own)) - base) / n_saves)
            shutil.rmtree(own, ignore_errors=True)
    return found


class Leave(Callback):
    """Leave a fit after the batch of a step, or before the first batch, as if the process had been killed."""

    order = Checkpoint.order - 10

    def __init__(self, step: int | None = None) -> None:
        self.step, self.at = step, 0.0

    def before_forward(self, learn: Learner) -> None:
        self.at = time.perf_counter()
        if self.step is None:
            raise ConnectionAbortedError

    def after_batch(self, learn: Learner) -> None:
        if learn.step == self.step:
            raise ConnectionAbortedError


def going_on(folder: Path, rounds: int) -> None:
    x, y = torch.randn(20_200, 4), torch.randn(20_200, 1)

    def fit(name: str, leave: Leave, **options: Any) -> None:
        data = DataBunch.create(torch.utils.data.TensorDataset(x, y), bs=2)
        keeper = Checkpoint(folder / name, every_n_steps=options.pop("every", None))
        learn = Learner(data, nn.Linear(4, 1), callbacks=[keeper, leave], seed=1)
        with learn.no_logging(), suppress(ConnectionAbortedError):
            learn.fit(1, **options)

    places = {"step 1": 1, "step 10,000": 10_000}
    for name, step in places.items():
        fit(name, Leave(step), every=step)

    def resume(name: str) -> None:
        fit(name, Leave(), resume=True)

    seconds = interleave({name: partial(resume, name) for name in places}, rounds, time.perf_counter)
    print(f"going on at step 10,000 / at step 1 {spread(ratios(seconds, 'step 10,000', 'step 1'))}")
    print("  " + ", ".join(f"{name} {statistics.median(values):.4f} s" for name, values in seconds.items()))


def flag(rounds: int) -> None:
    """Measure the cost per step that lets a rank stop all ranks, StopTogether.passed, relative to a step of the small
    CNN of epoch.py.
    """
    stops, model, x, y = (
        StopTogether(dist.HashStore(), 0, 2),
        cnn(),
        torch.randn(128, 1, 28, 28),
        torch.randint(10, (128,)),
    )
    opt = torch.optim.SGD(model.parameters(), 0.01)

    def steps() -> None:
        for _ in range(20):
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()

    def flags() -> None:
        for _ in range(20):
            stops.passed(None)

    seconds = interleave({"flags": flags, "steps": steps}, rounds)
    print(f"the flag of a step / a step         {spread(ratios(seconds, 'flags', 'steps'))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100])
    parser.add_argument(
        "--dir", default=None, help="folder on the disk to test; the default is the one for temporary files"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), f"n = {args.rounds} rounds", sep="\n")
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for megabytes in args.megabytes:
            print(f"{megabytes} MB:")
            writing(Path(folder), megabytes, args.rounds)
        beside(Path(folder), args.rounds)
        going_on(Path(folder), args.rounds)
    flag(args.rounds)


if __name__ == "__main__":
    main()
