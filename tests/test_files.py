"""save and load: whole files or none, plain keys, nothing executed, nothing half loaded; and the summary."""

import errno
import os
import pickle
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from learnkit import Callback, DataBunch, Learner
from learnkit.checkpoint.files import Growing, hash_file, writing


def make_model(n_out: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, n_out))


def make_learner(model: nn.Module | None = None, **options: Any) -> Learner:
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    return Learner(DataBunch.from_tensors((x, y), (x, y), bs=4, seed=1), model or make_model(), **options)


def state_of(learn: Learner) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def assert_state(learn: Learner, state: dict[str, torch.Tensor]) -> None:
    assert learn.model.state_dict().keys() == state.keys()
    for key, value in learn.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- round trips -------------------------------------------------------------
def test_save_writes_one_file_under_path_and_model_dir_and_load_takes_it_back(tmp_path: Path):
    learn = make_learner(path=tmp_path / "runs", model_dir="best").fit(1)
    state = state_of(learn)
    assert learn.save("first") == tmp_path / "runs" / "best" / "first.pt"
    assert files(tmp_path) == ["runs/best/first.pt"]
    learn.fit(1)
    assert learn.load("first") is learn
    assert_state(learn, state)


def test_the_default_folder_is_models_in_the_current_one(tmp_path: Path):
    make_learner().save("a")
    assert files(tmp_path) == ["models/a.pt"]


@pytest.mark.parametrize(
    "opt_func", [torch.optim.AdamW, lambda ps, lr: SGD(ps, lr=lr, momentum=0.9)], ids=["AdamW", "SGD"]
)
def test_a_fit_after_a_load_in_a_new_learner_equals_the_fit_without_it(opt_func: Any):
    learn = make_learner(opt_func=opt_func).fit(2)
    learn.save("half")
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    other = Learner(([(x, y)], None), make_model(), opt_func=opt_func).load("half")
    learn.data = other.data
    learn.fit(2)
    other.fit(2)
    assert_state(other, state_of(learn))
    assert other.recorder.losses == learn.recorder.losses


def test_without_the_optimizer_only_the_model_is_written_and_the_optimizer_stays():
    learn = make_learner().fit(1)
    path = learn.save("bare", with_opt=False)
    assert set(torch.load(path, weights_only=True)) == {"model"}
    other = make_learner().load("bare")
    assert_state(other, state_of(learn))
    assert other.opt is None


def test_a_learner_that_was_never_fitted_can_be_saved_and_loaded():
    learn = make_learner()
    learn.save("new")
    assert_state(make_learner().load("new"), state_of(learn))


def test_a_saved_file_overwrites_an_older_one():
    learn = make_learner()
    learn.save("a")
    learn.fit(1).save("a")
    assert_state(make_learner().load("a"), state_of(learn))


def test_a_file_is_plain_and_loads_without_this_library():
    learn = make_learner().fit(1)
    state = torch.load(learn.save("plain"), weights_only=True)
    assert set(state) == {"model", "opt"} and set(state["model"]) == set(make_model().state_dict())
    make_model().load_state_dict(state["model"])


def test_keys_are_those_of_the_bare_model_whatever_wraps_it():
    compiled = torch.compile(make_model(), backend="eager")
    for model in (nn.DataParallel(make_model()), compiled):
        learn = make_learner(model)  # type: ignore[arg-type]
        assert set(torch.load(learn.save("wrapped"), weights_only=True)["model"]) == set(make_model().state_dict())
        bare = make_learner().load("wrapped")
        for p, q in zip(bare.model.parameters(), learn.model.parameters(), strict=True):
            assert torch.equal(p, q)
        bare.fit(1).save("bare")
        learn.load("bare")
        for p, q in zip(bare.model.parameters(), learn.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_model_with_a_layer_that_is_called_module_keeps_its_names():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.module(x))

    learn = make_learner(Own())
    state = state_of(learn)
    learn.save("own")
    assert set(torch.load("models/own.pt", weights_only=True)["model"]) == set(state)
    assert_state(make_learner(Own()).load("own"), state)


