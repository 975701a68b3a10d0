"""Confusions, worst losses, accuracy by class, and augmentation while testing, against counts by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from learnkit import DataBunch, Learner
from learnkit.vision import ImageDataBunch, cifar_stats, flip_lr, interpret, rand_pad, tta


class Linear(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(3 * 8 * 8, n)

    def forward(self, x):
        return self.layer(x.flatten(1))


@pytest.fixture
def learn(folder) -> Learner:
    data = ImageDataBunch.from_folder(
        folder(classes=("ant", "bee", "cow"), n=10), bs=6, ds_tfms=([*rand_pad(1, 8), flip_lr()], [])
    ).normalize(cifar_stats)
    return Learner(data, Linear(3))


def test_the_matrix_is_torchmetrics_and_accuracy_by_class_its_diagonal(learn):
    seen = interpret(learn)
    preds, targets = learn.get_preds()
    wanted = multiclass_confusion_matrix(preds, targets, 3)
    assert torch.equal(seen.confusion_matrix(), wanted)
    assert seen.accuracy_per_class() == pytest.approx(
        {name: float(wanted[i, i] / 10) for i, name in enumerate(("ant", "bee", "cow"))}
    )
    pairs = seen.most_confused()
    assert sum(n for *_, n in pairs) == 30 - int(wanted.diagonal().sum()) and [n for *_, n in pairs] == sorted(
        (n for *_, n in pairs), reverse=True
    )
    assert seen.most_confused(least=99) == []


def test_top_losses_are_the_largest_with_their_files(learn):
    preds, targets = learn.get_preds()
    losses = F.cross_entropy(preds, targets, reduction="none")
    worst = interpret(learn).top_losses(4)
    assert [t.index for t in worst] == losses.topk(4).indices.tolist() and [t.loss for t in worst] == pytest.approx(
        losses.topk(4).values.tolist()
    )
    for t in worst:
        assert t.file == learn.data.pictures["valid"].files[t.index] and f"/{t.actual}/" in t.file
        assert (
            t.probability == pytest.approx(float(preds[t.index].softmax(0).max()))
            and t.predicted == ("ant", "bee", "cow")[preds[t.index].argmax()]
        )


def test_the_training_set_and_other_loaders_can_be_interpreted_too(learn):
    seen = interpret(learn, learn.data.train_dl)
    assert len(seen.targets) == 30 and seen.top_losses(1)[0].file in learn.data.pictures["train"].files
    plain = DataBunch.from_tensors(
        (torch.randn(12, 3, 8, 8), torch.arange(12) % 3), (torch.randn(9, 3, 8, 8), torch.arange(9) % 3), bs=4
    )
    other = interpret(Learner(plain, Linear(3)))
    assert (
        other.top_losses(2)[0].file is None
        and other.classes == ["0", "1", "2"]
        and len(other.plot_top_losses(4).axes) == 4
    )


@pytest.mark.parametrize("seed", [None, 4])
def test_pictures_are_those_that_the_model_saw_with_what_its_transforms_drew(learn, seed):
    seen, model = [], learn.model
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    learn.seed = learn.order_seed = seed
    shown = interpret(learn, learn.data.train_dl).pictures([7, 3, 29])
    torch.testing.assert_close(shown, learn.data.denormalize(torch.cat(seen)[[7, 3, 29]]))


def test_a_class_without_samples_has_no_accuracy(learn):
    seen = interpret(learn)
    seen.targets = seen.targets.clamp(max=1)
    assert math.isnan(seen.accuracy_per_class()["cow"])


def test_what_is_no_classification_is_refused():
    data = DataBunch.from_tensors((torch.randn(8, 2), torch.randn(8)), (torch.randn(8, 2), torch.randn(8)), bs=4)
    with pytest.raises(TypeError, match="interpret is for classification: expected predictions"):
        interpret(Learner(data, nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))))


def test_plots_show_the_pictures_with_what_they_were_taken_for(learn, tmp_path):
    seen = interpret(learn)
    figure = seen.plot_top_losses(5, columns=3)
    worst = seen.top_losses(5)
    assert [ax.get_title() for ax in figure.axes[:5]] == [
        f"{t.predicted} {t.probability:.0%}\nactual: {t.actual}, loss {t.loss:.2f}" for t in worst
    ]
    for ax, t in zip(figure.axes, worst, strict=False):
        torch.testing.assert_close(
            torch.as_tensor(ax.images[0].get_array()).permute(2, 0, 1).float(),
            learn.data.pictures["valid"].pixels[t.index] / 255,
            atol=1e-6,
            rtol=0,
        )
    assert len(seen.show_results(2, 4).axes) == 8
    [ax] = seen.plot_confusion_matrix().axes
    assert sum(int(text.get_text()) for text in ax.texts) == 30
    seen.plot_confusion_matrix(normalize=True).savefig(tmp_path / "matrix.png")


def test_tta_with_one_mirror_image_is_the_mean_of_both(learn):
    x = torch.cat([xb for xb, _ in learn.data.valid_dl])
    with torch.no_grad():
        plain, mirrored = (learn.model(v).softmax(1) for v in (x, x.flip(3)))
    preds, targets = tta(learn, tfms=[flip_lr(p=1)], n=1, beta=0.3)
    torch.testing.assert_close(preds, 0.3 * plain + 0.7 * mirrored)
    assert targets.tolist() == [0] * 10 + [1] * 10 + [2] * 10


def test_tta_draws_each_version_anew_and_the_same_each_time(learn):
    one, four = tta(learn, n=1, beta=0)[0], tta(learn, n=4, beta=0)[0]
    assert not torch.allclose(one, four) and torch.equal(tta(learn, n=4, beta=0)[0], four)
    torch.testing.assert_close(four.sum(1), torch.ones(30))
    assert torch.equal(learn.get_preds()[0], learn.get_preds()[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 0}, "n=0, beta=0.5: expected n of 1 or more"),
        ({"beta": 2}, "beta from 0 to 1"),
        ({"tfms": []}, "no transforms to augment with"),
    ],
)
def test_tta_says_what_it_needs(learn, options, message):
    with pytest.raises(ValueError, match=message):
        tta(learn, **options)
