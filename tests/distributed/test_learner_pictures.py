"""Pictures on two ranks: decoded by one, the same ones as on one process, interpreted and augmented alike; MixUp and
its kin.
"""

import os
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2 as v2
from torch import nn
from torchvision.datasets import FakeData

from learnkit import Callback, Learner
from learnkit.callbacks import CutMix, LabelSmoothing, MixUp
from learnkit.distributed import get_world_size
from learnkit.vision import ImageDataBunch, cifar_stats, cutout, flip_lr, interpret, pictures, rand_pad, rotate, tta
from tests.vision.conftest import make_folder

WORLDS = (1, 2)


class See(Callback):
    def __init__(self):
        self.seen, self.losses = [], []

    def before_batch(self, learn):
        if learn.training:
            self.seen.append(learn.inputs[0].clone())

    def after_forward(self, learn):
        if learn.training:
            self.losses.append(learn.loss.item())


def learner(data: ImageDataBunch, *callbacks: Callback) -> Learner:
    torch.manual_seed(5)
    n_classes = len(data.classes) if data.classes else 3
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, n_classes)
    ).double()
    return Learner(data, model, callbacks=callbacks, seed=1).to_distributed()


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.double()


def held(path: str) -> ImageDataBunch:
    tfms = [*rand_pad(2, 8), flip_lr(), rotate(20.0), cutout(3)]
    data = ImageDataBunch.from_folder(path, bs=8 // get_world_size(), ds_tfms=(tfms, []), seed=1).normalize(cifar_stats)
    for loader in (data.train_dl, data.valid_dl):
        loader.batch_tfms = (*loader.batch_tfms, doubled)
    return data


def fit(path: str, *callbacks: type[Callback]) -> dict:
    n_decoded, original = [], pictures.decode_all

    def count(*arguments, **options):
        n_decoded.append(1)
        return original(*arguments, **options)

    pictures.decode_all = count
    try:
        learn = learner(held(path), see := See(), *(make() for make in callbacks))
    finally:
        pictures.decode_all = original
    with learn.no_logging():
        learn.fit(2, 1e-2)
    seen = interpret(learn)
    preds, targets = tta(learn, tfms=[flip_lr(p=1)], n=2)
    return {
        "seen": see.seen,
        "losses": see.losses,
        "n_decoded": len(n_decoded),
        "matrix": seen.confusion_matrix(),
        "worst": seen.top_losses(3),
        "tta": preds,
        "targets": targets,
        "weights": [p.detach().clone() for p in learn.model.parameters()],
        "values": learn.validate(),
    }


def test_two_ranks_see_the_pictures_of_one_and_interpret_alike(ranks, tmp_path, monkeypatch):
    path = make_folder(tmp_path / "data", n=15)
    results = {}
    for world in WORLDS:
        monkeypatch.setenv("LEARNKIT_CACHE", str(tmp_path / f"cache{world}"))
        results[world] = ranks(world, fit, str(path))
    [alone], both = results[1], results[2]
    assert [r["n_decoded"] for r in both] == [2, 0], "not decoded by the first rank alone"
    for k, x in enumerate(alone["seen"]):
        assert torch.equal(torch.cat([r["seen"][k] for r in both]), x)
    for r in both:
        assert (
            torch.equal(r["matrix"], alone["matrix"])
            and r["targets"].tolist() == alone["targets"].tolist() == [0] * 15 + [1] * 15
        )
        assert [(t.index, t.file) for t in r["worst"]] == [(t.index, t.file) for t in alone["worst"]]
        torch.testing.assert_close(r["tta"], alone["tta"])
        for a, b in zip(r["weights"], alone["weights"], strict=True):
            torch.testing.assert_close(a, b)


def fit_dataset() -> list[torch.Tensor]:
    transform = v2.Compose([v2.RandomResizedCrop(8), v2.ToImage(), v2.ToDtype(torch.float64, scale=True)])
    data = ImageDataBunch.from_dataset(
        FakeData(32, (3, 10, 10), 3, transform=transform),
        bs=8 // get_world_size(),
        seed=2,
        num_workers=0,
        ds_tfms=([flip_lr()], []),
    )
    learn = learner(data, see := See())
    with learn.no_logging():
        learn.fit(2, 1e-2)
    return see.seen


def test_samples_of_a_random_dataset_are_the_same_at_both_world_sizes(ranks):
    [alone], both = (ranks(world, fit_dataset) for world in WORLDS)
    for k, x in enumerate(alone):
        assert torch.equal(torch.cat([r[k] for r in both]), x)


@pytest.mark.parametrize("kind", [MixUp, CutMix, LabelSmoothing])
def test_losses_that_are_mixed_or_smoothed_train_two_ranks_alike(ranks, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("LEARNKIT_CACHE", str(tmp_path / "cache"))
    path = make_folder(tmp_path / "data", n=15)
    first, second = ranks(2, fit, str(path), kind)
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    assert first["values"] == second["values"]
    if kind is LabelSmoothing:  # which draws nothing: two ranks are as one
        [alone] = ranks(1, fit, str(path), kind)
        for a, b in zip(alone["weights"], first["weights"], strict=True):
            torch.testing.assert_close(a, b)


def fail_on_rank_0(path: str) -> str:
    try:
        ImageDataBunch.from_folder(path, bs=2)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def test_a_damaged_picture_is_named_on_every_rank(ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("LEARNKIT_CACHE", str(tmp_path / "cache"))
    path = make_folder(tmp_path / "data")
    (path / "train/cat/0.png").write_bytes(b"")
    assert all(
        "1 of 12 pictures" in text and "cat/0.png: it is empty" in text for text in ranks(2, fail_on_rank_0, str(path))
    )
    assert os.path.exists(Path(path) / "train/cat/0.png")
