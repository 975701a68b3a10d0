"""Files of a model on the device: those of the CPU, whole, in few waits, without a second copy on the device."""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from learnkit import Callback, DataBunch, Learner, load_learner
from learnkit.callbacks import EMA, Checkpoint, Recorder
from learnkit.checkpoint import snapshot as snapshots
from learnkit.checkpoint.files import read_state
from learnkit.devices import staging
from learnkit.devices.nested import tensors_in
from tests.accelerator import twin

DEVICES = ("twin:0", "twin:1")  # the current one, and another
SGD_M = partial(SGD, momentum=0.9)


class Net(nn.Module):
    """Weights that are one, weights in another memory format, empty buffers."""

    def __init__(self, *, depth: int = 1, p: float = 0.0, plain: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)], nn.Dropout(p))
        self.head = nn.Linear(4, 3)
        if plain:
            return
        self.conv.to(memory_format=torch.channels_last)
        self.body[0].bias = self.norm.bias
        self.register_buffer("none", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.conv(x)).mean((2, 3))))


def learner(device: str, *, opt_func: Any = SGD_M, **options: Any) -> Learner:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 2, 5, 5, generator=generator), torch.randint(3, (32,), generator=generator)
    return Learner(
        DataBunch.from_tensors((x, y), bs=4, seed=1, device=device),
        Net(**options),
        opt_func=opt_func,
        seed=1,
        device=device,
    )


def fitted(device: str, *callbacks: Callback, epochs: int = 1, resume: bool = False, **options: Any) -> Learner:
    learn = learner(device, **options)
    with learn.no_logging():
        return learn.fit(epochs, 0.1, callbacks=callbacks, resume=resume)


def files(folder: Path | str) -> dict[str, bytes]:
    """What each checkpoint holds of the model and its optimizer; what a run is has the device's random state in it."""
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in sorted(Path(folder).glob("*/*.pt"))
        if path.name != "run.pt"
    }


# --- the same files ----------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("opt_func", [SGD_M, Adam, partial(Adam, fused=True)], ids=["sgd", "adam", "fused"])
def test_a_saved_file_is_the_cpus_and_either_loads_the_others(device, opt_func):
    ours, theirs = fitted(device, opt_func=opt_func).save("ours"), fitted("cpu", opt_func=opt_func).save("theirs")
    assert ours.read_bytes() == theirs.read_bytes()
    for where in ("cpu", device):
        learn = fitted(where, opt_func=opt_func)
        for p in learn.model.parameters():
            p.data.zero_()
        learn.load("ours")
        assert learn.save("again").read_bytes() == ours.read_bytes()
        assert {p.device for p in learn.model.parameters()} == {torch.empty(0, device=where).device}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("async_write", [False, True])
def test_checkpoints_hold_what_those_of_the_cpu_hold_at_each_step(device, async_write):
    for where, folder in ((device, "ours"), ("cpu", "theirs")):
        fitted(where, Checkpoint(folder, every_n_steps=1, keep=20, async_write=async_write))
    assert len(files("ours")) == 2 * 9 and files("ours") == files("theirs")
    assert twin.races() == []


@pytest.mark.parametrize("where", ["cpu", "twin:0"])
def test_a_snapshot_written_by_a_thread_is_the_one_that_is_written_at_once(where):
    for async_write in (False, True):
        fitted(where, Checkpoint(f"{async_write}", every_n_steps=1, keep=20, async_write=async_write))
    assert files("True") == files("False")


