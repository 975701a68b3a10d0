"""How often the host waits for the device, exactly, for every callback and every word: as docs/performance.md says."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, accuracy, callbacks
from learnkit.callbacks import (
    EMA,
    SAM,
    SWA,
    Accumulate,
    ActivationStats,
    AutoMicrobatch,
    BnFreeze,
    ChannelsLast,
    Checkpoint,
    ClipGradients,
    Compiled,
    CSVLogger,
    CutMix,
    EarlyStopping,
    GradientStats,
    GradualUnfreezing,
    JSONLogger,
    LabelSmoothing,
    Lookahead,
    MixedPrecision,
    MixUp,
    MLflowLogger,
    ParamScheduler,
    Profile,
    Progress,
    Recorder,
    ReduceLROnPlateau,
    SaveBest,
    StopAfter,
    TensorBoardLogger,
    TerminateOnNaN,
    Timer,
    WandbLogger,
)
from learnkit.devices.accelerator import can_float64
from learnkit.metrics import Mean
from learnkit.optim.combined import Together
from learnkit.schedule import linear
from learnkit.vision import brightness, contrast, cutout, flip_lr, normalize, rand_pad, rand_resize_crop, rotate, zoom
from learnkit.vision.transform import per_sample
from tests.accelerator import twin

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
OF_RANKS = {"Communicate", "Distributed", "FullyShard", "ReduceAfterwards"}  # they do nothing alone: see RANKS
N_CLASSES, SIZE = 3, 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, N_CLASSES),
    )


def halves(model: Any) -> list[nn.Module]:
    return [model[:3], model[3:]]


def pictures(n_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(4 * n_batches, 3, SIZE, SIZE), torch.randint(N_CLASSES, (4 * n_batches,))


def held(n_train: int, n_valid: int, tfms: Sequence[Any] = ()) -> DataBunch:
    return DataBunch.from_tensors(pictures(n_train), pictures(n_valid), bs=4, device="twin", batch_tfms=(tfms, ()))


def loaded(n_train: int, n_valid: int) -> DataBunch:
    return DataBunch(
        *(DataLoader(TensorDataset(*pictures(n)), batch_size=4, pin_memory=True) for n in (n_train, n_valid))
    )


@dataclass
class Case:
    """What a fit has besides the usual. `built`: the optimizer, of the model's parameters."""

    callbacks: Callable[[], Any] = list
    words: Callable[[Learner], Any] = lambda learn: learn
    options: Callable[[], dict[str, Any]] = dict
    data: Callable[[int, int], DataBunch] = held
    built: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    how: str = "fit"
    rate: float | None = 1e-2
    needs: str = "torch"  # a package


def waits_of_fit(
    case: Case, epochs: int, n_train: int, n_valid: int, *, device: str = "twin"
) -> Counter[tuple[str, str]]:
    torch.manual_seed(0)
    model, options = net(), {"metrics": accuracy, **case.options()}
    if case.built is not None:
        options["opt_func"] = case.built(model.to(device))
    learn = Learner(
        case.data(n_train, n_valid),
        model,
        device=device,
        seed=0,
        splitter=halves,
        callbacks=case.callbacks(),
        **options,
    )
    case.words(learn)
    with redirect_stdout(Terminal()), warnings.catch_warnings(), twin.waits() as seen:
        warnings.simplefilter("ignore")
        getattr(learn, case.how)(epochs, case.rate)
    # CUDA's histc waits only where it is given no range (torch 2.15).
    return Counter((wait.op, wait.place) for wait in seen if wait.op != "histc")


