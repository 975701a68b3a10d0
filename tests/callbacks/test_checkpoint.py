"""Checkpoints: a fit that was interrupted anywhere, any number of times, ends bit for bit as one that was not."""

import math
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from learnkit import Callback, DataBunch, Learner, StopFit, accuracy
from learnkit.callbacks import Checkpoint, EarlyStopping
from learnkit.checkpoint.snapshot import all_in, newest_snapshot, read_manifest

N, BS, EPOCHS = 30, 4, 3


class Noisy(Dataset[Any]):
    """Samples that are drawn anew each time: from torch's, Python's and numpy's generators."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        noise = torch.rand(4) + random.random() + np.random.rand()
        return (torch.arange(4.0) + i) / N + noise, i % 3


class OwnSampler(Sampler[int]):
    def __len__(self) -> int:
        return N

    def __iter__(self) -> Any:
        return iter(random.sample(range(N), N))


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)


def dataset() -> Any:
    return torch.utils.data.TensorDataset(*tensors())


DATA: dict[str, Callable[[], Any]] = {
    "tensors": lambda: DataBunch.from_tensors(tensors(), tensors(), bs=BS, drop_last=False),
    "datasets": lambda: DataBunch.create(dataset(), dataset(), bs=BS),
    "random samples": lambda: DataBunch.create(Noisy(), dataset(), bs=BS, num_workers=0),
    "DataLoader": lambda: (DataLoader(dataset(), BS, shuffle=True), DataLoader(dataset(), 7)),
    "own generator": lambda: (
        DataLoader(dataset(), BS, shuffle=True, generator=torch.Generator().manual_seed(7)),
        None,
    ),
    "random sampler": lambda: (DataLoader(dataset(), BS, sampler=RandomSampler(range(N), replacement=True)), None),
    "weights": lambda: (
        DataLoader(
            dataset(), BS, sampler=WeightedRandomSampler([1.0] * N, N, generator=torch.Generator().manual_seed(3))
        ),
        None,
    ),
    "own sampler": lambda: (DataLoader(dataset(), BS, sampler=OwnSampler()), None),
    "batch sampler": lambda: (
        DataLoader(dataset(), batch_sampler=BatchSampler(SequentialSampler(range(N)), 7, drop_last=False)),
        None,
    ),
    "own batch sampler": lambda: (DataLoader(dataset(), batch_sampler=[[0, 1], [5, 6, 7], [2, 3], [9, 11, 13]]), None),
    "list of batches": lambda: (
        [(x, y) for x, y in zip(tensors()[0].split(6), tensors()[1].split(6), strict=True)],
        None,
    ),
}


class Die(Callback):
    """Raises after the batch that did a given step, when everything that is told of it was told."""

    order = Checkpoint.order - 10

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step in self.steps:
            raise ConnectionAbortedError


def make(make_data: Callable[[], Any], **options: Any) -> Learner:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    return Learner(
        make_data(), net, metrics=accuracy, callbacks=[Checkpoint("kept", **({"every_n_steps": 1} | options))]
    )


def scramble() -> None:
    """Another process has other random states."""
    torch.manual_seed(99), random.seed(99), np.random.seed(99)


def state(learn: Learner) -> tuple[Any, ...]:
    recorder = learn.recorder
    values = [[repr(v) for v in row] for row in recorder.values]  # nan equals nan
    moments = [v.tolist() for s in learn.opt.state_dict()["state"].values() for v in s.values()]
    return (
        [p.tolist() for p in learn.model.state_dict().values()],
        moments,
        recorder.losses,
        recorder.lrs,
        recorder.moms,
        values,
        learn.step,
        torch.get_rng_state().tolist(),
        random.getstate(),
    )


def uninterrupted(make_data: Callable[[], Any]) -> tuple[Any, ...]:
    random.seed(5), np.random.seed(5)
    learn = make(make_data, every_n_steps=None)
    return state(learn.fit_one_cycle(EPOCHS, 1e-2))


def interrupted(make_data: Callable[[], Any], *steps: int) -> tuple[Any, ...]:
    """The same, but killed after each of these steps."""
    random.seed(5), np.random.seed(5)
    for i, step in enumerate(steps):
        learn = make(make_data, every_n_steps=step)
        if i:
            scramble()
        with pytest.raises(ConnectionAbortedError):
            learn.fit_one_cycle(EPOCHS, 1e-2, callbacks=[Die(step)], resume=i > 0)
    learn = make(make_data, every_n_steps=None)
    scramble()
    return state(learn.fit_one_cycle(EPOCHS, 1e-2, resume=True))


@pytest.mark.parametrize("make_data", DATA.values(), ids=DATA)
def test_a_fit_resumed_at_any_step_is_the_one_that_was_not_interrupted(make_data):
    expected = uninterrupted(make_data)
    n_steps = expected[6]
    for step in range(1, n_steps + 1, 1 if make_data is DATA["tensors"] else 5):
        shutil.rmtree("kept", ignore_errors=True)
        assert interrupted(make_data, step) == expected, f"step {step} of {n_steps}"


def test_a_chain_of_interruptions_also_in_one_epoch_changes_nothing():
    make_data = DATA["random samples"]
    expected = uninterrupted(make_data)
    assert interrupted(make_data, 2, 3, 5, 11, 12) == expected
    assert interrupted(make_data, 4) != uninterrupted(DATA["datasets"])  # a control that must differ


@pytest.mark.parametrize("lasting", [False, True], ids=["", "persistent workers"])
def test_workers_draw_the_same_after_a_resume(lasting):
    def make_data() -> Any:
        return DataLoader(Noisy(), BS, shuffle=True, num_workers=2, persistent_workers=lasting), None

    expected = uninterrupted(make_data)
    shutil.rmtree("kept", ignore_errors=True)
    assert interrupted(make_data, 4, 9) == expected
    assert expected[2] != uninterrupted(lambda: DataBunch.create(Noisy(), None, bs=BS, num_workers=0))[2]


def test_persistent_workers_live_on_from_epoch_to_epoch():
    class Pids(Dataset[Any]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> Any:
            return torch.tensor([float(torch.utils.data.get_worker_info().id), os.getpid()]), i % 3

    class Seen(Callback):
        def __init__(self) -> None:
            self.pids: set[float] = set()

        def after_batch(self, learn: Learner) -> None:
            self.pids.update(learn.inputs[0][:, 1].tolist())

    seen = Seen()
    learn = Learner(
        (DataLoader(Pids(), BS, num_workers=2, persistent_workers=True), None), nn.Linear(2, 3), callbacks=[seen]
    )
    learn.fit(2).fit(1)
    assert len(seen.pids) == 2


class Stream(IterableDataset[Any]):
    """Cannot be indexed; adds noise of torch's."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Any:
        return ((x + torch.rand(4), y) for x, y in zip(*tensors(), strict=True))


