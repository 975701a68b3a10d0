"""A path that begins with `~` is one in the home folder, wherever a path can be given; nothing makes a folder of that
name.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from learnkit import DataBunch, Learner, accuracy
from learnkit.callbacks import Checkpoint, CSVLogger, JSONLogger, Profile, SaveBest, TensorBoardLogger
from learnkit.export.predictor import load_learner
from learnkit.vision import ImageDataBunch, untar_data, vision_learner


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for name in ("LEARNKIT_CACHE", "LEARNKIT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def learner(*callbacks: Any, **options: Any) -> Learner:
    x = torch.randn(16, 2)
    data = DataBunch.from_tensors((x, (x[:, 0] > 0).long()), (x, (x[:, 0] > 0).long()), bs=4)
    return Learner(data, nn.Linear(2, 2), metrics=accuracy, callbacks=callbacks, **options)


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.Linear(4, 2))


def saved_weights() -> None:
    torch.save(model().state_dict(), Path("~/w.pt").expanduser())


def fitted(*callbacks: Any) -> None:
    learner(*callbacks).fit(1)


def loaded() -> None:
    learn = learner()
    learn.export("~/there.safetensors")
    load_learner("~/there.safetensors", model=nn.Linear(2, 2))


def archived() -> None:
    shutil.make_archive(str(Path("~/set").expanduser()), "gztar", Path("~/pictures").expanduser())
    from learnkit.vision import URLs

    untar_data(URLs.CIFAR, "~/data", archive="~/set.tar.gz")


USES: dict[str, tuple[Callable[[], Any], str]] = {  # and a file or folder that it makes
    "Checkpoint": (lambda: fitted(Checkpoint("~/kept")), "kept"),
    "CSVLogger": (lambda: fitted(CSVLogger("~/log.csv")), "log.csv"),
    "JSONLogger": (lambda: fitted(JSONLogger("~/log.jsonl")), "log.jsonl"),
    "Profile": (lambda: fitted(Profile("~/t.json", n_steps=1, skip=1)), "t.json"),
    "TensorBoardLogger": (lambda: fitted(TensorBoardLogger("~/runs")), "runs"),
    "SaveBest": (lambda: fitted(SaveBest(name="~/good")), "good.pt"),
    "path": (lambda: learner(path="~/mine").save("m"), "mine/models/m.pt"),
    "model_dir": (lambda: learner(model_dir="~/all").save("m"), "all/m.pt"),
    "save": (lambda: learner().save("~/m"), "m.pt"),
    "to_csv": (lambda: learner().fit(1).recorder.to_csv("~/r.csv"), "r.csv"),
    "export": (loaded, "there.safetensors"),
    "from_folder": (lambda: ImageDataBunch.from_folder("~/pictures", bs=2, cache="~/cache"), "cache"),
    "vision_learner": (
        lambda: vision_learner(
            ImageDataBunch.from_folder("~/pictures", bs=2, cache=None), model, pretrained="~/w.pt", path="~/vision"
        ).save("v"),
        "vision/models/v.pt",
    ),
    "untar_data": (archived, "data"),
}


@pytest.mark.parametrize("use", USES)
def test_a_tilde_is_the_home_folder(home: Path, use: str):
    for part in ("train", "valid"):
        for name in ("ant", "bee"):
            (home / "pictures" / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (i * 60, 9, 9)).save(home / "pictures" / part / name / f"{i}.png")
    saved_weights()
    act, made = USES[use]
    act()
    assert (home / made).exists() and not list(home.parent.rglob("~*"))


def test_environment_variables_too(home: Path, monkeypatch: pytest.MonkeyPatch):
    (home / "sets" / "train").mkdir(parents=True)
    monkeypatch.setenv("LEARNKIT_DATA", "~/sets")
    from learnkit.vision import URLs

    assert untar_data(URLs.CIFAR) == home / "sets"


def test_load_finds_what_save_wrote(home: Path):
    learn = learner(path="~/mine")
    learn.save("~/m")
    assert learn.load("~/m") is learn and learner(path="~/mine").path == home / "mine"
