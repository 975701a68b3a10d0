"""How often the host waits for the device, exactly, for every callback and every word: as docs/performance.md says."""
from __future__ import annotations

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, accuracy, callbacks
from learnkit.accelerator import can_float64
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
    OptimizerModes,
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
from learnkit.metrics import RootMeanSquaredError
from learnkit.schedule import linear
from learnkit.together import Together
from learnkit.vision import brightness, contrast, cutout, flip_lr, normalize, rand_pad, rand_resize_crop, rotate, zoom
from learnkit.vision.transform import per_sample
from tests.accelerator import twin

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
OF_RANKS = {"Communicate", "Distributed", "FullyShard", "ReduceAfterwards"}     # they do nothing alone: see the test with two ranks
N_CLASSES, SIZE = 3, 8


class Terminal(io.StringIO):
    def isatty(self) -> bool: return True


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, N_CLASSES))


def pictures(n_batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(4 * n_batches, 3, SIZE, SIZE), torch.randint(N_CLASSES, (4 * n_batches,))


def held(n_train: int, n_valid: int, tfms: Sequence[Any] = ()) -> DataBunch:
    return DataBunch.from_tensors(pictures(n_train), pictures(n_valid), bs=4, device="twin", batch_tfms=(tfms, ()))


def loaded(n_train: int, n_valid: int) -> DataBunch:
    return DataBunch(*(DataLoader(TensorDataset(*pictures(n)), batch_size=4, pin_memory=True) for n in (n_train, n_valid)))


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
    needs: str = "torch"
    options_of_fit: dict[str, Any] = field(default_factory=dict)


def waits_of_fit(case: Case, epochs: int, n_train: int, n_valid: int) -> Counter[tuple[str, str]]:
    torch.manual_seed(0)
    model, options = net(), {"metrics": accuracy, **case.options()}
    if case.built is not None: options["opt_func"] = case.built(model.to("twin"))
    learn = Learner(case.data(n_train, n_valid), model, device="twin", seed=0, splitter=lambda m: [m[:3], m[3:]], callbacks=case.callbacks(), **options)
    case.words(learn)
    with redirect_stdout(Terminal()), warnings.catch_warnings(), twin.waits() as seen:
        warnings.simplefilter("ignore")
        getattr(learn, case.how)(epochs, case.rate)
    # CUDA's histc waits only where it is given no range (torch 2.15).
    return Counter((wait.op, wait.place) for wait in seen if wait.op != "histc")


def waits(case: Case) -> dict[str, int]:
    """Waits a step, a validation batch, an epoch and a fit: what one more of each adds, and what is left."""
    can_float64(torch.device("twin"))       # is asked once a process, which waits
    base, train, valid, epochs = (waits_of_fit(case, *sizes) for sizes in ((1, 4, 2), (1, 8, 2), (1, 4, 4), (3, 4, 2)))
    n_base, step, batch = base.total(), (train.total() - base.total()) / 4, (valid.total() - base.total()) / 2
    epoch = (epochs.total() - n_base) / 2
    found = {"step": step, "batch": batch, "epoch": epoch - 4 * step - 2 * batch, "fit": n_base - epoch}
    assert all(n == int(n) for n in found.values()), {**found, **train}
    return {name: int(n) for name, n in found.items()}


# ---------------------------------------------------------------------- the page
def rows(heading: str) -> dict[str, list[int]]:
    """The rows of the table under a heading: {what: numbers}."""
    table = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")][2:]
    return {re.sub(r"`", "", what): [int(cell) for cell in numbers if re.fullmatch(r"\d+", cell)] for what, *numbers in cells}


@cache
def usual() -> list[int]: return rows("A fit")["every fit"]


def as_the_page_says(name: str) -> dict[str, int]:
    more = rows("A fit").get(name, [0, 0, 0, 0]) if name != "every fit" else [0, 0, 0, 0]
    return dict(zip(("step", "batch", "epoch", "fit"), (a + b for a, b in zip(usual(), more, strict=True)), strict=True))


def tensor_rate(model: nn.Module) -> Adam: return Adam(model.parameters(), lr=torch.tensor(1e-3, device="twin"), capturable=True)


def two(model: nn.Module) -> Together:
    weights, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    return Together(SGD(weights, lr=.1, momentum=.9), AdamW(rest, lr=.01))


def torchmetric(name: str) -> dict[str, Any]:
    import torchmetrics
    return {"metrics": getattr(torchmetrics, name)("multiclass", num_classes=N_CLASSES)}


class Squared(RootMeanSquaredError):
    def update(self, pred: torch.Tensor, target: torch.Tensor) -> None: super().update(pred.amax(1), target.float())


def schedulefree(name: str) -> dict[str, Any]:
    import schedulefree as package
    return {"opt_func": getattr(package, name)}


EXPORTED: dict[str, Case] = {
    "Accumulate": Case(lambda: Accumulate(2)), "ActivationStats": Case(ActivationStats), "AutoMicrobatch": Case(AutoMicrobatch),
    "BnFreeze": Case(lambda: BnFreeze(all=True)), "CSVLogger": Case(lambda: CSVLogger(every_n_steps=1)), "ChannelsLast": Case(ChannelsLast),
    "Checkpoint": Case(lambda: Checkpoint("kept")), "ClipGradients": Case(ClipGradients), "Compiled": Case(Compiled), "CutMix": Case(CutMix),
    "EMA": Case(EMA), "EarlyStopping": Case(lambda: EarlyStopping(patience=9)), "GradientStats": Case(GradientStats),
    "GradualUnfreezing": Case(GradualUnfreezing), "JSONLogger": Case(lambda: JSONLogger(every_n_steps=1)), "LabelSmoothing": Case(LabelSmoothing),
    "Lookahead": Case(lambda: Lookahead(2)), "MLflowLogger": Case(lambda: MLflowLogger(every_n_steps=1), needs="mlflow"), "MixUp": Case(MixUp),
    "MixedPrecision": Case(MixedPrecision), "OptimizerModes": Case(options=lambda: schedulefree("AdamWScheduleFree"), needs="schedulefree"),
    "ParamScheduler": Case(lambda: ParamScheduler({"lr": linear(.1, .01), "eps": linear(1e-8, 1e-7)})), "Profile": Case(Profile),
    "Progress": Case(lambda: Progress(graph=True)), "Recorder": Case(Recorder),
    "ReduceLROnPlateau": Case(lambda: ReduceLROnPlateau(patience=1, min_delta=9.)), "SAM": Case(SAM), "SWA": Case(lambda: SWA(0., update_bn=True)),
    "SaveBest": Case(lambda: SaveBest(keep=9)), "StopAfter": Case(lambda: StopAfter(seconds=1000.)),
    "TensorBoardLogger": Case(lambda: TensorBoardLogger(every_n_steps=1), needs="tensorboard"), "TerminateOnNaN": Case(TerminateOnNaN),
    "Timer": Case(Timer), "WandbLogger": Case(lambda: WandbLogger(every_n_steps=1, mode="offline"), needs="wandb")}

WORDS = {
    "every fit": Case(), "fit_one_cycle": Case(how="fit_one_cycle"), "fit_flat_cos": Case(how="fit_flat_cos"),
    "to_bf16()": Case(words=lambda learn: learn.to_bf16()), "to_bf16(pure=True)": Case(words=lambda learn: learn.to_bf16(pure=True)),
    "to_fp16()": Case(words=lambda learn: learn.to_fp16()), "to_fp16(pure=True)": Case(words=lambda learn: learn.to_fp16(pure=True)),
    "to_channels_last()": Case(words=lambda learn: learn.to_channels_last()),
    "compile()": Case(words=lambda learn: learn.compile(backend="eager"))}

OTHERS = {
    "Accumulate(n, count=f)": Case(lambda: Accumulate(2, count=lambda inputs, target: (target > 0).sum())),
    "Profile(wait=True)": Case(lambda: Profile(wait=True)),
    "ClipGradients(value=1)": Case(lambda: ClipGradients(value=1.)), "ClipGradients(adaptive=.01)": Case(lambda: ClipGradients(adaptive=.01)),
    "two averages, clipped, in bfloat16": Case(lambda: [EMA(), SWA(0.), ClipGradients()], words=lambda learn: learn.to_bf16()),
    "a rate that is a tensor on the device": Case(built=tensor_rate),
    "its schedule": Case(built=tensor_rate, how="fit_one_cycle"),
    "two optimizers together": Case(built=two, rate=None),
    "SGD": Case(options=lambda: {"opt_func": partial(SGD, momentum=.9)}),
    "AdamW(foreach=True)": Case(options=lambda: {"opt_func": partial(AdamW, foreach=True)}),
    "AdamW(foreach=False)": Case(options=lambda: {"opt_func": partial(AdamW, foreach=False)}),
    "AdamW(capturable=True)": Case(options=lambda: {"opt_func": partial(AdamW, capturable=True)}),
    "SGDScheduleFree": Case(options=lambda: schedulefree("SGDScheduleFree"), needs="schedulefree"),
    "torch.optim.ASGD": Case(options=lambda: {"opt_func": torch.optim.ASGD}),
    "torch.optim.Adafactor": Case(options=lambda: {"opt_func": torch.optim.Adafactor}),
    "no metrics": Case(options=lambda: {"metrics": ()}),
    "an object as metric": Case(options=lambda: {"metrics": Squared()}),
    "torchmetrics.Accuracy": Case(options=lambda: torchmetric("Accuracy"), needs="torchmetrics"),
    "class numbers on the CPU": Case(data=loaded),
    "torchvision's transforms of pictures on the device": Case(data=lambda n, m: held(n, m, [per_sample(lambda x: x.flip(-1))])),
    **{f"transform {name}": Case(data=lambda n, m, tfm=tfm: held(n, m, tfm)) for name, tfm in {
        "rand_pad": rand_pad(2, SIZE), "rand_pad zeros": rand_pad(2, SIZE, "zeros"), "flip_lr": [flip_lr()],
        "flip_lr alternating": [flip_lr(alternating=True)], "cutout": [cutout(2)], "rotate": [rotate()], "zoom": [zoom()],
        "rand_resize_crop": [rand_resize_crop(SIZE)], "brightness": [brightness()], "contrast": [contrast()],
        "normalize": [normalize([.5] * 3, [.2] * 3)]}.items()}}

# What the page says of "class numbers on the CPU" is what it saves.
SAVES = {"class numbers on the CPU": {"step": 0, "batch": 0, "epoch": 2, "fit": 0}}


@pytest.mark.parametrize("name", [*EXPORTED, *WORDS, *OTHERS])
def test_the_host_waits_as_often_as_the_page_says(name: str):
    case = {**EXPORTED, **WORDS, **OTHERS}[name]
    pytest.importorskip(case.needs)
    assert waits(case) == SAVES.get(name, as_the_page_says(name))


def test_a_usual_epoch_waits_four_times_at_most_and_no_step_and_no_batch_does():
    step, batch, epoch, _ = usual()
    assert step == batch == 0 and epoch <= 4


def test_every_callback_is_counted():
    ours = {name for name, value in vars(callbacks).items() if isinstance(value, type) and issubclass(value, Callback)}
    assert ours == EXPORTED.keys() | OF_RANKS


def test_every_row_of_the_page_is_counted():
    assert rows("A fit").keys() <= {*EXPORTED, *WORDS, *OTHERS}