@pytest.mark.parametrize(
    "write",
    [
        lambda model: model.state_dict(),
        lambda model: {"model": model.state_dict()},
        lambda model: {f"module.{k}": v for k, v in model.state_dict().items()},
    ],
    ids=["state_dict", "under model", "of DataParallel"],
)
def test_a_file_of_plain_torch_can_be_loaded(tmp_path: Path, write: Callable[[nn.Module], Any]):
    (tmp_path / "models").mkdir()
    torch.save(write(model := make_model()), tmp_path / "models" / "theirs.pt")
    assert_state(make_learner().load("theirs"), dict(model.state_dict()))


# --- whole or not at all -----------------------------------------------------
class Unsavable:
    """Not a plain type."""


class Broken(nn.Linear):
    """A model whose state cannot be written."""

    def get_extra_state(self) -> Any:
        return Unsavable()

    def set_extra_state(self, state: Any) -> None: ...


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path):
    learn = make_learner()
    path = learn.save("a")
    before = path.read_bytes()
    learn.model.append(Broken(2, 2))  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"\['3._extra_state'\] is a Unsavable, which cannot be saved"):
        learn.save("a")
    with pytest.raises(TypeError, match="Unsavable"):
        learn.save("b")
    assert path.read_bytes() == before and files(tmp_path) == ["models/a.pt"]


def test_a_save_that_is_interrupted_leaves_the_old_file_and_no_litter(tmp_path: Path):
    class Interrupted(Broken):
        def get_extra_state(self) -> Any:
            raise KeyboardInterrupt

    learn = make_learner()
    before = learn.save("a").read_bytes()
    learn.model.append(Interrupted(2, 2))  # type: ignore[operator]
    with pytest.raises(KeyboardInterrupt):
        learn.save("a")
    assert (tmp_path / "models" / "a.pt").read_bytes() == before and files(tmp_path) == ["models/a.pt"]


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99], ids=["empty", "10 bytes", "half", "99 %"])
def test_a_damaged_file_is_refused_and_nothing_is_loaded(keep: float):
    learn = make_learner()
    path = learn.save("cut")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    state = state_of(learn.fit(1))
    with pytest.raises(ValueError, match=r"cut\.pt (.*was changed after|cannot be read safely).*Nothing was loaded"):
        learn.load("cut")
    assert_state(learn, state)


def test_a_file_that_is_not_there_is_named_with_those_that_are():
    learn = make_learner()
    with pytest.raises(FileNotFoundError, match=r"best\.pt does not exist\. Saved in that folder: nothing"):
        learn.load("best")
    learn.save("first")
    learn.save("second")
    with pytest.raises(FileNotFoundError, match=r"Saved in that folder: first, second"):
        learn.load("best")


# --- nothing executed --------------------------------------------------------
class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"model": Evil()}, path),
        lambda path: path.write_bytes(pickle.dumps(Evil(), protocol=2)),
        lambda path: torch.save(Evil(), path),
        lambda path: torch.save(nn.Linear(1, 1), path),
    ],
    ids=["in a state", "pickle", "in a file", "whole model"],
)
def test_a_file_with_other_objects_is_refused_and_its_code_is_not_run(tmp_path: Path, write: Callable[[Path], Any]):
    (tmp_path / "models").mkdir()
    write(tmp_path / "models" / "evil.pt")
    learn = make_learner()
    state = state_of(learn)
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read safely.*other objects.*Nothing was loaded"):
        learn.load("evil")
    assert not (tmp_path / "canary").exists()
    assert_state(learn, state)


def test_a_file_that_holds_no_state_is_refused_with_what_it_holds(tmp_path: Path):
    (tmp_path / "models").mkdir()
    torch.save(torch.zeros(3), tmp_path / "models" / "tensor.pt")
    with pytest.raises(ValueError, match=r"tensor\.pt contains Tensor, expected a dict"):
        make_learner().load("tensor")


