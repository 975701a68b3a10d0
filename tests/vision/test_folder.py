"""Folders as people have them: grey, transparent, damaged, oddly named, linked, few, uneven."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from learnkit.vision import ImageDataBunch
from learnkit.vision.decode import FEW
from tests.vision.conftest import picture


def shown(data: ImageDataBunch, use: str = "train") -> dict[str, torch.Tensor]:
    held = data.pictures[use]
    return {Path(file).name: pixels for file, pixels in zip(held.files, held.pixels, strict=True)}


def test_pixels_classes_and_order_are_those_of_torchvisions_image_folder(folder):
    path = folder(n=5, classes=("b", "a", "c"))
    data = ImageDataBunch.from_folder(path, bs=4)
    for use in ("train", "valid"):
        theirs, ours = ImageFolder(path / use), data.pictures[use]
        assert data.classes == theirs.classes and ours.files == [file for file, _ in theirs.samples]
        assert ours.labels.tolist() == theirs.targets
        assert torch.equal(ours.pixels, torch.stack([pil_to_tensor(x) for x, _ in theirs]))


def test_many_pictures_are_decoded_by_processes_into_the_same_pixels(folder):
    path = folder(n=FEW // 2 + 10, size=(4, 5))
    data, theirs = ImageDataBunch.from_folder(path, valid=None), ImageFolder(path / "train")
    assert len(theirs) > FEW and torch.equal(
        data.pictures["train"].pixels, torch.stack([pil_to_tensor(x) for x, _ in theirs])
    )


MODES = {
    "grey.png": "L",
    "transparent.png": "RGBA",
    "palette.png": "P",
    "grey_alpha.png": "LA",
    "bits.png": "1",
    "deep.tif": "I;16",
    "cmyk.jpg": "CMYK",
}


def test_pictures_of_every_mode_become_rgb_as_pillow_makes_them(folder):
    path = folder()
    for name, mode in MODES.items():
        image = (
            picture(1, mode="L").convert("P")
            if mode == "P"
            else picture(1, mode="L").convert("1")
            if mode == "1"
            else picture(1, mode=mode)
        )
        image.save(path / "train/cat" / name)
    pixels = shown(ImageDataBunch.from_folder(path, bs=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODES:
            assert torch.equal(pixels[name], pil_to_tensor(Image.open(path / "train/cat" / name).convert("RGB"))), name


def test_grey_pictures_have_one_channel_when_asked_for(folder):
    path = folder()
    data = ImageDataBunch.from_folder(path, n_channels=1, bs=2)
    assert data.one_batch()[0].shape == (2, 1, 8, 8)
    assert torch.equal(shown(data)["0.png"], pil_to_tensor(Image.open(path / "train/dog/0.png").convert("L")))


def damaged(path: Path) -> None:
    whole = (path / "train/cat/0.png").read_bytes()
    (path / "train/cat/a_truncated.png").write_bytes(whole[:60])
    (path / "train/cat/b_empty.jpg").write_bytes(b"")
    (path / "train/dog/c_text.jpg").write_text("<html>not found</html>")
    os.symlink("nowhere.png", path / "train/dog/d_link.png")


def test_damaged_pictures_are_all_named_in_the_error(folder):
    damaged(path := folder())
    with pytest.raises(ValueError, match=r"4 of 16 pictures of .*train cannot be read") as caught:
        ImageDataBunch.from_folder(path)
    for part in (
        "cat/a_truncated.png: ",
        "cat/b_empty.jpg: it is empty",
        "dog/c_text.jpg: cannot identify image file it",
        "dog/d_link.png: it is a link to a file that does not exist",
        "on_error='skip'",
    ):
        assert part in str(caught.value)


def test_damaged_pictures_are_left_out_with_a_warning_when_asked_for_also_from_the_cache(folder):
    path = folder()
    clean = ImageDataBunch.from_folder(path, bs=2).pictures["train"]
    damaged(path)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"4 of 16 pictures .*a_truncated.png.* They are skipped"):
            data = ImageDataBunch.from_folder(path, on_error="skip", bs=2)
        held = data.pictures["train"]
        assert (
            torch.equal(held.pixels, clean.pixels)
            and torch.equal(held.labels, clean.labels)
            and held.files == clean.files
        )


def test_a_repaired_picture_is_seen_again(folder):
    path = folder()
    (path / "train/cat/z.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 13"):
        ImageDataBunch.from_folder(path, on_error="skip", bs=2)
    picture(5).save(path / "train/cat/z.png")
    assert torch.equal(shown(ImageDataBunch.from_folder(path, bs=2))["z.png"], pil_to_tensor(picture(5)))


def test_where_all_pictures_are_damaged_none_is_left(folder):
    path = folder(n=2)
    for file in (path / "train").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 4 pictures of .*train can be read"):
        ImageDataBunch.from_folder(path, on_error="skip", bs=2)
    with pytest.raises(ValueError, match=r"4 of 4 pictures .* No picture is left"):
        ImageDataBunch.from_folder(path, on_error="skip", size=8)


def test_odd_names_are_names_like_others(folder):
    path = folder(n=1)
    odd = [
        "with space.PNG",
        "ünïcödé 猫.png",
        "a'b\"c.png",
        "-rf.png",
        "new\nline.png",
        os.fsdecode(b"not-utf8-\xff.png"),
    ]
    for i, name in enumerate(odd):
        (
            picture(50 + i).save(path / "train/cat/one.png"),
            os.rename(path / "train/cat/one.png", path / "train/cat" / name),
        )
    (path / "train/cat/.hidden.png").write_bytes(b"")
    (path / "train/cat/notes.txt").write_text("passed over")
    (path / "train/.ipynb_checkpoints").mkdir()
    pixels = shown(ImageDataBunch.from_folder(path, bs=2))
    assert set(pixels) == {*odd, "0.png"}
    for i, name in enumerate(odd):
        assert torch.equal(pixels[name], pil_to_tensor(picture(50 + i)))


def test_links_to_pictures_and_folders_are_followed_and_circles_end(folder, tmp_path):
    path = folder(n=3)
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    picture(9).save(tmp_path / "elsewhere/deep/far.png")
    os.symlink(tmp_path / "elsewhere", path / "train/cat/linked")
    os.symlink(path / "train/dog/1.png", path / "train/cat/near.png")
    os.symlink(path / "train/cat", tmp_path / "elsewhere/circle")
    pixels = shown(ImageDataBunch.from_folder(path, bs=2))
    assert torch.equal(pixels["far.png"], pil_to_tensor(picture(9))) and torch.equal(
        pixels["near.png"], pil_to_tensor(Image.open(path / "train/dog/1.png"))
    )
    assert len(ImageDataBunch.from_folder(path, bs=2).pictures["train"]) == 3 + 3 + 2


def test_one_class_and_unequal_classes_are_taken_as_they_are(folder, tmp_path):
    assert ImageDataBunch.from_folder(folder(classes=("only",)), bs=2).classes == ["only"]
    path = tmp_path / "data"
    for i in range(9):
        (path / "train/rare").mkdir(exist_ok=True), picture(i).save(path / f"train/rare/{i}.png") if i < 1 else None
    data = ImageDataBunch.from_folder(path, bs=2)
    assert data.pictures["train"].labels.bincount().tolist() == [6, 1] and data.classes == ["only", "rare"]


def test_ten_pictures_are_enough_and_a_batch_size_too_large_for_them_says_so(folder):
    path = folder(n=5)
    assert len(ImageDataBunch.from_folder(path, bs=10).train_dl) == 1
    with pytest.raises(
        ValueError, match=r"train_dl is empty: its 10 samples are fewer than the batch size 64.*Take bs=10 or less"
    ):
        ImageDataBunch.from_folder(path)


def test_unequal_sizes_need_a_size_and_are_resized_as_torchvision_does(folder):
    path = folder(n=2, size=(20, 20))
    sizes = {"wide.png": (20, 31), "high.png": (50, 20), "small.png": (7, 9)}
    for i, (name, size) in enumerate(sizes.items()):
        picture(i, size).save(path / "train/dog" / name)
    with pytest.raises(
        ValueError,
        match=r"high.png is 50×20, other pictures are 20×20 \(height × width\). Pass size=….*size=\(20, 20\)",
    ):
        ImageDataBunch.from_folder(path, bs=2)
    pixels = shown(ImageDataBunch.from_folder(path, size=16, bs=2))
    for i, (name, size) in enumerate(sizes.items()):
        assert torch.equal(pixels[name], pil_to_tensor(center_crop(resize(picture(i, size), [16]), [16]))), name


def test_a_validation_folder_of_another_size_is_refused_with_the_cure(folder, tmp_path):
    path = folder(n=2)
    for file in (path / "valid").rglob("*.png"):
        picture(1, (9, 8)).save(file)
    with pytest.raises(ValueError, match=r"the pictures of valid are 9×8, those of train are 8×8 .*size=\(8, 8\)"):
        ImageDataBunch.from_folder(path, bs=2)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda p: p.joinpath("train").rename(p / "training"),
            r"the folder .*train does not exist: expected .* has training, valid",
        ),
        (
            lambda p: [f.unlink() for f in (p / "train").rglob("*.png")],
            r"has 2 folders \(cat, dog\), but they contain no pictures: expected files that end in .jpg",
        ),
        (
            lambda p: [f.unlink() for f in (p / "train").rglob("*.png")] + [d.rmdir() for d in (p / "train").iterdir()],
            r"has no folders: expected .* It contains nothing",
        ),
        (
            lambda p: (p / "valid/cat").rename(p / "valid/cow"),
            r"valid has classes that the training folder does not have: cow. Its classes are cat, dog",
        ),
    ],
)
def test_folders_of_another_kind_say_what_was_expected(folder, spoil, message):
    spoil(path := folder())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ImageDataBunch.from_folder(path, bs=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_error": "ignore"}, "on_error='ignore': expected 'raise' or 'skip'"),
        ({"n_channels": 4}, "n_channels=4: expected 3"),
        ({"bs": 0}, "bs=0"),
        ({"size": 0}, "size=0: expected an integer number"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ImageDataBunch.from_folder(tmp_path / "nowhere", **options)