@pytest.mark.parametrize(
    "make_data",
    [lambda: (DataLoader(Stream(), BS), None), lambda: (DataLoader(Stream(), BS, num_workers=1), None)],
    ids=["", "in a worker"],
)
def test_an_iterable_dataset_is_read_again_which_is_said_once(make_data):
    expected = uninterrupted(make_data)
    with pytest.raises(ConnectionAbortedError):
        make(make_data, every_n_steps=3).fit_one_cycle(EPOCHS, 1e-2, callbacks=[Die(11)])
    scramble()
    with pytest.warns(
        UserWarning,
        match=r"the first batches of this epoch, 1, .* are read again, and left out: Stream cannot be indexed",
    ) as said:
        again = make(make_data, every_n_steps=None).fit_one_cycle(EPOCHS, 1e-2, resume=True)
    assert len(said) == 1 and state(again) == expected


def test_samples_before_the_place_are_not_read():
    read: list[int] = []

    class Counted(Noisy):
        def __getitem__(self, i: int) -> Any:
            read.append(i)
            return super().__getitem__(i)

    def make_data() -> Any:
        return DataBunch.create(Counted(), None, bs=BS, num_workers=0)

    with pytest.raises(ConnectionAbortedError):
        make(make_data).fit(1, callbacks=[Die(5)])
    before = list(read)
    make(make_data).fit(1, resume=True)
    assert len(before) == 5 * BS and len(read) == N // BS * BS and len(set(read)) == len(read)