def waits(fit: Callable[[int, int, int], Counter[tuple[str, str]]]) -> dict[str, int]:
    """Waits a step, a validation batch, an epoch and a fit: what one more of each adds, and what is left."""
    can_float64(torch.device("twin"))  # is asked once a process, which waits
    base, train, valid, epochs = (fit(*sizes) for sizes in ((1, 4, 2), (1, 8, 2), (1, 4, 4), (3, 4, 2)))
    n_base, step, batch = base.total(), (train.total() - base.total()) / 4, (valid.total() - base.total()) / 2
    epoch = (epochs.total() - n_base) / 2
    found = {"step": step, "batch": batch, "epoch": epoch - 4 * step - 2 * batch, "fit": n_base - epoch}
    assert all(n == int(n) for n in found.values()), {**found, **train}
    return {name: int(n) for name, n in found.items()}


# --- the page ----------------------------------------------------------------
def rows(heading: str) -> dict[str, list[str]]:
    """The table under a heading: {what: the other cells}."""
    part = PAGE.read_text().split(f"### {heading}\n")[1].split("\n#")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")
    ]
    return {what.strip("`"): rest for what, *rest in cells[2:]}


def of_row(name: str) -> list[int]:
    """Waits a step, a validation batch, an epoch and a fit, in its row of the page; without one, none."""
    return [0 if cell == "–" else int(cell) for cell in rows("In a fit").get(name, ["–"] * 4)[:4]]


def as_the_page_says(name: str) -> dict[str, int]:
    usual, more = of_row("every fit"), of_row(name) if name != "every fit" else [0] * 4
    return dict(zip(("step", "batch", "epoch", "fit"), (a + b for a, b in zip(usual, more, strict=True)), strict=True))


def tensor_rate(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=torch.tensor(1e-3, device="twin"), capturable=True)


def two(model: nn.Module) -> Together:
    weights, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    return Together(SGD(weights, lr=0.1, momentum=0.9), AdamW(rest, lr=0.01))


def torchmetric(name: str) -> dict[str, Any]:
    import torchmetrics

    return {"metrics": getattr(torchmetrics, name)("multiclass", num_classes=N_CLASSES)}


class Squared:
    """A metric that keeps means alone."""

    keeps_means_only = True

    def __init__(self) -> None:
        self.mean = Mean()

    def reset(self) -> None:
        self.mean.reset()

    def update(self, pred: torch.Tensor, target: torch.Tensor) -> None:
        self.mean.add((pred.amax(1) - target).square().mean(), len(pred))

    def compute(self) -> torch.Tensor:
        return self.mean.compute().sqrt()


def schedulefree(name: str) -> dict[str, Any]:
    import schedulefree as package

    return {"opt_func": getattr(package, name)}


EXPORTED: dict[str, Case] = {
    "Accumulate": Case(lambda: Accumulate(2)),
    "ActivationStats": Case(ActivationStats),
    "AutoMicrobatch": Case(AutoMicrobatch),
    "BnFreeze": Case(lambda: BnFreeze(all=True)),
    "CSVLogger": Case(lambda: CSVLogger(every_n_steps=1)),
    "ChannelsLast": Case(ChannelsLast),
    "Checkpoint": Case(lambda: Checkpoint("kept")),
    "ClipGradients": Case(ClipGradients),
    "Compiled": Case(Compiled),
    "CutMix": Case(CutMix),
    "EMA": Case(EMA),
    "EarlyStopping": Case(lambda: EarlyStopping(patience=9)),
    "GradientStats": Case(GradientStats),
    "GradualUnfreezing": Case(GradualUnfreezing),
    "JSONLogger": Case(lambda: JSONLogger(every_n_steps=1)),
    "LabelSmoothing": Case(LabelSmoothing),
    "Lookahead": Case(lambda: Lookahead(2)),
    "MLflowLogger": Case(lambda: MLflowLogger(every_n_steps=1), needs="mlflow"),
    "MixUp": Case(MixUp),
    "MixedPrecision": Case(MixedPrecision),
    "OptimizerModes": Case(options=lambda: schedulefree("AdamWScheduleFree"), needs="schedulefree"),
    "ParamScheduler": Case(lambda: ParamScheduler({"lr": linear(0.1, 0.01), "eps": linear(1e-8, 1e-7)})),
    "Profile": Case(Profile),
    "Progress": Case(lambda: Progress(graph=True)),
    "Recorder": Case(Recorder),
    "ReduceLROnPlateau": Case(lambda: ReduceLROnPlateau(patience=1, min_delta=9.0)),
    "SAM": Case(SAM),
    "SWA": Case(lambda: SWA(0.0, update_bn=True)),
    "SaveBest": Case(lambda: SaveBest(keep=9)),
    "StopAfter": Case(lambda: StopAfter(seconds=1000.0)),
    "TensorBoardLogger": Case(lambda: TensorBoardLogger(every_n_steps=1), needs="tensorboard"),
    "TerminateOnNaN": Case(TerminateOnNaN),
    "Timer": Case(Timer),
    "WandbLogger": Case(lambda: WandbLogger(every_n_steps=1, mode="offline"), needs="wandb"),
}