def test_a_thread_copies_what_the_steps_before_have_made_though_nothing_else_waits_for_them():
    def fit(folder: str, *, async_write: bool) -> None:
        torch.manual_seed(1)
        data = DataBunch([(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(8)])
        learn = Learner(data, nn.Linear(6, 3), opt_func=SGD_M, seed=1, device="twin:0").remove_callback(Recorder)
        with learn.no_logging():
            learn.fit(1, 0.1, callbacks=[Checkpoint(folder, every_n_steps=1, keep=20, async_write=async_write)])

    fit("at once", async_write=False)
    fit("by a thread", async_write=True)
    assert files("at once") == files("by a thread") and twin.races() == []


def test_weights_that_are_one_are_one_in_the_file_and_in_a_copy():
    learn = fitted("twin:0")
    state = read_state(learn.save("m", with_opt=False))["model"]
    assert state["norm.bias"].data_ptr() == state["body.0.bias"].data_ptr()
    copied = snapshots.copied_to_host(learn.model.state_dict())
    assert copied["norm.bias"].data_ptr() == copied["body.0.bias"].data_ptr() and copied["norm.bias"].is_cpu


def test_a_copy_in_the_memory_of_an_earlier_one_keeps_apart_what_is_no_longer_one():
    x = torch.ones(3, device="twin:0")
    earlier = snapshots.copied_to_host({"a": x, "b": x})
    found = snapshots.copied_to_host({"a": x + 1, "b": x + 2}, earlier)
    assert found["a"] is earlier["a"] and found["a"].tolist() == [2] * 3 and found["b"].tolist() == [3] * 3


@pytest.mark.parametrize(
    "tensor",
    [
        lambda d: torch.arange(6.0, device=d).view(2, 3).T,
        lambda d: torch.arange(6.0, device=d)[1:4],
        lambda d: torch.ones(3, 1, device=d).expand(3, 4),
        lambda d: torch.zeros(0, 3, device=d),
        lambda d: torch.tensor(2, device=d),
        lambda d: torch.tensor([True, False], device=d),
        lambda d: torch.complex(torch.ones(2, device=d), torch.ones(2, device=d)),
        lambda d: torch.ones(2, dtype=torch.bfloat16, device=d),
        lambda d: nn.Parameter(torch.ones(2, device=d)),
    ],
    ids=["transposed", "part", "expanded", "empty", "number", "bool", "complex", "bfloat16", "parameter"],
)
def test_any_tensor_comes_to_the_host_as_it_is(tensor):
    for where in DEVICES:
        own, expected = tensor(where), tensor("cpu")
        for found in (snapshots.copied_to_host([own])[0], staging.on_host({"x": [own]})["x"][0]):
            assert torch.equal(found.cpu(), expected) and found.dtype == expected.dtype


def test_a_sparse_tensor_is_copied_as_one():
    assert torch.equal(snapshots.copied_to_host(torch.eye(3, device="twin:0").to_sparse()).to_dense(), torch.eye(3))


@pytest.mark.parametrize("device", DEVICES)
def test_views_of_one_memory_are_written_as_the_cpu_writes_them(device):
    def state(where: str) -> dict[str, Any]:
        whole = torch.arange(12.0, device=where).view(3, 4)
        return {
            "whole": whole,
            "part": whole[1],
            "columns": [whole[:, ::2], whole.T],
            "alone": torch.ones(3, dtype=torch.int32, device=where),
            "a": (1, "b"),
        }

    written = []
    for where in ("cpu", device):
        file = io.BytesIO()
        torch.save(staging.on_host(state(where)), file)
        written.append(file.getvalue())
    assert written[0] == written[1]


# --- few waits ---------------------------------------------------------------
def n_waits(work: Any) -> int:
    with twin.waits() as seen:
        work()
    return len(seen)


@pytest.mark.parametrize("async_write", [False, True])
def test_taking_a_snapshot_waits_as_often_for_a_deep_model_as_for_a_flat_one(async_write):
    def waits(depth: int) -> int:
        folder = f"{depth} {async_write}"
        alone = n_waits(lambda: fitted("twin:0", depth=depth))
        saving = n_waits(
            lambda: fitted("twin:0", Checkpoint(folder, every_n_epochs=None, async_write=async_write), depth=depth)
        )
        assert len(files(folder)) == 2
        return saving - alone

    assert (
        waits(1) == waits(40) == 2
    )  # at once: the model, the optimizer; by a thread: what may change before the next step, the rest


def test_saving_waits_once_for_the_model_and_once_for_its_optimizer():
    learn = fitted("twin:0", depth=20)
    assert n_waits(lambda: learn.save("m", with_opt=False)) == 1
    assert n_waits(lambda: learn.save("m")) == 1


def test_a_large_state_comes_through_small_buffers_with_a_wait_for_each_load(monkeypatch):
    monkeypatch.setattr(staging, "ROOM", 64)
    tensors = [torch.randn(n) for n in (1, 3, 16, 17, 100, 0, 15)]
    on_device, n_bytes = [t.to("twin:0") for t in tensors], sum(t.nbytes for t in tensors)
    for bring in (snapshots.copied_to_host, staging.on_host):
        found: list[list[Tensor]] = []
        assert n_waits(lambda bring=bring, found=found: found.append(bring(on_device))) == math.ceil(n_bytes / 64)
        assert all(map(torch.equal, found[0], tensors))
    assert twin.races() == []


# --- the device's memory -----------------------------------------------------
def peak(work: Any) -> int:
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    work()
    return torch.accelerator.max_memory_allocated() - before


def test_saving_loading_and_exporting_take_no_memory_of_the_device_for_a_second_model():
    learn = fitted("twin:0", depth=200)
    n_bytes = sum(t.nbytes for t in tensors_in(learn.model.state_dict()))
    assert peak(lambda: learn.save("m")) == 0
    assert (
        peak(lambda: snapshots.copied_to_host({"model": learn.model.state_dict(), "opt": learn.opt.state_dict()})) == 0
    )
    assert peak(lambda: learn.export("m.safetensors")) < n_bytes / 2
    learn.save("m", with_opt=False)
    assert peak(lambda: learn.load("m")) == 0


# --- going on ----------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("async_write", [False, True])
def test_a_fit_that_is_resumed_on_a_device_ends_as_one_that_was_not_interrupted(device, async_write):
    class Fail(Callback):
        def after_step(self, learn: Learner) -> None:
            if learn.step == 11:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"epochs": 2, "p": 0.5, "opt_func": Adam}
    whole = fitted(device, EMA(0.9), **options)
    with pytest.raises(KeyboardInterrupt):
        fitted(device, EMA(0.9), Checkpoint("c", every_n_steps=3, async_write=async_write), Fail(), **options)
    resumed = fitted(
        device, EMA(0.9), Checkpoint("c", every_n_steps=3, async_write=async_write), resume=True, **options
    )
    assert resumed.save("resumed").read_bytes() == whole.save("whole").read_bytes()
    assert twin.races() == []


