"""A type checker sees the installed library as a user's editor does: right scripts pass, and wrong ones are marked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import Recorder


class Annotated(Callback):
    order = Recorder.order + 10

    def __init__(self, every: int = 2) -> None:
        self.every, self.seen = every, 0

    def before_fit(self, learn: Learner) -> None:
        self.n_weights = sum(p.numel() for p in learn.model.parameters())

    def around_step(self, learn: Learner, run: Callable[[], None]) -> None:
        if learn.epoch % self.every == 0: run()

    def after_batch(self, learn: Learner) -> None:
        self.seen += 1


class Bare(Callback):
    def before_batch(self, learn):
        assert_type(learn, Learner)
        assert_type(learn.model, nn.Module)
        assert_type(learn.epoch, int)

    def around_epoch(self, learn, run):
        learn.model.train()
        try: run()
        finally: print(learn.epoch)

    def after_fit(self, learn):
        print(learn.opt.param_groups[0]["lr"])


def error_rate(pred: Tensor, target: Tensor) -> Tensor:
    return 1 - accuracy(pred, target)


def halves(model: nn.Module) -> list[nn.Module]:
    return list(model.children())


x, y = torch.randn(64, 8), torch.randint(0, 2, (64,))
data = DataBunch.from_tensors(train=(x, y), valid=(x, y), bs=16)
learn = Learner(data, nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), metrics=accuracy, splitter=halves,
                callbacks=[Annotated(), Bare()])
assert_type(learn.fit(1, 1e-3), Learner)
assert_type(learn.fit_one_cycle(2, slice(1e-4, 1e-2), wd=0.1, callbacks=[Bare()]), Learner)
losses: dict[str, float] = learn.validate()
preds, targets = learn.get_preds()
learn.freeze()
learn.fit_flat_cos(1)
learn.unfreeze()
learn.save("first")
learn.load("first")
learn.predict(x[0])
Learner((data.train_dl, data.valid_dl), nn.Linear(8, 2), loss_func=nn.CrossEntropyLoss(), opt_func=torch.optim.SGD,
        metrics=[accuracy, error_rate]).add_callback(Annotated(every=3))
"""

# pyright must mark each line that ends in "# wrong", and no other
WRONG = """
from torch import nn

from learnkit import Callback, DataBunch, Learner


class NoLearner(Callback):
    def before_step(self): pass  # wrong


class NoRun(Callback):
    def around_batch(self, learn): pass  # wrong


class OtherType(Callback):
    def after_epoch(self, learn: int) -> None: pass  # wrong


class Misspelt(Callback):
    def after_fit(self, learn):
        print(learn.modle)  # wrong
        print(learn.epoch + "1")  # wrong


def fit(data: DataBunch) -> None:
    Learner(data, nn.Linear(8, 2), metric=())  # wrong
    Learner(data, nn.Linear(8, 2)).fit("two")  # wrong
    Learner(data, nn.Linear(8, 2)).fit_once()  # wrong
"""


@pytest.fixture(scope="module")
def marked(installed_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """The lines that pyright, as it is without settings, finds fault with, and why."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(installed_python)],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, list[tuple[int, str]]] = {"right.py": [], "wrong.py": []}
    for fault in json.loads(done.stdout)["generalDiagnostics"]:
        found[Path(fault["file"]).name].append((fault["range"]["start"]["line"] + 1, fault["message"]))
    return found


def test_a_users_script_with_callbacks_has_no_type_errors(marked: dict[str, list[tuple[int, str]]]):
    assert marked["right.py"] == []


def test_wrong_hooks_and_misspelt_attributes_are_marked(marked: dict[str, list[tuple[int, str]]]):
    wrong = {number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}
    assert {number for number, _ in marked["wrong.py"]} == wrong, marked["wrong.py"]


def test_the_same_script_runs(installed_python: Path, tmp_path: Path):
    (tmp_path / "right.py").write_text(RIGHT)
    done = subprocess.run([str(installed_python), "right.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
