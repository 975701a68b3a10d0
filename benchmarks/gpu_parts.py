# pyright: reportPrivateImportUsage=false
"""The parts of gpu.py: each is a function of a `Run`, runs in its own process, and writes each figure as soon as it has
it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any

import checkpoint
import compiled
import epoch
import step_cost
import torch
from measure import ROOT, clock_of, device_named, finish, interleave, ratios, stand_in
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, TensorLoader, accuracy
from learnkit.devices.transfer import Moved

HALVES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MB = 2**20


class Run:
    """The arguments of a part and its output: a line of JSON for each figure, so that the figures of a killed part are
    kept.

    Args:
        limit: seconds after which the part is killed.
        cifar: a folder of CIFAR-10's pictures. None: CIFAR-10 if it is on this machine, or else generated pictures.
    """

    def __init__(self, name: str, lines: Path, *, quick: bool, limit: float, cifar: Path | None) -> None:
        self.name, self.lines, self.quick, self.cifar = name, lines, quick, cifar
        self.ends = time.monotonic() + limit

    @cached_property
    def device(self) -> torch.device:
        return device_named(self.name)

    def left(self) -> float:
        return self.ends - time.monotonic()

    def write(self, **line: Any) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def figure(self, name: str, values: Iterable[float], unit: str = "", digits: int = 2, note: str = "") -> None:
        """Write one figure: its values in all rounds; the report shows the median and the middle half."""
        self.write(figure=name, values=list(values), unit=unit, digits=digits, note=note)

    def skip(self, name: str, why: str) -> None:
        self.write(figure=name, skipped=why)

    def fail(self, name: str, why: str) -> None:
        """Write a failure; the rest of the part still runs."""
        self.write(figure=name, failed=why)


# --- the machine -------------------------------------------------------------
def machine(run: Run) -> None:
    """Write the device and versions for the report; this is not a part."""
    device, cuda = run.device, run.device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type}, no GPU"
    run.write(
        device=name,
        n_devices=torch.accelerator.device_count(),
        torch=torch.__version__,
        cuda=torch.version.cuda if cuda else None,
        cudnn=torch.backends.cudnn.version() if cuda else None,
        memory=torch.accelerator.get_memory_info(device)[1],
    )


# --- tests/test_cuda.py ------------------------------------------------------
class Outcomes:
    """A pytest plugin that selects the tests that need two devices, or the others, and writes each failure at once."""

    def __init__(self, run: Run, *, two: bool) -> None:
        self.run, self.two, self.passed, self.skipped = run, two, 0, Counter[str]()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if needs_two(item) == self.two]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.run.fail(report.nodeid.partition("::")[2], str(report.longrepr)[-2000:])
        elif report.skipped:
            self.skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.passed += 1


def needs_two(item: Any) -> bool:
    return any(mark.kwargs.get("reason") == "needs two CUDA devices" for mark in item.iter_markers("skipif"))


def cuda_tests(run: Run, *, two: bool = False) -> None:
    import pytest

    found, file = Outcomes(run, two=two), ROOT / "tests" / "test_cuda.py"
    # A test that hangs ends the part, after its stack was printed.
    code = pytest.main(
        [str(file), f"--rootdir={ROOT}", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=90"],
        plugins=[found],
    )
    if code not in (0, 1):
        run.fail("pytest", f"ended with exit code {code}")
    run.figure("tests that passed", [found.passed], digits=0)
    for why, n in found.skipped.items():
        run.skip(f"{n} tests", why)


# --- where the host waits ----------------------------------------------------
def place_of(frame: FrameType | None) -> str:
    """Return the innermost line in learnkit, or else the innermost line."""
    first = frame
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(path.is_relative_to(ROOT / folder) for folder in ("learnkit", "callbacks")):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return f"{Path(first.f_code.co_filename).name}:{first.f_lineno}" if first is not None else "?"


@contextmanager
def waits_of(device: torch.device) -> Iterator[Counter[str]]:
    """Count, by place in the source, how often the host waits for the device."""
    places: Counter[str] = Counter()
    if device.type != "cuda":
        with stand_in().waits() as found:
            yield places
        places.update(wait.place for wait in found)
        return
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def note(message: Any, *where: Any, **options: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                places[place_of(sys._getframe(1))] += 1
            else:
                shown(message, *where, **options)

        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits(run: Run) -> None:
    """Measure, by differences between fits of different lengths, what an additional training step, validation batch and
    epoch add.
    """
    few, many = (2, 6) if run.quick else (20, 60)
    for half in HALVES:
        for loader in ("DataLoader", "from_tensors"):

            def count(
                n_train: int, n_valid: int, n_epochs: int, half: str = half, loader: str = loader
            ) -> Counter[str]:
                fit = fit_of(run.device, half, loader, n_train, n_valid)
                fit(1)
                with waits_of(run.device) as places:
                    fit(n_epochs)
                return Counter(places)

            base, added = (
                count(few, few, 1),
                {"training step": count(many, few, 1), "validation batch": count(few, many, 1)},
            )
            more = count(few, few, 3)
            for name, counts in added.items():
                report_waits(run, f"{half}, {loader}: a {name}", base, counts, many - few)
            report_waits(run, f"{half}, {loader}: an epoch", base, more, 2)


def report_waits(run: Run, name: str, base: Counter[str], more: Counter[str], n: int) -> None:
    places = [f"{(more[place] - base[place]) / n:.2f} at {place}" for place in more if more[place] > base[place]]
    run.figure(name, [(more.total() - base.total()) / n], "waits", note="\n".join(["", *places]))


def fit_of(device: torch.device, half: str, loader: str, n_train: int, n_valid: int) -> Callable[[int], None]:
    """Return a fit of n epochs, with bar, recorder, schedule, metric and validation, of the small net of compiled.py
    with batches of 8.
    """
    x, y = torch.randn(8 * max(n_train, n_valid), 3, 8, 8), torch.randint(10, (8 * max(n_train, n_valid),))
    train, valid = (x[: 8 * n_train], y[: 8 * n_train]), (x[: 8 * n_valid], y[: 8 * n_valid])
    data = (
        DataBunch.from_tensors(train, valid, bs=8, device=device)
        if loader == "from_tensors"
        else DataBunch.create(TensorDataset(*train), TensorDataset(*valid), bs=8)
    )
    learn = Learner(data, compiled.net(), metrics=accuracy, device=device)
    if half != "fp32":
        getattr(learn, f"to_{half}")()

    def fit(n_epochs: int) -> None:
        with redirect_stdout(epoch.Terminal()), redirect_stderr(epoch.Terminal()):
            learn.fit_one_cycle(n_epochs, 1e-2)

    return fit


# --- a step ------------------------------------------------------------------
def step(run: Run) -> None:
    """Compare a bare step of learnkit with a hand-written one, for a host-bound model and for a device-bound one."""
    from learnkit.vision.models.resnet import resnet18_cifar

    rounds, n_small, n_large, size = (2, 4, 2, 2) if run.quick else (9, 300, 20, 128)
    cases: dict[str, tuple[Callable[[], nn.Module], compiled.Batches]] = {
        "perceptron, batch 8": (step_cost.model, step_cost.Batches(n_small).rows),
        "small net, batch 2" if run.quick else f"ResNet-18, batch {size}": (
            compiled.net if run.quick else resnet18_cifar,
            compiled.batches(n_large, size),
        ),
    }
    for case, (make, data) in cases.items():
        for half, dtype in HALVES.items():
            words = () if dtype is None else (f"to_{half}",)
            ways = {
                "hand": compiled.hand(data, run.device, make=make, half=dtype),
                "learnkit": compiled.ours(data, *words, device=run.device, make=make),
            }
            seconds = interleave(ways, rounds, clock_of(run.device))
            for name, values in seconds.items():
                run.figure(f"{case}, {half}: {name}", [1e6 * s / len(data) for s in values], "µs a step", 1)
            run.figure(f"{case}, {half}: learnkit / hand", ratios(seconds, "learnkit", "hand"), "×", 3)
            for name, fit in ways.items():
                run.figure(
                    f"{case}, {half}: {name}, part of the time until the host has started all work",
                    [issue_share(fit, run.device) for _ in range(rounds)],
                )


def issue_share(fit: Callable[[], None], device: torch.device) -> float:
    """Return the time until the host has started all work, divided by the time until the device has done it: near 1 if
    the host is the bottleneck.
    """
    finish(device)
    start = time.perf_counter()
    fit()
    started = time.perf_counter() - start
    finish(device)
    return started / (time.perf_counter() - start)


# --- an epoch ----------------------------------------------------------------
def whole_epoch(run: Run) -> None:
    rounds, n = (2, 256) if run.quick else (9, 25_600)
    seconds = interleave({name: way(n, run.device) for name, way in epoch.WAYS.items()}, rounds, clock_of(run.device))
    for name, values in seconds.items():
        run.figure(f"{n:,} pictures: {name}", values, "s", 3)
    for name in list(epoch.WAYS)[1:]:
        run.figure(f"{name} / hand", ratios(seconds, name, "hand"), "×", 3)


def compile_model(run: Run) -> None:
    """Compare eager, compiled, and compiled with CUDA graphs: a step, an epoch, and the time of compilation."""
    rounds, n, n_steps = (2, 256, 3) if run.quick else (7, 25_600, 40)
    clock = clock_of(run.device)
    data, modes = compiled.batches(n_steps), {"compile": {}, "compile, reduce-overhead": {"mode": "reduce-overhead"}}
    steps: dict[str, Callable[[], None]] = {"hand": compiled.hand(data, run.device)}
    epochs: dict[str, Callable[[], None]] = {"eager": epoch.ours(n, run.device, tensors=True)}
    for name, options in modes.items():
        steps[name] = compiled.ours(data, "compile", device=run.device, **options)
        steps[f"{name}, channels last, bf16"] = compiled.ours(
            data, "to_channels_last", "to_bf16", "compile", device=run.device, **options
        )
        epochs[name] = epoch.ours(n, run.device, "compile", tensors=True, **options)
    for unit, kind, ways in (("ms a step", 1e3 / n_steps, steps), ("s an epoch", 1.0, epochs)):
        for name, fit in ways.items():
            start = clock()
            fit()
            run.figure(f"{name}, the first {unit.rpartition(' ')[2]}s, compiling included", [clock() - start], "s")
        seconds, base = interleave(ways, rounds, clock), next(iter(ways))
        for name, values in seconds.items():
            run.figure(name, [kind * s for s in values], unit, 3)
            if name != base:
                run.figure(f"{name} / {base}", ratios(seconds, name, base), "×", 3)


# --- from the host to the device ---------------------------------------------
class Busy(Callback):
    """Record two events per batch, around the device's work on it; between two batches the device waits."""

    order = -10_000

    def __init__(self, device: torch.device) -> None:
        self.device, self.events = device, list[torch.Event]()

    def mark(self) -> None:
        self.events.append(event := torch.Event(self.device, enable_timing=True))
        event.record()

    def before_batch(self, learn: Learner) -> None:
        self.mark()

    def after_batch(self, learn: Learner) -> None:
        self.mark()

    def idle(self) -> float:
        """Return the share of the time in which the device waited, without the first batches."""
        finish(self.device)
        events = self.events[len(self.events) // 8 * 2 :]
        busy = sum(a.elapsed_time(b) for a, b in zip(events[::2], events[1::2], strict=True))
        return 1 - busy / events[0].elapsed_time(events[-1])


def data_path(run: Run) -> None:
    """Measure the transfer of float pictures to the device: pictures per second without a model, and how long the
    device waits with one.
    """
    rounds, n, size, bs = (2, 64, 8, 8) if run.quick else (5, 32_768, 32, 256)
    device, clock = run.device, clock_of(run.device)
    x, y = torch.randn(n, 3, size, size), torch.randint(10, (n,))
    dataset: Any = TensorDataset(x, y)

    def loader(workers: int, *, pin: bool = True) -> Any:
        return DataLoader(
            dataset,
            bs,
            shuffle=True,
            drop_last=True,
            pin_memory=pin,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    workers = 1 if run.quick else 4  # their batches fit into the 64 MB of shared memory that containers have
    ways: dict[str, Any] = {
        "DataLoader, pageable memory": loader(0, pin=False),
        "DataLoader, pinned": loader(0),
        f"DataLoader, pinned, {workers} workers": loader(workers),
        "TensorLoader on the host, cut ahead": TensorLoader((x, y), bs=bs, shuffle=True, drop_last=True, n_ahead=3).to(
            device
        ),
        "from_tensors, on the device": DataBunch.from_tensors((x, y), bs=bs, device=device).train_dl,
    }

    def walk(loader: Any) -> None:
        for _ in Moved(loader, device):
            pass

    seconds = interleave({name: partial(walk, way) for name, way in ways.items()}, rounds, clock)
    for name, values in seconds.items():
        run.figure(name, [n // bs * bs / s for s in values], "pictures/s", 0)
    for name, way in ways.items():
        learn = (
            Learner(DataBunch(way), compiled.net(), device=device, callbacks=(busy := Busy(device)))
            .to_channels_last()
            .to_bf16()
        )
        shares = []
        for _ in range(rounds):
            busy.events.clear()
            with learn.no_logging():
                learn.fit(1, 1e-3)
            shares.append(100 * busy.idle())
        run.figure(f"{name}: part of the time in which the device waits for a batch", shares, "%", 1)


# --- a checkpoint ------------------------------------------------------------
def checkpoints(run: Run) -> None:
    for megabytes, rounds in ((12, 1),) if run.quick else ((100, 5), (1000, 2)):
        name = f"{megabytes} MB"
        if torch.accelerator.get_memory_info(run.device)[0] < 4 * megabytes * MB:
            run.skip(name, f"needs {4 * megabytes} MB of free memory on the device")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = checkpoint.stalls(Path(folder), megabytes, rounds, run.device)
        for way, values in found.items():
            run.figure(f"{name}: training waits for a save, {way}", [1e3 * s for s in values], "ms", 1)


# --- memory ------------------------------------------------------------------
def memory(run: Run) -> None:
    """Measure the peak memory allocated in an epoch, including the optimizer, minus the memory before the model was
    built.
    """
    from learnkit.vision.models.resnet import resnet18_cifar

    data, make = (compiled.batches(2, 2), compiled.net) if run.quick else (compiled.batches(5, 128), resnet18_cifar)
    ways: dict[str, Callable[[], Callable[[], None]]] = {
        f"{half}: {side}": partial(way, half)
        for half in HALVES
        for side, way in (
            ("hand", lambda half: compiled.hand(data, run.device, make=make, half=HALVES[half])),
            (
                "learnkit",
                lambda half: compiled.ours(
                    data, *([] if half == "fp32" else [f"to_{half}"]), device=run.device, make=make
                ),
            ),
        )
    }
    for name, way in ways.items():
        run.figure(name, [peak(way, run.device) for _ in range(2)], "MB", 1)


def peak(way: Callable[[], Callable[[], None]], device: torch.device) -> float:
    gc.collect()
    torch.accelerator.empty_cache()
    finish(device)
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    fit = way()
    fit()
    finish(device)
    return (torch.accelerator.max_memory_allocated(device) - before) / MB


# --- CIFAR-10 ----------------------------------------------------------------
def speedrun(run: Run) -> None:
    """Run the recipe of examples/06_speedrun.py, in bfloat16 and channels last."""
    from learnkit.callbacks import LabelSmoothing
    from learnkit.vision import ImageDataBunch, cifar_stats, cutout, flip_lr, rand_pad, resnet9, tta

    n_epochs, width, bs = (1, 4, 10) if run.quick else (10, 64, 512)
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    with tempfile.TemporaryDirectory() as place:
        path, what = cifar(run, Path(place))
        start = time.perf_counter()
        ds_tfms = ([*rand_pad(2, 32), flip_lr(alternating=True), cutout(8)], [])
        data = ImageDataBunch.from_folder(
            path, valid="test", ds_tfms=ds_tfms, bs=bs, cache=Path(place) / "cache", device=run.device
        )
        data.normalize(cifar_stats)
        run.figure(f"{what}: decoding", [time.perf_counter() - start], "s")

        def learner() -> tuple[Learner, list[float]]:
            learn = (
                Learner(
                    data,
                    resnet9(width=width),
                    opt_func=sgd,
                    wd=5e-4,
                    bn_wd=False,
                    metrics=accuracy,
                    device=run.device,
                    callbacks=LabelSmoothing(0.2),
                )
                .to_channels_last(cudnn_benchmark=True)
                .to_bf16()
            )
            return learn, times_of(learn)

        def fit(learn: Learner, n_epochs: int) -> None:
            with learn.no_logging():
                learn.fit_one_cycle(n_epochs, 0.4, moms=None, div_factor=5, pct_start=0.25)

        learn, times = learner()
        start = time.perf_counter()
        fit(learn, n_epochs)
        run.figure(f"{what}: {n_epochs} epochs, ResNet-9, batch {bs}", [time.perf_counter() - start], "s")
        run.figure(f"{what}: a training pass, after the first", times[1:] or times, "s", 3)
        run.figure(f"{what}: accuracy", [learn.values["accuracy"]], digits=4)
        preds, targets = tta(learn, tfms=[flip_lr(p=1)], n=1)
        run.figure(f"{what}: accuracy with mirror images", [float(accuracy(preds, targets))], digits=4)
        name = f"{what}: a compiled training pass, after the first"
        if run.device.type != "cuda":
            return run.skip(name, f"needs CUDA: skipped on {run.name}")
        if run.left() < 45:
            return run.skip(name, f"{run.left():.0f} s were left")
        learn, times = learner()
        fit(learn.compile(), 4)
        run.figure(name, times[1:], "s", 3)
        run.figure(f"{what}: the first training pass, compiling included", times[:1], "s", 3)


def times_of(learn: Learner) -> list[float]:
    """Return a list that gets the seconds of each training pass of the following fits."""
    seconds, clock = list[float](), clock_of(learn.device)

    @learn.on("around_train", order=10_000)
    def measure(learn: Learner, run: Callable[[], None]) -> None:
        start = clock()
        run()
        seconds.append(clock() - start)

    return seconds


def cifar(run: Run, place: Path) -> tuple[Path, str]:
    """Return (folder, its contents): CIFAR-10 if it is given or on this machine, or else generated pictures. Nothing is
    downloaded.
    """
    from learnkit.vision import URLs, untar_data
    from learnkit.vision.untar import default_root, from_environment

    if run.cifar is not None:
        return run.cifar, "CIFAR-10"
    if not run.quick and (from_environment(URLs.CIFAR) is not None or (default_root() / URLs.CIFAR.name).is_dir()):
        return untar_data(URLs.CIFAR), "CIFAR-10"
    n_train, n_test = (40, 20) if run.quick else (50_000, 10_000)
    for part, n in (("train", n_train), ("test", n_test)):
        generate(place / "pictures" / part, n // 10, seed=len(part))
    return place / "pictures", f"{n_train:,} generated pictures"


def generate(folder: Path, n: int, *, seed: int) -> None:
    """Write `n` pictures of 32×32 for each of ten classes: a pattern of the class in noise."""
    from PIL import Image

    patterns = (
        torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        .repeat_interleave(8, 2)
        .repeat_interleave(8, 3)
    )
    generator = torch.Generator().manual_seed(seed)
    for k in range(10):
        (folder / str(k)).mkdir(parents=True)
        pixels = 255 * (0.3 * patterns[k] + 0.7 * torch.rand(n, 3, 32, 32, generator=generator))
        for i, picture in enumerate(pixels.byte().permute(0, 2, 3, 1).numpy()):
            Image.fromarray(picture).save(folder / str(k) / f"{i:05}.png", compress_level=1)


# --- two devices -------------------------------------------------------------
WORDS: dict[str, Callable[[Learner], Learner]] = {
    **{word: partial(Learner.to_distributed, algorithm=word) for word in ("allreduce", "fp16", "bf16", "bytegrad")},
    "powersgd": lambda learn: learn.to_distributed(algorithm="powersgd", warmup_steps=2, rank=4),
    **{
        word: partial(Learner.to_distributed, algorithm=word, period=4, warmup_steps=2)
        for word in ("local_sgd", "hierarchical")
    },
    "decentralized": lambda learn: learn.to_distributed(algorithm="decentralized", period=4),
    "to_fsdp": Learner.to_fsdp,
    "to_fsdp(cpu_offload=True)": partial(Learner.to_fsdp, cpu_offload=True),
}


def two_devices(run: Run) -> None:
    """Run two ranks, one on each of two devices."""
    import ddp
    import scale

    from learnkit.distributed import launch

    if run.name == "twin":
        device_named("twin")  # forked ranks have it, too; CUDA must not be in use before the fork
    n, rounds = (ddp.GLOBAL_BATCH * 5, 2) if run.quick else (25_600, 7)
    sides = launch(ddp.run_case, 2, "default", argparse.Namespace(images=n, epochs=1, rounds=rounds, clock="wall"))
    for name, side in sides.items():
        run.figure(f"{n:,} pictures: {name}", side.seconds, "s", 3)
        if name == "hand":
            continue
        run.figure(f"{name} / hand", [a / b for a, b in zip(side.seconds, sides["hand"].seconds, strict=True)], "×", 3)
        run.figure(
            f"{name}: largest difference of weights and values to the loop by hand",
            [ddp.difference(side, sides["hand"])],
            digits=6,
        )
    size = (
        argparse.Namespace(width=256, tokens=256, steps=4, rounds=2, clock="wall")
        if run.quick
        else argparse.Namespace(width=4096, tokens=2048, steps=20, rounds=7, clock="wall")
    )
    seconds, apart = launch(scale.time_of, 2, size)
    run.figure("to_fsdp / fully_shard by hand", ratios(seconds, "to_fsdp", "by hand"), "×", 3)
    run.figure("to_fsdp: largest difference of weights to fully_shard by hand", [apart], digits=6)
    for word in WORDS:
        try:
            seconds, loss = launch(fit_with, 2, word, 20 if run.quick else 200, timeout=60)
        except Exception as error:
            run.fail(word, str(error)[-2000:])
            continue
        run.figure(f"{word}: a step", [1e3 * s for s in seconds], "ms", 3)
        run.figure(f"{word}: final loss", [loss], digits=6)
    _, loss = fit_with("", 20 if run.quick else 200)
    run.figure("one process: final loss", [loss], digits=6)


def fit_with(word: str, n_steps: int) -> tuple[list[float], float]:
    """Return (seconds per step in each of three epochs, the final validation loss), with an algorithm; "" is a single
    process with all samples.
    """
    torch.set_num_threads(1)
    x, y = epoch.images(n_steps * 128)
    data = DataBunch.from_tensors((x, y), (x[:1280], y[:1280]), bs=64 if word else 128, seed=0)
    learn = Learner(data, epoch.cnn(), opt_func=epoch.sgd, wd=0.0, seed=0)
    if word:
        WORDS[word](learn)
    seconds = times_of(learn)
    with learn.no_logging():
        learn.fit(3, 0.02)
    return [s / n_steps for s in seconds], learn.values["valid_loss"]


PARTS: dict[str, Callable[[Run], None]] = {
    "machine": machine,
    "tests": cuda_tests,
    "tests of two": partial(cuda_tests, two=True),
    "two devices": two_devices,
    "waits": waits,
    "step": step,
    "speed run": speedrun,
    "epoch": whole_epoch,
    "compile": compile_model,
    "memory": memory,
    "data path": data_path,
    "checkpoint": checkpoints,
}


def run_part(name: str, run: Run) -> None:
    PARTS[name](run)
    if run.name == "twin" and name not in ("machine", "tests", "tests of two"):
        for race in stand_in().races():
            run.fail("a race", race)
