"""What a user sees of an error in code of their own: their frames, hardly any of the package's, and the place once."""

import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import learnkit
from learnkit import Callback, DataBunch, Learner

OURS = (str(Path(learnkit.__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "callbacks"))


class Fails(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook

    def fail(self, hook: str) -> None:
        if hook == self.hook:
            raise LookupError("of the user")

    def before_fit(self, learn: Learner) -> None:
        self.fail("before_fit")

    def around_batch(self, learn, run) -> None:
        run()
        self.fail("around_batch")

    def after_step(self, learn: Learner) -> None:
        self.fail("after_step")

    def after_validate(self, learn: Learner) -> None:
        self.fail("after_validate")

    def after_epoch(self, learn: Learner) -> None:
        self.fail("after_epoch")


class Picky(nn.Linear):
    broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise LookupError("of the user")
        return super().forward(x)


def loss_of_mine(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    raise LookupError("of the user")


def learner(*callbacks: Callback, **options) -> Learner:
    data = DataBunch.from_tensors(
        (torch.randn(8, 4), torch.randint(2, (8,))), (torch.randn(4, 4), torch.zeros(4).long()), bs=4
    )
    return Learner(data, Picky(4, 2), callbacks=callbacks, **options)


def frames_of(error: BaseException) -> tuple[list[str], list[str]]:
    """The names of the functions in the traceback: this package's, and all others."""
    frames = [f.f_code for f, _ in traceback.walk_tb(error.__traceback__)]
    ours = [code.co_name for code in frames if code.co_filename.startswith(OURS)]
    return ours, [code.co_name for code in frames if not code.co_filename.startswith(OURS)]


@pytest.mark.parametrize("hook", ["before_fit", "around_batch", "after_step", "after_validate", "after_epoch"])
def test_an_error_in_a_hook_shows_the_users_frames_and_one_note(hook):
    with pytest.raises(LookupError) as caught:
        learner(Fails(hook)).fit_one_cycle(1)
    ours, others = frames_of(caught.value)
    around = ["around_batch"] if hook == "after_step" else []
    assert len(ours) <= 3 and others == [
        "test_an_error_in_a_hook_shows_the_users_frames_and_one_note",
        *around,
        hook,
        "fail",
    ]
    [note] = caught.value.__notes__
    assert note.startswith(f"learnkit: raised in Fails.{hook}, epoch 0")


@pytest.mark.parametrize(
    "call", ["fit", "validate", "get_preds", "lr_find", "fast_run", "fine_tune", "predict", "summary"]
)
def test_an_error_in_the_model_shows_at_most_three_frames_of_the_package_from_every_method(call):
    learn = learner()
    learn.model.broken = True
    arguments = {"fit": [1], "fine_tune": [1, None, 0], "predict": [torch.randn(1, 4)]}.get(call, [])
    with pytest.raises(LookupError) as caught:
        getattr(learn, call)(*arguments)
    ours, others = frames_of(caught.value)
    assert len(ours) <= 3, ours
    assert others[-1] == "forward"


def test_an_error_in_a_loss_shows_the_loss():
    with pytest.raises(LookupError) as caught:
        learner(loss_func=loss_of_mine).fit(1)
    ours, others = frames_of(caught.value)
    assert len(ours) <= 3 and others[-1] == "loss_of_mine"


def test_an_error_of_the_package_keeps_the_frame_that_raised_it():
    learn = learner()
    learn.data.train_dl = [(torch.randn(4, 4), torch.full((4,), 7))]
    with pytest.raises(ValueError, match="class") as caught:
        learn.fit(1)
    ours, _ = frames_of(caught.value)
    assert 1 <= len(ours) <= 3


def test_all_frames_are_there_where_the_environment_asks_for_them(monkeypatch):
    monkeypatch.setenv("LEARNKIT_FULL_TRACEBACK", "1")
    with pytest.raises(LookupError) as caught:
        learner(Fails("after_step")).fit(1)
    ours, _ = frames_of(caught.value)
    assert {"_fit", "_epoch", "_train", "_batch"} <= set(ours)


SCRIPT = """\
from learnkit import *
from learnkit.distributed import *

class Fails(Callback):
    def after_step(self, learn):
        if learn.rank == learn.world_size - 1:
            raise LookupError("of the user")

init_process_group(seed=0)
x = torch.randn(16, 4)
data = DataBunch.from_tensors((x, (x[:, 0] > 0).long()), bs=4)
Learner(data, torch.nn.Linear(4, 2), callbacks=Fails()).to_distributed(get_local_rank()).fit(1)
"""


def test_a_script_prints_the_error_the_place_and_nothing_twice(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[1])
    ended = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.count("of the user") == 2  # the line of the script and the error itself
    assert ended.stderr.count("epoch 0, training batch 0") == 1
    assert ended.stderr.count('File "') <= 5