def test_a_finished_fit_is_not_repeated_but_its_state_is_back():
    make_data = DATA["tensors"]
    learn = make(make_data).fit_one_cycle(EPOCHS, 1e-2)
    again = make(make_data)
    scramble()
    again.fit_one_cycle(EPOCHS, 1e-2, resume=True)
    assert state(again) == state(learn)
    assert again.validate() == learn.validate()


def test_a_script_of_two_fits_goes_on_in_the_second():
    def script(resume: bool, *callbacks: Callback) -> Learner:
        learn = make(DATA["tensors"])
        learn.fit(1, 1e-2, resume=resume)
        return learn.fit_one_cycle(2, 1e-2, resume=resume, callbacks=callbacks)

    expected = state(script(resume=False))
    with pytest.raises(ConnectionAbortedError):
        script(False, Die(3))
    scramble()
    assert state(script(resume=True)) == expected


def test_there_is_nothing_to_resume_at_first():
    expected = uninterrupted(DATA["tensors"])
    shutil.rmtree("kept", ignore_errors=True)
    learn = make(DATA["tensors"])
    assert state(learn.fit_one_cycle(EPOCHS, 1e-2, resume=True))[:6] == expected[:6]


def test_early_stopping_remembers_and_stays_stopped():
    def fit(learn: Learner, *callbacks: Callback, **options: Any) -> Learner:
        return learn.fit(9, 3.0, callbacks=[EarlyStopping(patience=2), *callbacks], **options)

    learn = fit(make(DATA["tensors"]))
    n_steps = learn.step
    assert len(learn.recorder.values) < 9
    shutil.rmtree("kept", ignore_errors=True)
    with pytest.raises(ConnectionAbortedError):
        fit(make(DATA["tensors"]), Die(n_steps - 5))
    scramble()
    again = fit(make(DATA["tensors"]), resume=True)
    assert state(again) == state(learn)
    assert fit(make(DATA["tensors"]), resume=True).step == n_steps


# --- what is kept ------------------------------------------------------------
def steps_kept() -> list[int]:
    return [read_manifest(path)["about"]["step"] for path in all_in(Path("kept"))]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"every_n_steps": None}, [16, 24]),
        ({"every_n_steps": None, "keep": 1}, [24]),
        ({"every_n_steps": 5, "keep": 9}, [5, 8, 10, 15, 16, 20, 24]),
        ({"every_n_steps": None, "every_n_epochs": 2, "keep": 5}, [16, 24]),
        ({"every_n_steps": None, "every_n_epochs": None}, [24]),
    ],
)
def test_the_last_ones_are_kept(options, expected):
    make(DATA["tensors"], **options).fit(EPOCHS)
    assert steps_kept() == expected
    assert not list(Path("kept").glob(".*"))


def test_the_one_resumed_from_is_kept_until_a_newer_one_is_there():
    with pytest.raises(ConnectionAbortedError):
        make(DATA["tensors"], keep=1).fit(EPOCHS, callbacks=[Die(5)])
    assert steps_kept() == [5]
    with pytest.raises(ConnectionAbortedError):
        make(DATA["tensors"], keep=1, every_n_steps=4).fit(EPOCHS, callbacks=[Die(7)], resume=True)
    assert steps_kept() == [5]
    make(DATA["tensors"], keep=1).fit(EPOCHS, resume=True)
    assert steps_kept() == [24]


