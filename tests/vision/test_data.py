"""ImageDataBunch: normalized, shown, made of datasets, and the same pictures at every world size and after a resume."""

import warnings
from contextlib import suppress

import pytest
import torch
import torchvision.transforms.v2 as v2
from torch import nn
from torchvision.datasets import FakeData, ImageFolder

from learnkit import Callback, Learner
from learnkit.callbacks import Checkpoint
from learnkit.data.loaders import TensorLoader
from learnkit.distributed import launch
from learnkit.vision import ImageDataBunch, cifar_stats, cutout, flip_lr, imagenet_stats, mnist_stats, rand_pad, rotate
from learnkit.vision import data as data_module
from learnkit.vision.samples import SampleLoader
from tests.vision.conftest import make_folder


def tfms() -> tuple[list, list]:
    return [*rand_pad(2, 8), flip_lr(), rotate(20.0), cutout(3)], []


def net(n_classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, n_classes))


class See(Callback):
    """Keeps every training batch; breaks off after step `stop_at`."""

    def __init__(self, stop_at: int | None = None):
        self.seen, self.stop_at = [], stop_at

    def before_batch(self, learn):
        if learn.training:
            self.seen.append((learn.epoch, learn.inputs[0].clone(), learn.target.clone()))

    def after_step(self, learn):
        if self.stop_at is not None and learn.step >= self.stop_at:
            raise InterruptedError


def test_batches_are_normalized_floats_and_one_batch_moves_nothing_on(folder):
    path = folder()
    plain, normal = (
        ImageDataBunch.from_folder(path, bs=4),
        ImageDataBunch.from_folder(path, bs=4).normalize(cifar_stats),
    )
    (x, y), (z, _) = plain.one_batch(), normal.one_batch()
    assert (
        x.dtype == torch.float32
        and x.shape == (4, 3, 8, 8)
        and x.min() >= 0
        and x.max() <= 1
        and y.dtype == torch.int64
    )
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in cifar_stats)
    torch.testing.assert_close(z, (x - mean) / std)
    torch.testing.assert_close(normal.denormalize(z), x)
    assert torch.equal(plain.one_batch()[0], x)


def test_measured_statistics_bring_the_training_pictures_to_mean_0_and_deviation_1(folder):
    data = ImageDataBunch.from_folder(folder(), bs=12).normalize()
    x = data.one_batch()[0].double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)


def test_statistics_of_one_channel_suit_grey_pictures_and_wrong_ones_are_refused(folder):
    path = folder()
    assert ImageDataBunch.from_folder(path, bs=4, n_channels=1).normalize(mnist_stats).one_batch()[0].shape == (
        4,
        1,
        8,
        8,
    )
    grey = ImageDataBunch.from_folder(path, bs=4, n_channels=1)
    with pytest.raises(ValueError, match="the statistics have 3 channels, the pictures have 1"):
        grey.normalize(imagenet_stats)
    with pytest.raises(ValueError, match=r"is already normalized, with .*Call normalize only once"):
        grey.normalize(mnist_stats).normalize(mnist_stats)