WORDS = {
    "every fit": Case(),
    "fit_one_cycle": Case(how="fit_one_cycle"),
    "fit_flat_cos": Case(how="fit_flat_cos"),
    "to_bf16()": Case(words=lambda learn: learn.to_bf16()),
    "to_bf16(pure=True)": Case(words=lambda learn: learn.to_bf16(pure=True)),
    "to_fp16()": Case(words=lambda learn: learn.to_fp16()),
    "to_fp16(pure=True)": Case(words=lambda learn: learn.to_fp16(pure=True)),
    "to_channels_last()": Case(words=lambda learn: learn.to_channels_last()),
    "compile()": Case(words=lambda learn: learn.compile(backend="eager")),
}

OTHERS = {
    "Accumulate(n, count=f)": Case(lambda: Accumulate(2, count=lambda inputs, target: (target > 0).sum())),
    "Profile(wait=True)": Case(lambda: Profile(wait=True)),
    "ClipGradients(value=1)": Case(lambda: ClipGradients(value=1.0)),
    "ClipGradients(adaptive=.01)": Case(lambda: ClipGradients(adaptive=0.01)),
    "two averages, clipped, in bfloat16": Case(
        lambda: [EMA(), SWA(0.0), ClipGradients()], words=lambda learn: learn.to_bf16()
    ),
    "AdamW(lr=tensor on the device)": Case(built=tensor_rate),
    "its schedule": Case(built=tensor_rate, how="fit_one_cycle"),
    "two optimizers together": Case(built=two, rate=None),
    "SGD": Case(options=lambda: {"opt_func": partial(SGD, momentum=0.9)}),
    "AdamW(foreach=True)": Case(options=lambda: {"opt_func": partial(AdamW, foreach=True)}),
    "AdamW(foreach=False)": Case(options=lambda: {"opt_func": partial(AdamW, foreach=False)}),
    "AdamW(capturable=True)": Case(options=lambda: {"opt_func": partial(AdamW, capturable=True)}),
    "SGDScheduleFree": Case(options=lambda: schedulefree("SGDScheduleFree"), needs="schedulefree"),
    "torch.optim.ASGD": Case(options=lambda: {"opt_func": torch.optim.ASGD}),
    "torch.optim.Adafactor": Case(options=lambda: {"opt_func": torch.optim.Adafactor}),
    "no metrics": Case(options=lambda: {"metrics": ()}),
    "an object as metric": Case(options=lambda: {"metrics": Squared()}),
    "torchmetrics.Accuracy": Case(options=lambda: torchmetric("Accuracy"), needs="torchmetrics"),
    "torchvision's transforms of pictures on the device": Case(
        data=lambda n, m: held(n, m, [per_sample(lambda x: x.flip(-1))])
    ),
    **{
        f"transform {name}": Case(data=lambda n, m, tfm=tfm: held(n, m, tfm))
        for name, tfm in {
            "rand_pad": rand_pad(2, SIZE),
            "rand_pad zeros": rand_pad(2, SIZE, "zeros"),
            "flip_lr": [flip_lr()],
            "flip_lr alternating": [flip_lr(alternating=True)],
            "cutout": [cutout(2)],
            "rotate": [rotate()],
            "zoom": [zoom()],
            "rand_resize_crop": [rand_resize_crop(SIZE)],
            "brightness": [brightness()],
            "contrast": [contrast()],
            "normalize": [normalize([0.5] * 3, [0.2] * 3)],
        }.items()
    },
}