def test_checkpoints_of_another_fit_are_left_alone():
    make(DATA["tensors"], keep=1).fit(1)
    make(DATA["tensors"], keep=1).fit(2)
    assert steps_kept() == [8, 16]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_holds_plain_files_that_torch_reads(asynchronous):
    learn = make(DATA["tensors"], async_write=asynchronous).fit(2)
    path = all_in(Path("kept"))[-1]
    weights = torch.load(path / "model.pt", weights_only=True)
    assert weights.keys() == learn.model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in learn.model.state_dict().items())
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


def test_a_write_in_a_thread_has_the_bytes_of_one_that_is_waited_for_also_of_weights_that_are_one():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
            self.norm = nn.BatchNorm1d(4)
            self.norm.bias = self.into.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(self.into(x)))

    for asynchronous in (False, True):
        torch.manual_seed(0)
        keeper = Checkpoint(f"{asynchronous}", every_n_steps=1, keep=20, async_write=asynchronous)
        Learner(DATA["tensors"](), Tied(), seed=1).fit(1, 0.1, callbacks=[keeper])
    for path in all_in(Path("False")):
        for name in ("model.pt", "optimizer.pt"):
            assert (path / name).read_bytes() == (Path("True") / path.name / name).read_bytes()
    model = torch.load(path / "model.pt", weights_only=True)
    assert model["norm.bias"].data_ptr() == model["into.bias"].data_ptr()


def test_a_write_in_a_thread_is_of_the_moment_at_which_it_was_asked_for(monkeypatch):
    from learnkit.checkpoint import snapshot as snapshots

    real, held = snapshots.write_snapshot, threading.Event()

    def slow(*args: Any) -> Path:
        held.wait(5)
        return real(*args)

    monkeypatch.setattr("learnkit.callbacks.checkpoint.write_snapshot", slow)
    seen: dict[int, Any] = {}

    class Watch(Callback):
        def after_batch(self, learn: Learner) -> None:
            if learn.training:
                seen[learn.step] = [p.clone() for p in learn.model.state_dict().values()]
            if learn.step == 4:
                held.set()

    make(DATA["tensors"], async_write=True, every_n_steps=2, keep=20).fit(1, callbacks=[Watch()])
    for path in all_in(Path("kept")):
        weights = torch.load(path / "model.pt", weights_only=True)
        step = read_manifest(path)["about"]["step"]
        assert all(torch.equal(a, b) for a, b in zip(weights.values(), seen[step], strict=True)), step
    assert steps_kept() == [2, 4, 6, 8, 8]


# --- what goes wrong ---------------------------------------------------------
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_of_the_writer_comes_up_and_the_one_before_is_intact(asynchronous, monkeypatch):
    from learnkit.checkpoint import snapshot as snapshots

    real = snapshots.writing

    def fails(states: dict[Path, Any]) -> Any:
        if any("step-6" in str(path) for path in states):
            raise OSError(28, "No space left on device")
        return real(states)

    monkeypatch.setattr(snapshots, "writing", fails)
    learn = make(DATA["tensors"], every_n_steps=3, async_write=asynchronous)
    with pytest.raises(
        OSError, match=r"could not write kept/000002-step-6: No space.*needs about .* MB; .* MB are free"
    ):
        learn.fit(EPOCHS)
    assert steps_kept() == [3] and newest_snapshot(Path("kept")) is not None
    assert not list(Path("kept").glob(".*"))


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_step():
    Path("kept").write_text("a file")
    learn = make(DATA["tensors"])
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(OSError, match="could not write kept"):
        learn.fit(1)
    assert all(torch.equal(p, q) for p, q in zip(before, learn.model.parameters(), strict=True)) and learn.step == 0


def test_what_could_not_be_read_again_is_refused_when_it_is_written():
    class Careless(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"where": [Path("x")]}

    with pytest.raises(TypeError, match=r"the state of Careless\['where'\]\[0\] is a \w*Path, which cannot be saved"):
        make(DATA["tensors"]).fit(1, callbacks=[Careless()])


