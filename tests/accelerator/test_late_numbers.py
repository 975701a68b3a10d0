"""Numbers that come from the device late, or are checked before they are there: what is shown, logged and refused is
what the CPU has.
"""

from __future__ import annotations

import io
import json
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import Accumulate, Checkpoint, CSVLogger, JSONLogger, MixedPrecision, Progress
from learnkit.devices import accelerator
from learnkit.hooks import StopFit
from learnkit.loop import evaluate
from learnkit.vision.resample import crop_weights
from tests.accelerator import twin

N_CLASSES = 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def numbers(labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 4, generator=generator), torch.randint(
        N_CLASSES, (40,), generator=generator
    ) if labels is None else labels


def held(device: str, labels: Tensor | None = None) -> DataBunch:
    return DataBunch.from_tensors(numbers(labels), numbers(labels), bs=4, device=device)


def loaded(labels: Tensor) -> DataBunch:
    return DataBunch(*(DataLoader(TensorDataset(*numbers(labels)), batch_size=4) for _ in range(2)))


def learner(device: str, data: DataBunch | None = None, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(data or held(device), nn.Linear(4, N_CLASSES), metrics=accuracy, seed=0, device=device, **options)


class StopAt(Callback):
    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.step, self.error = step, error

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step == self.step:
            raise self.error


# --- logs and bars -----------------------------------------------------------
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stop", [None, StopFit])
def test_a_log_of_steps_has_the_rows_of_the_cpus(every: int, stop: type[BaseException] | None):
    logs = []
    for device in ("cpu", "twin"):
        extra = [] if stop is None else [StopAt(13, stop)]
        learn = learner(
            device,
            callbacks=[CSVLogger("log.csv", every_n_steps=every), JSONLogger("log.jsonl", every_n_steps=every), *extra],
        )
        with learn.no_logging():
            learn.fit(2)
        rows = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
        logs.append((Path("log.csv").read_text(), rows[1:]))
    assert logs[0] == logs[1]


def test_a_fit_that_fails_leaves_a_log_of_whole_rows():
    learn = learner("twin", callbacks=[CSVLogger("log.csv", every_n_steps=2), StopAt(5, InterruptedError)])
    with learn.no_logging(), pytest.raises(InterruptedError):
        learn.fit(1)
    rows = Path("log.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] in (["2", "4"], ["2"]) and all(
        float(row.split(",")[1]) > 0 for row in rows
    )


def test_a_log_has_every_row_before_the_checkpoint_that_a_fit_goes_on_from():
    def run(folder: str, *extra: Callback, resume: bool = False) -> str:
        learn = learner(
            "twin", callbacks=[Checkpoint(folder, every_n_steps=5), CSVLogger(f"{folder}.csv", every_n_steps=1), *extra]
        )
        with learn.no_logging():
            learn.fit(2, resume=resume)
        return Path(f"{folder}.csv").read_text()

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("parts", StopAt(7, InterruptedError))
    assert run("parts", resume=True) == whole


def test_the_bar_shows_the_losses_so_far_without_waiting():
    learn = learner("twin", held("twin"))
    learn.fit(1)  # what is asked once a process
    with redirect_stdout(Terminal()) as screen, twin.waits() as seen:
        learn.fit(2)
    assert "train_loss" in screen.getvalue() and {wait.place.split(":")[0] for wait in seen} <= {
        "callbacks/recorder.py",
        "learnkit/callbacks/recorder.py",
        "learnkit/logs/trace.py",
        "learnkit/metrics.py",
        "learnkit/loop/loss.py",
    }


def losses_shown(rank_device: bool) -> list[float]:
    device = f"twin:{torch.accelerator.current_device_index()}" if rank_device else "cpu"
    data = DataBunch.from_tensors(tuple(torch.cat([t] * 20) for t in numbers()), bs=4, device=device)
    learn = learner(device, data).to_distributed()
    shown: list[float] = []

    class See(Callback):
        order = Progress.order + 1

        def after_batch(self, learn: Learner) -> None:
            bar = next(cb for cb in learn.running if isinstance(cb, Progress))
            if bar.debias and (not shown or shown[-1] != bar.smooth):
                shown.append(bar.smooth)

    with redirect_stdout(Terminal()):
        learn.fit(1, callbacks=[See()])
    return shown


def test_a_bar_on_several_ranks_shows_the_mean_of_all_when_it_has_come(ranks: Any):
    (on_device, _), (on_cpu, _) = (ranks(2, losses_shown, rank_device) for rank_device in (True, False))
    assert len(on_device) >= 2 and on_device == pytest.approx(on_cpu[: len(on_device)], rel=1e-6)


def lr_of_rank() -> tuple[float, bool]:
    device = f"twin:{torch.accelerator.current_device_index()}"
    lr, model = torch.tensor(0.5, dtype=torch.float64, device=device), nn.Linear(4, N_CLASSES).to(device)
    opt = Adam(
        model.parameters(),
        lr=lr,
        betas=(torch.tensor(0.9, device=device), torch.tensor(0.99, device=device)),
        capturable=True,
    )
    learn = Learner(held(device), model, opt_func=opt, seed=0, device=device).to_distributed()
    with learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
    return learn.recorder.lrs[-1], opt.param_groups[0]["lr"] is lr


def test_ranks_whose_rates_are_tensors_on_their_devices_have_the_same_settings(ranks: Any):
    assert ranks(2, lr_of_rank) == [(pytest.approx(1e-2 / 25e4), True)] * 2


def test_losses_are_read_once_and_stay_what_they_were():
    learn, plain = learner("twin"), learner("cpu")
    for one in (learn, plain):
        with one.no_logging():
            one.fit(2)
    with twin.waits(error=True):
        losses = learn.recorder.losses
    assert losses == plain.recorder.losses and learn.recorder.values == plain.recorder.values


def test_losses_of_the_epoch_under_way_can_be_asked_for_in_it():
    seen: list[list[float]] = []

    class Look(Callback):
        def after_batch(self, learn: Learner) -> None:
            if learn.training:
                seen.append(learn.recorder.losses)

    learn = learner("twin", callbacks=[Look()])
    with learn.no_logging():
        learn.fit(2)
    assert [len(losses) for losses in seen] == list(range(1, 21)) and all(
        losses == seen[-1][: len(losses)] for losses in seen
    )


def test_counts_that_are_tensors_on_the_device_weigh_as_on_the_cpu():
    values = []
    for device in ("cpu", "twin"):
        learn = learner(device, callbacks=[Accumulate(3, count=lambda inputs, target: (target > 0).sum())])
        with learn.no_logging():
            learn.fit(2)
        values.append((learn.recorder.values, learn.recorder.counts))
    assert values[0] == values[1]


# --- class numbers -----------------------------------------------------------
WRONG = {"too high": torch.tensor([0, 1, 2, 3]), "negative": torch.tensor([2, -1, 0, 0])}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("source", ["held", "loaded"])
def test_a_class_number_out_of_range_is_the_cpus_error(name: str, source: str):
    labels, messages = WRONG[name].repeat(10), []
    for device in ("cpu", "twin"):
        with pytest.raises(ValueError, match="but the model gives 3 scores") as error:
            learner(device, held(device, labels) if source == "held" else loaded(labels)).fit(1)
        messages.append(str(error.value).split(" (")[0])
    assert messages[0] == messages[1] and f"targets run from {labels.min()} to {labels.max()}" in messages[0]


@pytest.mark.parametrize("ignored, labels", [(-100, [-100, 0, 1, 2]), (5, [5, 0, 1, 2]), (-100, [-100] * 4)])
def test_what_the_loss_ignores_is_no_class_number(ignored: int, labels: list[int]):
    data = held("twin", torch.tensor(labels).repeat(10))
    with learner("twin", data, loss_func=nn.CrossEntropyLoss(ignore_index=ignored)).no_logging() as learn:
        learn.fit(1)
    if ignored == 5:
        with pytest.raises(ValueError, match=r"targets run from . to 5"):
            learner("twin", data, loss_func=nn.CrossEntropyLoss()).fit(1)


class Change(Callback):
    """Changes the target on the device: the numbers that came from the loader are no longer those that the loss
    sees.
    """

    def __init__(self, by: int, *, in_place: bool) -> None:
        self.by, self.in_place = by, in_place

    def before_batch(self, learn: Learner) -> None:
        if self.in_place:
            learn.target += self.by
        else:
            learn.target = learn.target + self.by


@pytest.mark.parametrize("in_place", [True, False])
def test_a_target_that_a_hook_has_changed_is_checked_as_it_is_now(in_place: bool):
    from_one = numbers()[1] + 1
    learner("twin", loaded(from_one), callbacks=[Change(-1, in_place=in_place)]).fit(1)
    with pytest.raises(ValueError, match=r"targets run from . to 3"):
        learner("twin", loaded(numbers()[1]), callbacks=[Change(1, in_place=in_place)]).fit(1)


def test_another_loader_within_a_fit_is_checked_too():
    class Validate(Callback):
        def after_epoch(self, learn: Learner) -> None:
            learn.validate(loaded(numbers()[1] + learn.epoch).valid_dl)

    with pytest.raises(ValueError, match=r"targets run from . to 3") as error:
        learner("twin", callbacks=[Validate()]).fit(3)
    assert "epoch 1" in getattr(error.value, "__notes__", [str(error.value)])[-1]


# --- without float64, with tensors for rates ---------------------------------
@pytest.mark.parametrize("pure", [False, True])
def test_float16_scales_on_a_device_without_float64(pure: bool):
    found = []
    for has_float64 in (True, False):
        accelerator._computes_float64.cache_clear()
        with nullcontext() if has_float64 else twin.without_float64():
            learn = learner("twin").to_fp16(pure=pure, init_scale=2.0**30)  # overflows at first
            with learn.no_logging():
                learn.fit(2)
        precision = next(cb for cb in learn.callbacks if isinstance(cb, MixedPrecision))
        found.append((learn.recorder.losses, precision.skips, precision.scales))
    assert found[0] == found[1] and found[0][1]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("n_in, n_out", [(7, 3), (32, 224), (500, 32), (2000, 224), (5, 1)])
def test_crops_are_resized_in_float32_as_exactly_as_in_float64(n_in: int, n_out: int, antialias: bool):
    length = torch.randint(1, n_in + 1, (30,))
    start = (torch.rand(30) * (n_in - length + 1)).long()
    wanted = crop_weights(start, length, n_in, n_out, antialias=antialias)
    with twin.without_float64():
        ours = crop_weights(start.to("twin"), length.to("twin"), n_in, n_out, antialias=antialias)
    assert torch.allclose(ours.cpu(), wanted, rtol=0, atol=3e-7)


def test_a_rate_on_the_device_is_scheduled_without_waiting_and_trains_as_a_number_does():
    made = []
    for device, lr in (("cpu", 1e-2), ("twin", torch.tensor(1e-2, dtype=torch.float64, device="twin"))):
        torch.manual_seed(0)
        model = nn.Linear(4, N_CLASSES).to(device)
        opt = Adam(model.parameters(), lr=lr, fused=True, capturable=device != "cpu")
        learn = Learner(held(device), model, opt_func=opt, metrics=accuracy, seed=0, device=device)
        with learn.no_logging():
            learn.fit_one_cycle(2, 3e-2)
        assert device == "cpu" or learn.opt.param_groups[0]["lr"] is lr
        made.append((learn.recorder.lrs, learn.recorder.losses))
    assert made[0][0] == made[1][0] and made[0][1] == pytest.approx(made[1][1], rel=1e-5)


def test_predictions_too_large_for_pinned_memory_are_the_same(monkeypatch: pytest.MonkeyPatch):
    learn = learner("twin")
    small = learn.get_preds(with_loss=True)
    monkeypatch.setattr(evaluate, "PINNED", 15)
    assert all(map(torch.equal, small, learn.get_preds(with_loss=True)))
