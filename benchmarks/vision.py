"""Pictures from a folder to augmented, normalized batches, compared with DataLoader(ImageFolder + torchvision's
transforms) on the same cores.

    python benchmarks/vision.py [--rounds 3] [--pictures 5000] [--folder cifar10] [--parts rate outside accuracy]

rate        pictures per second, ratios round by round: after the first epoch (goal: 10 ×), and in the first epoch,
            including decoding (1 ×)
outside     share of an epoch of ResNet-9 that is not forward, backward or step (goal: 3 %)
accuracy    of the same small network and recipe, trained with either data path, over seeds

The folder has train/<class>/ and test/<class>/; without a folder, pictures of noise are written. Each path uses one
thread, and as many DataLoader workers as there are cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from measure import machine, spread
from torch import nn
from torch.utils.data import DataLoader

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.vision import ImageDataBunch, cifar_stats, flip_lr, rand_pad, resnet9

BS = 128


def subset(folder: Path | None, place: Path, n_train: int, n_test: int) -> Path:
    """Return a folder with links to the first pictures of each class, `n_train` and `n_test` in total."""
    for part, n in (("train", n_train), ("test", n_test)):
        for k in range(10):
            own = sorted((folder / part).iterdir())[k] if folder else None
            target = place / part / (own.name if own else str(k))
            target.mkdir(parents=True)
            if own is None:
                write_noise(target, n // 10, k)
            else:
                for file in sorted(own.iterdir())[: n // 10]:
                    (target / file.name).symlink_to(file.resolve())
    return place


def write_noise(folder: Path, n: int, seed: int) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    for i in range(n):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:05}.jpg")


def ours(path: Path, cache: Path, seed: int = 0) -> ImageDataBunch:
    tfms = ([*rand_pad(4, 32), flip_lr(p=0.5)], [])
    return ImageDataBunch.from_folder(path, valid="test", ds_tfms=tfms, bs=BS, cache=cache, seed=seed).normalize(
        cifar_stats
    )


def torchvisions(path: Path, seed: int = 0) -> DataBunch:
    import torchvision.transforms.v2 as v2
    from torchvision.datasets import ImageFolder

    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*cifar_stats)]
    train = ImageFolder(
        path / "train", v2.Compose([v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip(), *last])
    )
    workers: dict[str, Any] = dict(num_workers=len(os.sched_getaffinity(0)), persistent_workers=True)
    valid = DataLoader(ImageFolder(path / "test", v2.Compose(last)), BS, **workers)
    return DataBunch(DataLoader(train, BS, shuffle=True, drop_last=True, **workers), valid)


def seconds(batches: Iterable[Any]) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def rate(path: Path, n_rounds: int, n: int) -> None:
    """Compare the rates. First epoch: everything up to its end, including the test pictures. After it: the mean of five
    more epochs, or one more.
    """
    first, after = [], []
    n = n // BS * BS
    for _ in range(n_rounds):
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            own = ours(path, Path(cache))
            seconds(own.train_dl)
            own_first = time.perf_counter() - start
            own_after = statistics.mean(seconds(own.train_dl) for _ in range(5))
            start = time.perf_counter()
            other = torchvisions(path)
            seconds(other.train_dl)
            other_first = time.perf_counter() - start
            other_after = seconds(other.train_dl)
        first.append(other_first / own_first)
        after.append(other_after / own_after)
        print(
            f"  pictures/s  first epoch: {n / own_first:8,.0f} and {n / other_first:8,.0f}   "
            f"after: {n / own_after:8,.0f} and {n / other_after:8,.0f}   (learnkit and DataLoader)",
            flush=True,
        )
    print(
        f"rate in the first epoch {spread(first)} ×, after it {spread(after)} × the DataLoader's, n = {n_rounds} rounds"
    )


class Inside(Callback):
    """Measure the seconds within forward, backward and step, and of the whole epoch."""

    order = 10_000

    def __init__(self) -> None:
        self.seconds = self.of_epoch = 0.0

    def around_epoch(self, learn: Learner, run: Callable[[], None]) -> None:
        start = time.perf_counter()
        run()
        self.of_epoch += time.perf_counter() - start

    def timed(self, run: Callable[[], None]) -> None:
        start = time.perf_counter()
        try:
            run()
        finally:
            self.seconds += time.perf_counter() - start

    def around_forward(self, learn: Learner, run: Callable[[], None]) -> None:
        self.timed(run)

    def around_backward(self, learn: Learner, run: Callable[[], None]) -> None:
        self.timed(run)

    def around_step(self, learn: Learner, run: Callable[[], None]) -> None:
        self.timed(run)


def outside(path: Path, cache: Path, n_rounds: int) -> None:
    shares = []
    for k in range(n_rounds):
        learn = Learner(ours(path, cache, seed=k), resnet9(), callbacks=(inside := Inside()))
        learn.data.valid_dl = None
        with learn.no_logging():
            learn.fit(1, 1e-3, max_steps=8)
        shares.append(100 * (1 - inside.seconds / inside.of_epoch))
        print(f"  {shares[-1]:.2f} % of {inside.of_epoch:.1f} s", flush=True)
    print(
        f"outside of forward, backward and step: {spread(shares, 2)} % of an epoch of at most 8 steps of ResNet-9, "
        f"batch {BS}, n = {n_rounds} rounds"
    )


def small_net() -> nn.Module:
    return resnet9(width=8)


def train(data: DataBunch, seed: int, n_epochs: int) -> float:
    torch.manual_seed(seed)
    learn = Learner(data, small_net(), metrics=accuracy)
    with learn.no_logging():
        learn.fit_one_cycle(n_epochs, 1e-2)
    return learn.validate()["accuracy"]


def compare_accuracy(path: Path, cache: Path, n_seeds: int, n_epochs: int) -> None:
    own, other = [], []
    for seed in range(n_seeds):
        own.append(train(ours(path, cache, seed), seed, n_epochs))
        torch.manual_seed(seed)
        other.append(train(torchvisions(path), seed, n_epochs))
        print(f"  seed {seed}: {own[-1]:.4f} and {other[-1]:.4f}   (learnkit and DataLoader)", flush=True)
    apart = statistics.mean(own) - statistics.mean(other)
    error = (statistics.variance(own) / n_seeds + statistics.variance(other) / n_seeds) ** 0.5
    print(
        f"accuracy after {n_epochs} epochs: {statistics.mean(own):.4f} ± {statistics.stdev(own):.4f} and "
        f"{statistics.mean(other):.4f} ± {statistics.stdev(other):.4f} (means and standard deviations), apart "
        f"{apart:+.4f} ± {error:.4f}, n = {n_seeds} seeds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="train/<class>/…, test/<class>/… of CIFAR-10; default: noise")
    parser.add_argument(
        "--parts", nargs="+", default=["rate", "outside", "accuracy"], choices=["rate", "outside", "accuracy"]
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, about forks in a process with threads
    place = Path(tempfile.mkdtemp())
    try:
        path = subset(args.folder, place / "pictures", args.pictures, 1000)
        print(
            machine(),
            f"{args.pictures:,} training pictures, {args.folder or 'noise'}, load average {os.getloadavg()[0]:.1f}",
            sep="\n",
        )
        n_threads = torch.get_num_threads()
        if "outside" in args.parts:
            outside(path, place / "cache", args.rounds)
        torch.set_num_threads(1)
        if "rate" in args.parts:
            rate(path, args.rounds, args.pictures)
        if "accuracy" in args.parts:
            compare_accuracy(path, place / "cache", args.rounds, args.epochs)
        torch.set_num_threads(n_threads)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