def test_other_arguments_are_refused_before_anything_is_changed():
    make(DATA["tensors"]).fit(2)
    learn = make(DATA["tensors"])
    with pytest.raises(ValueError, match="fit of 2 epochs, this fit has 3"):
        learn.fit(3, resume=True)
    other = Learner(DATA["tensors"](), nn.Linear(4, 3), callbacks=[Checkpoint("kept")])
    before = other.model.weight.clone()
    with pytest.raises(ValueError, match="another model; 11 differences"):
        other.fit(2, resume=True)
    assert torch.equal(other.model.weight, before)
    with pytest.raises(ValueError, match="has nothing to resume from"):
        Learner(DATA["tensors"](), nn.Linear(4, 3)).fit(1, resume=True)


@pytest.mark.parametrize(
    "options", [{"every_n_steps": 0}, {"every_n_epochs": -1}, {"keep": 0}, {"keep": 1.5}, {"every_n_steps": True}]
)
def test_settings_are_checked(options):
    with pytest.raises(ValueError, match="expected a whole number, 1 or more"):
        Checkpoint("kept", **options)


# --- signals -----------------------------------------------------------------
class Raise(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, step: int = 5) -> None:
        self.number, self.step = number, step

    def after_forward(self, learn: Learner) -> None:
        if learn.training and learn.step == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_ends_the_batch_saves_and_leaves_with_its_exit_code(number, code, capsys):
    make_data = DATA["tensors"]
    expected = uninterrupted(make_data)
    shutil.rmtree("kept", ignore_errors=True)
    random.seed(5), np.random.seed(5)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)
    learn = make(make_data, every_n_steps=None)
    with pytest.raises(SystemExit) as left:
        learn.fit_one_cycle(EPOCHS, 1e-2, callbacks=[Raise(number)])
    assert left.value.code == code and steps_kept() == [6]
    assert (
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGUSR1),
    ) == handlers
    assert "saved kept/000001-step-6, from which resume=True continues" in capsys.readouterr().err
    scramble()
    assert state(make(make_data).fit_one_cycle(EPOCHS, 1e-2, resume=True)) == expected


def test_sigusr1_saves_and_goes_on():
    learn = make(DATA["tensors"], every_n_steps=None, keep=9).fit(1, callbacks=[Raise(signal.SIGUSR1)])
    assert steps_kept() == [6, 8] and learn.step == 8


def test_a_signal_during_validation_ends_the_fit_after_it():
    class InValidation(Callback):
        def after_batch(self, learn: Learner) -> None:
            if not learn.training and learn.epoch == 1 and learn.batch_index == 2:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        make(DATA["tensors"], every_n_steps=None).fit(EPOCHS, callbacks=[InValidation()])
    assert steps_kept()[-1] == 16
    learn = make(DATA["tensors"]).fit(EPOCHS, resume=True)
    assert learn.step == 24 and len(learn.recorder.values) == EPOCHS


def test_a_users_handler_is_called_too_and_put_back():
    called: list[int] = []

    def handler(number: int, frame: Any) -> None:
        called.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(SystemExit):
            make(DATA["tensors"]).fit(1, callbacks=[Raise(signal.SIGTERM)])
        assert called == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_off_the_main_thread_a_fit_trains_without_handlers_and_warns_once():
    caught: list[Any] = []

    def train() -> None:
        with pytest.warns(UserWarning, match="in a thread, where no signal can be handled") as seen:
            make(DATA["tensors"]).fit(1)
        caught.extend(seen)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert len(caught) == 1 and steps_kept()[-1] == 8


def test_stop_fit_in_the_middle_is_an_end_and_not_an_interruption():
    class Stops(Callback):
        def after_step(self, learn: Learner) -> None:
            if learn.step == 5:
                raise StopFit

    make(DATA["tensors"], every_n_steps=None).fit(EPOCHS, callbacks=[Stops()])
    assert make(DATA["tensors"]).fit(EPOCHS, resume=True).step == 5
    assert math.isfinite(sum(make(DATA["tensors"]).fit(EPOCHS, resume=True).recorder.losses))
