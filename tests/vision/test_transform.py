"""Each transform's pixels against torchvision's functional ones, with the numbers that were drawn; and what is
drawn.
"""

import math

import pytest
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as TF

from learnkit.data.random import Draws
from learnkit.vision import (
    brightness,
    contrast,
    cutout,
    flip_lr,
    normalize,
    rand_pad,
    rand_resize_crop,
    rotate,
    to_float,
    zoom,
)
from learnkit.vision.transform import accepted, per_sample

N = 32
BILINEAR = TF.InterpolationMode.BILINEAR


def pictures(*size: int, n: int = N) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *(size or (12, 16))), dtype=torch.uint8)


def draws(n: int = N, seed: int = 0, epoch: int = 0) -> Draws:
    return Draws(seed, epoch, torch.arange(n))


@pytest.mark.parametrize("mode, torchvisions", [("reflection", "reflect"), ("border", "edge"), ("zeros", "constant")])
def test_rand_pad_is_a_crop_of_the_padded_picture(mode, torchvisions):
    x = pictures()
    [crop] = rand_pad(3, (10, 14), mode)
    y, again = crop(x, draws()), draws()
    tops, lefts = again.integers(12 + 6 - 10 + 1).tolist(), again.integers(16 + 6 - 14 + 1).tolist()
    for i in range(N):
        assert torch.equal(y[i], TF.crop(TF.pad(x[i], [3], padding_mode=torchvisions), tops[i], lefts[i], 10, 14))


def test_rand_pad_takes_every_place_equally_often():
    [crop] = rand_pad(1, 4)
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(9000, -1, -1, -1)
    corners = crop(x, draws(9000))[:, 0, 1, 1].long().bincount(minlength=11)
    counts = corners[corners > 0]
    assert len(counts) == 9 and (counts - 1000).abs().max() < 4.5 * math.sqrt(1000)


def test_flip_lr_mirrors_half_of_the_pictures_bit_by_bit():
    x = pictures(4, 6, n=2000)
    y = flip_lr(p=0.5)(x, draws(2000))
    mirrored, same = (y == x.flip(3)).all(3).all(2).all(1), (y == x).all(3).all(2).all(1)
    assert (mirrored ^ same).all() and abs(mirrored.sum() - 1000) < 4.5 * math.sqrt(500)
    assert torch.equal(TF.horizontal_flip(x[0]), x[0].flip(2))


def test_alternating_flips_show_each_picture_both_ways_in_two_epochs():
    x, flip = pictures(4, 6, n=2000), flip_lr(alternating=True)
    first, second, third = (flip(x, draws(2000, epoch=epoch)) for epoch in range(3))
    assert torch.equal(second, first.flip(3)) and torch.equal(third, first)
    share = (first == x).all(3).all(2).all(1).float().mean()
    assert abs(share - 0.5) < 0.06


def test_cutout_erases_one_square_that_may_stick_out():
    x = torch.full((4000, 3, 10, 10), 255, dtype=torch.uint8)
    y, again = cutout(length=4, fill=0.2)(x, draws(4000)), draws(4000)
    again.chance(1)
    rows, columns = again.integers(10), again.integers(10)
    for i in range(20):
        top, left = int(rows[i]) - 2, int(columns[i]) - 2
        height, width = min(10, top + 4) - max(0, top), min(10, left + 4) - max(0, left)
        assert torch.equal(
            y[i], TF.erase(x[i], max(0, top), max(0, left), height, width, torch.tensor(51, dtype=torch.uint8))
        )
    share = (y[:, 0] == 51).float().mean()
    assert (
        abs(share - 0.36**2) < 0.004
    )  # of the 10 places of a centre, 7 cover 4 rows, 2 cover 3, and 1 covers 2: 3.6 of 10 on average


def test_cutout_happens_with_probability_p():
    y = cutout(length=2, p=0.25)(torch.ones(4000, 1, 8, 8), draws(4000))
    assert abs((y < 1).any(3).any(2).any(1).float().mean() - 0.25) < 0.04


def test_rotate_is_torchvisions():
    x = torch.rand(N, 3, 12, 16)
    y, again = rotate(30.0, mode="zeros")(x, draws()), draws()
    again.chance(1)
    angles = again.uniform(-30, 30)
    for i in range(N):
        torch.testing.assert_close(y[i], TF.rotate(x[i], angles[i].item(), interpolation=BILINEAR), atol=2e-5, rtol=0)
    assert angles.min() < -20 and angles.max() > 20


def test_zoom_is_torchvisions_affine_map():
    x = torch.rand(N, 3, 12, 16)
    y, again = zoom((0.7, 1.5), mode="zeros")(x, draws()), draws()
    again.chance(1)
    scales = again.uniform(0.7, 1.5)
    for i in range(N):
        wanted = TF.affine(
            x[i], angle=0, translate=[0, 0], scale=scales[i].item(), shear=[0, 0], interpolation=BILINEAR
        )
        torch.testing.assert_close(y[i], wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "transform",
    [
        rotate(20.0, p=0.0),
        zoom(1.5, p=0.0),
        brightness(0.5, p=0.0),
        contrast(0.5, p=0.0),
        flip_lr(0.0),
        cutout(4, p=0.0),
    ],
)
def test_what_does_not_happen_leaves_the_picture_as_it_is(transform):
    x = torch.rand(N, 3, 12, 16)
    torch.testing.assert_close(transform(x, draws()), x, atol=2e-6, rtol=0)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(12, 16), (40, 31)])