@pytest.mark.parametrize(("first", "second"), [("cpu", "twin:0"), ("twin:0", "cpu"), ("twin:1", "twin:0")])
def test_a_fit_goes_on_where_another_device_left_it(first, second):
    class Fail(Callback):
        def after_step(self, learn: Learner) -> None:
            if learn.step == 11:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(first, Checkpoint("c", every_n_steps=3), Fail(), epochs=2)
    resumed = fitted(second, Checkpoint("c", every_n_steps=3), epochs=2, resume=True)
    assert resumed.save("resumed").read_bytes() == fitted("cpu", epochs=2).save("whole").read_bytes()


def test_an_adam_that_counts_its_steps_on_the_cpu_still_does_after_loading():
    learn = fitted("twin:0", opt_func=partial(Adam, foreach=False))
    learn.save("m")
    learn.load("m")
    assert {state["step"].device.type for state in learn.opt.state.values()} == {"cpu"}
    assert {state["exp_avg"].device.type for state in learn.opt.state.values()} == {"twin"}


# --- for inference -----------------------------------------------------------
@pytest.mark.parametrize("name", ["m.pt2", "m.safetensors"])
def test_an_exported_file_is_the_cpus_and_predicts_on_any_device(name):
    on_device, on_cpu = fitted("twin:0", plain=True), fitted("cpu", plain=True)
    x = torch.randn(5, 2, 5, 5)
    assert on_device.export(f"ours-{name}").read_bytes() == on_cpu.export(f"theirs-{name}").read_bytes()
    for device in ("cpu", *DEVICES):
        predictor = load_learner(
            f"ours-{name}", model=Net(plain=True) if name.endswith("safetensors") else None, device=device
        )
        for given in (x, x[0]):
            found = predictor.predict(given)
            assert found.is_cpu and torch.allclose(found, on_cpu.predict(given), atol=1e-6)
    assert twin.races() == []


def test_an_onnx_file_is_refused_on_a_device_before_it_is_read():
    Path("m.onnx").touch()
    with pytest.raises(ValueError, match=r"m\.onnx cannot be loaded on twin:1: ONNX Runtime computes on the CPU here"):
        load_learner("m.onnx", device="twin:1")