def test_validation_pictures_are_plain_in_order_and_complete(folder):
    data = ImageDataBunch.from_folder(folder(n=5), bs=4, ds_tfms=tfms())
    x, y = (torch.cat(part) for part in zip(*data.valid_dl, strict=False))
    assert torch.equal(x, data.pictures["valid"].pixels.float().mul_(1 / 255)) and y.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_epoch_has_the_same_pictures_at_every_world_size(folder, world_size):
    path = folder(n=12)

    def epochs(bs, rank=0, world=1):
        loader = ImageDataBunch.from_folder(path, valid=None, bs=bs, ds_tfms=tfms(), seed=4).train_dl.sharded(
            rank, world, even=True
        )
        return [list(loader) for _ in range(2)]

    whole, shares = epochs(6), [epochs(6 // world_size, rank, world_size) for rank in range(world_size)]
    for e in range(2):
        for k, (x, y) in enumerate(whole[e]):
            assert torch.equal(torch.cat([share[e][k][0] for share in shares]), x) and torch.equal(
                torch.cat([share[e][k][1] for share in shares]), y
            )
    assert not torch.equal(whole[0][0][0], whole[1][0][0])


@pytest.mark.parametrize("streamed", [False, True], ids=["held", "streamed"])
def test_after_a_resume_the_pictures_are_those_of_a_fit_that_was_never_stopped(folder, tmp_path, streamed):
    path = folder(n=12)

    def fit(*callbacks, **options):
        data = ImageDataBunch.from_folder(path, bs=4, ds_tfms=tfms(), seed=1)
        if streamed:
            data = ImageDataBunch.from_dataset(
                ImageFolder(path / "train", v2.Compose([v2.PILToTensor(), v2.RandomHorizontalFlip()])),
                bs=4,
                ds_tfms=tfms(),
                seed=1,
                num_workers=0,
            )
        see = See(options.pop("stop_at", None))
        learn = Learner(data, net(), callbacks=[see, *callbacks], seed=1)
        with learn.no_logging(), suppress(InterruptedError):
            learn.fit(3, 1e-2, **options)
        return see.seen

    whole = fit()
    begun = fit(Checkpoint(tmp_path / "runs", every_n_steps=4), stop_at=10)
    rest = fit(Checkpoint(tmp_path / "runs", every_n_steps=4), resume=True)
    assert len(whole) == 18 and len(begun) == 10 and len(rest) == 10
    for (e, x, y), (f, u, v) in zip([*begun[:8], *rest], whole, strict=True):
        assert e == f and torch.equal(x, u) and torch.equal(y, v)


def test_a_transform_that_asks_for_nothing_still_gets_the_batch(folder):
    data = ImageDataBunch.from_folder(folder(), bs=4, ds_tfms=([lambda x: x.flip(3)], []))
    plain = ImageDataBunch.from_folder(data.pictures["train"].files[0].split("/train")[0], bs=4)
    assert torch.equal(data.one_batch()[0], plain.one_batch()[0].flip(3))


@pytest.mark.parametrize(
    "bad, message",
    [
        (flip_lr(), "expected a pair of lists"),
        (([flip_lr], []), "flip_lr is a class, expected an instance"),
        ([3], "3 is int, expected a transform"),
    ],
)
def test_transforms_that_are_none_are_refused(folder, bad, message):
    with pytest.raises(TypeError, match=message):
        ImageDataBunch.from_folder(folder(), bs=4, ds_tfms=bad)


# --- held, mapped or streamed ------------------------------------------------
def test_pictures_that_do_not_fit_are_cut_ahead_by_a_thread_and_are_the_same(folder, monkeypatch):
    path = folder()
    held = ImageDataBunch.from_folder(path, bs=4, ds_tfms=tfms(), seed=1)
    monkeypatch.setattr(data_module, "fits", lambda n_bytes, device: False)
    mapped = ImageDataBunch.from_folder(path, bs=4, ds_tfms=tfms(), seed=1)
    assert (held.train_dl.n_ahead, mapped.train_dl.n_ahead) == (0, 3)
    for a, b in zip(held.train_dl, mapped.train_dl, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    away = ImageDataBunch.from_folder(path, bs=4, device="meta")
    assert away.train_dl.tensors[0].device.type == "cpu" and next(iter(away.train_dl))[0].device.type == "meta"


def test_half_of_the_free_memory_is_the_bound(monkeypatch):
    monkeypatch.setattr(data_module, "free_memory", lambda: 1000)
    assert data_module.fits(500, torch.device("cpu")) and not data_module.fits(501, torch.device("cpu"))


# --- datasets ----------------------------------------------------------------
def test_a_plain_dataset_of_torchvisions_is_decoded_once_and_equals_the_folder(folder):
    path = folder()
    with_folder = ImageDataBunch.from_folder(path, bs=4, seed=1)
    with_dataset = ImageDataBunch.from_dataset(
        ImageFolder(path / "train"), ImageFolder(path / "valid"), bs=4, seed=1, num_workers=0
    )
    assert isinstance(with_dataset.train_dl, TensorLoader) and with_dataset.classes == with_folder.classes
    for a, b in zip(
        [*with_folder.train_dl, *with_folder.valid_dl], [*with_dataset.train_dl, *with_dataset.valid_dl], strict=True
    ):
        assert torch.equal(a[0], b[0])


def test_a_dataset_of_unequal_pictures_says_what_to_do(folder, tmp_path):
    path = folder(n=2)
    make_folder(tmp_path / "other", n=1, size=(9, 9), parts=("train",))
    (tmp_path / "other/train/cat/0.png").rename(path / "train/cat/9.png")
    with pytest.raises(ValueError, match="the pictures of ImageFolder differ in size: give it a transform"):
        ImageDataBunch.from_dataset(ImageFolder(path / "train"), bs=2, num_workers=0)


def random_dataset() -> FakeData:
    return FakeData(
        24,
        (3, 10, 10),
        3,
        transform=v2.Compose(
            [v2.RandomResizedCrop(8), v2.ToImage(), v2.ColorJitter(0.3), v2.ToDtype(torch.float32, scale=True)]
        ),
    )


def batches(n_workers: int, **options):
    return ImageDataBunch.from_dataset(random_dataset(), bs=6, seed=3, num_workers=n_workers, **options).train_dl


def test_random_datasets_give_the_same_pictures_with_any_number_of_workers_and_leave_the_generators_alone():
    state = torch.get_rng_state()
    alone = list(batches(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of forks
        workers = list(batches(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    again = batches(0)
    assert torch.equal(next(iter(again))[0], alone[0][0]) and not torch.equal(next(iter(again))[0], alone[0][0]), (
        "the second epoch draws anew"
    )


def test_batch_transforms_and_normalize_apply_to_datasets_too():
    plain = next(iter(batches(0)))[0]
    flipped = next(iter(batches(0, ds_tfms=([flip_lr(p=1)], []))))[0]
    assert torch.equal(flipped, plain.flip(3))
    data = ImageDataBunch.from_dataset(random_dataset(), bs=6, seed=3, num_workers=0).normalize(cifar_stats)
    torch.testing.assert_close(data.denormalize(data.one_batch()[0]), plain.clamp(0, 1))
    with pytest.raises(ValueError, match="are not in memory, so they cannot be measured"):
        ImageDataBunch.from_dataset(random_dataset(), bs=6, num_workers=0).normalize()


def test_a_random_dataset_trains_and_validates_in_order(tmp_path):
    data = ImageDataBunch.from_dataset(random_dataset(), random_dataset(), bs=6, seed=3, num_workers=0)
    learn = Learner(data, net(3), seed=1)
    with learn.no_logging():
        learn.fit(1, 1e-2)
    _, targets = learn.get_preds(data.train_dl)
    assert targets.tolist() == [random_dataset()[i][1] for i in range(24)]
    assert isinstance(data.train_dl, SampleLoader)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_training_pictures_of_a_dataset_are_evaluated_in_order_and_all_of_them(world_size):
    def fn():
        data = ImageDataBunch.from_dataset(FakeData(9, (3, 8, 8), 2), bs=4, num_workers=0)
        learn = Learner(data, net()).to_distributed()
        with learn.no_logging():
            return learn.get_preds(data.train_dl)[1].tolist()

    assert launch(fn, world_size) == [int(FakeData(9, (3, 8, 8), 2)[i][1]) for i in range(9)]


def test_the_grid_of_a_batch_shows_pictures_and_names(folder):
    data = ImageDataBunch.from_folder(folder(), bs=8, ds_tfms=tfms()).normalize(cifar_stats)
    figure = data.show_batch(2, 4)
    assert len(figure.axes) == 8 and {ax.get_title() for ax in figure.axes} <= {"cat", "dog"}
    x, _y = data.one_batch()
    shown = torch.as_tensor(figure.axes[0].images[0].get_array())
    torch.testing.assert_close(shown.permute(2, 0, 1).float(), data.denormalize(x)[0])