def test_rand_resize_crop_is_torchvisions_resized_crop(antialias, size):
    x = torch.rand(N, 3, *size)
    crop = rand_resize_crop((14, 13), antialias=antialias)
    y, boxes = crop(x, draws()), zip(*(part.tolist() for part in crop.boxes(x, draws())), strict=False)
    for i, box in enumerate(boxes):
        wanted = TF.resized_crop(x[i], *box, size=[14, 13], antialias=antialias)
        torch.testing.assert_close(y[i], wanted, atol=1e-5, rtol=0)


def test_rand_resize_crop_draws_boxes_as_torchvision_does():
    x, transform = torch.zeros(4000, 3, 40, 60), v2.RandomResizedCrop(8)
    ours = torch.stack([part.float() for part in rand_resize_crop(8).boxes(x, draws(4000))], 1)
    theirs = torch.tensor(
        [
            [d[k] for k in ("top", "left", "height", "width")]
            for d in (transform.make_params([x[0]]) for _ in range(4000))
        ]
    ).float()
    for k in range(4):
        spread = theirs[:, k].std() / math.sqrt(2000)
        assert abs(ours[:, k].mean() - theirs[:, k].mean()) < 4.5 * spread, k
        assert abs(ours[:, k].std() / theirs[:, k].std() - 1) < 0.08, k


def test_rand_resize_crop_of_a_picture_too_long_for_every_ratio_takes_the_middle():
    crop = rand_resize_crop(4, scale=(1.0, 1.0))
    assert [int(part[0]) for part in crop.boxes(torch.zeros(1, 3, 10, 100), draws(1))] == [0, 43, 10, 13]


@pytest.mark.parametrize(
    "transform, name", [(brightness((0.5, 1.6)), "adjust_brightness"), (contrast((0.5, 1.6)), "adjust_contrast")]
)
def test_colours_change_as_torchvisions_do(transform, name):
    x = torch.rand(N, 3, 12, 16)
    y, again = transform(x, draws()), draws()
    again.chance(1)
    factors = again.uniform(0.5, 1.6)
    for i in range(N):
        torch.testing.assert_close(y[i], getattr(TF, name)(x[i], factors[i].item()), atol=1e-6, rtol=0)


def test_normalize_is_torchvisions_on_uint8_and_on_floats():
    x, stats = pictures(), ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    wanted = TF.normalize(TF.to_dtype(x, torch.float32, scale=True), *stats)
    for own in (x, to_float(x)):
        torch.testing.assert_close(normalize(*stats)(own), wanted, atol=2e-6, rtol=0)
    torch.testing.assert_close(normalize(*stats).undo(wanted), to_float(x), atol=2e-6, rtol=0)


def test_a_transform_of_torchvision_is_random_per_sample_and_leaves_the_global_generator_alone():
    x, transform = pictures(), accepted(v2.RandomHorizontalFlip(0.5))
    assert isinstance(transform, per_sample)
    state = torch.get_rng_state()
    y, alone = transform(x, draws()), transform(x[5:6], Draws(0, 0, torch.tensor([5])))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(y[5:6], alone)
    flipped = (y == x.flip(3)).all(3).all(2).all(1)
    assert 4 < flipped.sum() < N - 4


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rand_pad(4, 32, "mirror"), r"mode='mirror': expected one of reflection, border, zeros"),
        (lambda: rand_pad(4, 0), r"size=0: expected an integer number of pixels, or \(height, width\)"),
        (
            lambda: rand_pad(4, 40)[0](pictures(), draws()),
            r"pictures of 12×16 with a padding of 4 are smaller than size=\(40, 40\)",
        ),
        (
            lambda: rand_pad(12, 8)[0](pictures(), draws()),
            r"padding=12 is too large to reflect pictures of 12×16: use mode='border'",
        ),
        (lambda: flip_lr(1.5), r"p=1.5: expected a probability"),
        (lambda: flip_lr(0.3, alternating=True), r"p=0.3 with alternating=True: expected p=0.5"),
        (lambda: cutout(0), r"length=0, n_holes=1: expected 1 or more"),
        (lambda: rotate((10.0, -10.0)), r"the range \(10.0, -10.0\) is empty"),
        (lambda: zoom((0.0, 1.0)), r"expected factors above 0"),
        (lambda: brightness(1.5), r"expected factors of 0 or more"),
        (lambda: rand_resize_crop(8, scale=(0.5, 0.1)), r"expected \(low, high\) with 0 < low <= high"),
        (lambda: normalize([0.5], [0.0]), r"standard deviations above 0"),
        (lambda: normalize([0.5], [0.1, 0.2]), r"expected equal lengths"),
    ],
)
def test_bad_arguments_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "what, message",
    [
        (v2.RandomHorizontalFlip, "is a class, expected an instance: write RandomHorizontalFlip"),
        (3, "3 is int, expected a transform"),
    ],
)
def test_what_is_no_transform_is_refused(what, message):
    with pytest.raises(TypeError, match=message):
        accepted(what)