# --- files of other models ---------------------------------------------------
class Other(nn.Module):
    """Differs from make_model() in a shape, a layer too many, and one too few."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(3, 4))
        self.add_module("2", nn.Linear(4, 5))
        self.add_module("9", nn.Linear(1, 1))


def test_a_strict_load_lists_every_difference_and_changes_nothing(tmp_path: Path):
    (tmp_path / "models").mkdir()
    torch.save(Other().state_dict(), tmp_path / "models" / "other.pt")
    learn = make_learner().fit(1)
    state = state_of(learn)
    with pytest.raises(ValueError, match=r"another model.*nothing was loaded") as caught:
        learn.load("other")
    for key in ("1.weight", "1.bias", "1.running_mean", "9.weight", "9.bias", "2.weight", "2.bias"):
        assert f"{key}:" in str(caught.value)
    assert "0.weight" not in str(caught.value) and "(5, 4)" in str(caught.value) and "(2, 4)" in str(caught.value)
    assert "strict=False" in str(caught.value)
    assert_state(learn, state)


def test_a_load_that_is_not_strict_takes_what_fits_and_leaves_the_rest(tmp_path: Path):
    (tmp_path / "models").mkdir()
    torch.save((other := Other()).state_dict(), tmp_path / "models" / "other.pt")
    learn = make_learner().fit(1)
    state = state_of(learn)
    learn.load("other", strict=False)
    assert_state(learn, state | {k: v for k, v in other.state_dict().items() if k.startswith("0.")})


def test_a_load_of_which_nothing_fits_is_refused_also_when_not_strict(tmp_path: Path):
    (tmp_path / "models").mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "models" / "other.pt")
    with pytest.raises(ValueError, match="nothing in the file fits"):
        make_learner().load("other", strict=False)


def test_an_optimizer_state_that_does_not_fit_leaves_the_model_unchanged():
    learn = make_learner(splitter=lambda m: [m[0], m[1:]]).fit(1)
    learn.save("two groups")
    other = make_learner().fit(1)
    state = state_of(other)
    with pytest.raises(ValueError, match=r"group|optimizer"):
        other.load("two groups")
    assert_state(other, state)


def test_a_load_that_is_not_strict_leaves_no_optimizer_state_of_other_shapes_than_the_parameters():
    """The head was replaced: the body's weights fit, the optimizer's state does not; fused kernels would read beyond
    it.
    """
    learn = make_learner().fit(1)
    learn.save("two classes")
    body = learn.model[0].weight.clone()  # type: ignore[index,union-attr,operator]
    other = make_learner(make_model(n_out=5)).load("two classes", strict=False)
    assert torch.equal(other.model[0].weight, body)  # type: ignore[index,union-attr,arg-type]
    for p, state in other.opt.state.items() if other.opt is not None else ():
        for name, value in state.items():
            assert value.ndim == 0 or value.shape == p.shape, name
    assert other.fit(1).step == 2


def test_an_optimizer_state_of_another_algorithm_is_refused_and_nothing_is_loaded():
    make_learner(opt_func=lambda ps, lr: SGD(ps, lr=lr, momentum=0.9)).fit(1).save("sgd")
    other = make_learner()
    state = state_of(other)
    with pytest.raises(ValueError, match=r"optimizer"):
        other.load("sgd")
    assert_state(other, state)


def test_loading_in_the_middle_of_a_fit_goes_on_from_there():
    class Back(Callback):
        def after_epoch(self, learn):
            if learn.epoch == 1:
                learn.load("start")

    learn = make_learner(callbacks=Back())
    learn.save("start")
    start = state_of(learn)
    learn.fit(2)
    assert_state(learn, start)


# --- summary -----------------------------------------------------------------
def test_the_summary_has_a_line_a_layer_with_shape_parameters_and_whether_it_is_trained():
    learn = make_learner(splitter=lambda m: [m[0], m[1:]]).freeze()
    text = learn.summary()
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert all(part in rows["0"] for part in ("Linear", "(4, 4)", "16", "64 B", "no"))
    assert all(part in rows["1"] for part in ("BatchNorm1d", "(4, 4)", "8", "yes"))
    assert all(part in rows["2"] for part in ("Linear", "(4, 2)", "10", "yes"))
    assert "34 parameters, 18 trained" in text


def test_the_summary_leaves_state_modes_hooks_order_and_random_state():
    torch.manual_seed(1)
    runs = []
    for look in (False, True):
        torch.manual_seed(1)
        learn = make_learner(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)))
        learn.model[1].eval()  # type: ignore[index]
        state, generator = state_of(learn), torch.get_rng_state()
        if look:
            learn.summary()
        assert_state(learn, state)
        assert torch.equal(torch.get_rng_state(), generator)
        assert [m.training for m in learn.model] == [True, False, True, True]  # type: ignore[union-attr]
        assert not any(m._forward_hooks for m in learn.model.modules())
        runs.append(learn.fit(2).recorder.losses)
    assert runs[0] == runs[1]


def test_the_summary_of_a_model_that_fails_leaves_no_hook_and_no_mode_behind():
    class Fails(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise LookupError("lost")

    learn = make_learner(nn.Sequential(nn.Linear(3, 3), Fails(3, 2)))
    with pytest.raises(LookupError, match="lost"):
        learn.summary()
    assert learn.model.training and not any(m._forward_hooks for m in learn.model.modules())


def test_the_summary_counts_shared_parameters_once_and_shows_a_layer_each_time_it_runs():
    shared = nn.Linear(3, 3)
    text = make_learner(nn.Sequential(shared, shared, nn.Linear(3, 2))).summary()
    assert "20 parameters, 20 trained" in text and text.count("(Linear)") == 3


def test_the_summary_of_mapping_batches_calls_the_model_by_keyword():
    class Named(nn.Linear):
        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)  # type: ignore[override]

    learn = Learner(([{"x": torch.randn(4, 3), "labels": torch.randint(2, (4,))}], None), Named(3, 2))
    assert "8 parameters" in learn.summary()


def test_a_full_disk_is_named_with_the_need_and_the_space(monkeypatch):
    learn = make_learner()
    before = learn.save("a").read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        OSError, match=r"could not write models/a.pt: No space left.*needs about .* MB; .* MB are free.*Make room"
    ):
        learn.save("a")
    assert Path("models/a.pt").read_bytes() == before and [p.name for p in Path("models").iterdir()] == ["a.pt"]


def full_disk(handle: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_every_bit_of_a_saved_file_counts():
    learn = make_learner()
    path = learn.save("a")
    whole, generator = path.read_bytes(), random.Random(0)
    learn.load("a")
    for place in [
        *range(8 * (len(whole) - 100), 8 * len(whole)),
        *(generator.randrange(8 * len(whole)) for _ in range(300)),
    ]:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="Nothing was loaded"):
            learn.load("a")


def test_a_file_of_plain_torch_is_checked_too():
    learn = make_learner()
    Path("models").mkdir()
    torch.save(learn.model.state_dict(), "models/plain.pt")
    learn.load("plain")
    data = bytearray(Path("models/plain.pt").read_bytes())
    data[data.index(learn.model.state_dict()["0.weight"].numpy().tobytes()) + 5] ^= 1
    Path("models/plain.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"plain.pt was changed after it was written.*Nothing was loaded"):
        learn.load("plain")


def test_the_hash_is_complete_however_threads_take_turns(tmp_path: Path):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for i in range(100):
            with writing({tmp_path / f"{i}-{part}": {"w": torch.full((20_000,), float(i))} for part in "ab"}) as told:
                pass
            for path, found in told.items():
                assert (found["sha256"], found["bytes"]) == hash_file(path)
    finally:
        sys.setswitchinterval(before)


def test_an_end_that_comes_between_two_looks_of_the_hash_is_not_missed(tmp_path: Path):
    class Ends(threading.Event):
        """Comes right after it was seen that it had not."""

        def is_set(self) -> bool:
            was = super().is_set()
            file.end()
            return was

    gate = threading.Event()
    with ThreadPoolExecutor(1) as helper:
        helper.submit(gate.wait)
        file = Growing(tmp_path / "a", helper)
        file.ended = Ends()
        file.file.close()
        gate.set()
        try:
            assert file.digest.result(timeout=10) == hash_file(tmp_path / "a")[0]
        finally:
            file.end()