OUTSIDE: dict[str, tuple[Callable[[Learner], Any], int]] = {  # what, and how many of its unit that is
    "learn.get_preds()": (lambda learn: learn.get_preds(), 5),
    "learn.predict(x)": (lambda learn: learn.predict(pictures(1)[0]), 1),
    "learn.validate()": (lambda learn: learn.validate(), 1),
    "learn.lr_find()": (lambda learn: learn.lr_find(num_it=20, stop_div=False), 20),
}

RANKS: dict[str, tuple[Callable[[Learner], Any], str]] = {  # what, and its row
    "to_distributed()": (lambda learn: learn.to_distributed(), "to_distributed()"),
    "delay_allreduce": (lambda learn: learn.to_distributed(delay_allreduce=True), "to_distributed()"),
    "sync_bn": (lambda learn: learn.to_distributed(sync_bn=True), "to_distributed(sync_bn=True)"),
    "local_sgd": (lambda learn: learn.to_distributed(algorithm="local_sgd"), 'to_distributed(algorithm="local_sgd")'),
    "to_fsdp()": (lambda learn: learn.to_fsdp(), "to_fsdp()"),
}


@pytest.mark.parametrize("name", [*EXPORTED, *WORDS, *OTHERS])
def test_a_fit_waits_as_often_as_the_page_says(name: str):
    case = {**EXPORTED, **WORDS, **OTHERS}[name]
    pytest.importorskip(case.needs)
    assert waits(partial(waits_of_fit, case)) == as_the_page_says(name)


def test_class_numbers_that_come_from_the_cpu_are_checked_there():
    assert waits(partial(waits_of_fit, Case(data=loaded))) == {**as_the_page_says("every fit"), "fit": 0}


@pytest.mark.parametrize("name", RANKS)
def test_on_two_ranks_too_but_for_the_start_of_a_fit(name: str, ranks: Callable[..., list[Any]]):
    wanted = as_the_page_says(RANKS[name][1])
    assert [{**of_rank, "fit": wanted["fit"]} for of_rank in ranks(2, waits_of_rank, name)] == [wanted] * 2


def waits_of_rank(name: str) -> dict[str, int]:
    index = torch.accelerator.current_device_index()

    def data(n: int, m: int) -> DataBunch:
        return DataBunch.from_tensors(pictures(2 * n), pictures(2 * m), bs=4, device=f"twin:{index}")

    return waits(partial(waits_of_fit, Case(words=RANKS[name][0], data=data), device=f"twin:{index}"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_of_a_fit_the_host_waits_as_often_as_the_page_says(name: str):
    can_float64(torch.device("twin"))
    learn = Learner(loaded(4, 5), net(), device="twin", metrics=accuracy, seed=0)
    work, n = OUTSIDE[name]
    with twin.waits() as seen:
        work(learn)
    assert len(seen) == int(rows("Outside of a fit")[name][0]) * n, seen.counted()


def test_a_usual_epoch_waits_four_times_at_most_and_no_step_and_no_batch_does():
    step, batch, epoch, _ = of_row("every fit")
    assert step == batch == 0 and epoch <= 4


def test_every_callback_is_counted():
    ours = {name for name, value in vars(callbacks).items() if isinstance(value, type) and issubclass(value, Callback)}
    assert ours == EXPORTED.keys() | OF_RANKS


def test_every_row_of_the_page_is_counted():
    assert (
        rows("In a fit").keys() <= {*EXPORTED, *WORDS, *OTHERS, *(row for _, row in RANKS.values())}
        and rows("Outside of a fit").keys() == OUTSIDE.keys()
    )
