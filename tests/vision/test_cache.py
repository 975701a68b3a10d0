"""The file of decoded pictures: written at once or not at all, verified, replaced when the folder changes; and what
happens without it.
"""

import errno
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from learnkit.vision import ImageDataBunch, cache, pictures
from learnkit.vision.cache import PAGE
from tests.vision.conftest import picture


def load(path: Path, **options) -> torch.Tensor:
    return ImageDataBunch.from_folder(path, valid=None, bs=2, **options).pictures["train"].pixels


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pixels"))


def forbid(*arguments: object, **options: object) -> None:
    raise AssertionError("decoded again")


def test_a_second_run_reads_the_file_and_decodes_nothing(folder, own_cache, monkeypatch):
    path = folder()
    first = load(path).clone()
    [file] = files(own_cache)
    assert file.stat().st_size > PAGE + first.numel()
    monkeypatch.setattr(pictures, "decode_all", forbid)
    assert torch.equal(load(path), first)


@pytest.mark.parametrize("change", ["add", "remove", "write", "rename"])
def test_a_changed_folder_is_decoded_again_and_its_old_file_replaced(folder, own_cache, change):
    path = folder()
    before = load(path).clone()
    if change == "add":
        picture(7).save(path / "train/cat/new.png")
    if change == "remove":
        (path / "train/cat/0.png").unlink()
    if change == "write":
        picture(7).save(path / "train/cat/0.png")
    if change == "rename":
        (path / "train/cat/0.png").rename(path / "train/cat/9.png")
    after = load(path)
    assert after.shape != before.shape or not torch.equal(after, before)
    assert len(files(own_cache)) == 1 and not list(own_cache.glob("*.part"))


def test_each_way_of_decoding_has_a_file_of_its_own(folder, own_cache):
    path = folder()
    assert [load(path).shape[1:], load(path, n_channels=1).shape[1:], load(path, size=4).shape[1:]] == [
        (3, 8, 8),
        (1, 8, 8),
        (3, 4, 4),
    ]
    assert len(files(own_cache)) == 3


@pytest.mark.parametrize(
    "place", ["magic", "header", "first pixel", "last pixel", "checksums", "cut off", "longer", "empty"]
)
def test_every_damage_is_noticed_and_the_pictures_are_decoded_again(folder, own_cache, place):
    path = folder()
    whole = load(path).clone()
    [file] = files(own_cache)
    data = bytearray(file.read_bytes())
    at = {
        "magic": 3,
        "header": 120,
        "first pixel": PAGE,
        "last pixel": PAGE + whole.numel() - 1,
        "checksums": len(data) - 5,
    }
    if place in at:
        data[at[place]] ^= 1
    else:
        data = {"cut off": data[:-9], "longer": data + b"x", "empty": b""}[place]
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=r"\.pixels .*The pictures are decoded again"):
        assert torch.equal(load(path), whole)
    assert torch.equal(load(path), whole)


def test_several_pieces_are_verified(folder, own_cache, monkeypatch):
    monkeypatch.setattr(cache, "CHECKSUM_PIECE", 500)
    path = folder()
    whole = load(path).clone()
    [file] = files(own_cache)
    data = bytearray(file.read_bytes())
    data[PAGE + 1234] ^= 128
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="its checksum differs"):
        assert torch.equal(load(path), whole)


def test_an_error_while_decoding_leaves_nothing_behind(folder, own_cache):
    path = folder()
    picture(1, (9, 9)).save(path / "train/dog/z.png")
    with pytest.raises(ValueError, match="Pass size="):
        load(path)
    assert not files(own_cache) and not list(own_cache.glob("*.part"))


def test_without_a_cache_the_pixels_are_the_same_and_nothing_is_written(folder, own_cache):
    path = folder()
    assert torch.equal(load(path, cache=None), load(path))
    shutil.rmtree(own_cache)
    load(path, cache=None)
    assert not own_cache.exists()


def test_the_mapped_pixels_can_be_written_to_and_the_file_stays_as_it_is(folder, own_cache):
    path = folder()
    before = load(path)[0, 0, 0, 0].item()
    load(path)[0] = 0
    assert load(path)[0, 0, 0, 0].item() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_said_and_the_pictures_are_decoded_into_memory(folder, tmp_path):
    path, disk = folder(n=30, size=(64, 64)), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        with pytest.warns(
            UserWarning,
            match=r"could not write .*\.pixels: No space left on device. It needs about 0.8 MB; .* are decoded into "
            r"memory "
            r"instead \(1 MB in each process\).*Choose a folder with enough space: cache=… or LEARNKIT_CACHE",
        ):
            full = load(path, cache=disk)
        assert torch.equal(full, load(path)) and [p.suffix for p in disk.iterdir()] == [".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_says_it_is_full_leaves_nothing_behind(folder, own_cache, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = folder()
    with pytest.warns(UserWarning, match="Make room, or choose another folder"):
        load(path)
    assert [p.suffix for p in own_cache.iterdir()] == [".lock"]


def test_pictures_that_do_not_fit_into_memory_are_refused_with_the_need_and_the_cure(folder, monkeypatch):
    monkeypatch.setattr(pictures, "free_memory", lambda: 4000)
    with pytest.raises(
        MemoryError,
        match=r"12 pictures of 3×8×8 take 0 MB, expected at most half of the 0 MB of free memory. Pass a smaller "
        r"size=…, or a cache",
    ):
        load(folder(), cache=None)


def test_a_cache_folder_that_is_a_file_is_said_too(folder, tmp_path):
    (tmp_path / "occupied").write_text("")
    with pytest.warns(UserWarning, match="decoded into memory instead"):
        load(folder(), cache=tmp_path / "occupied")


def decode_in_child(path: str, queue) -> None:
    calls = 0
    original = pictures.decode_all

    def count(*arguments, **options):
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    pictures.decode_all = count
    queue.put((int(load(Path(path)).sum()), calls))


def test_of_several_independent_processes_one_decodes(folder):
    path, context = folder(n=40), multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=decode_in_child, args=(str(path), queue)) for _ in range(3)]
    for child in children:
        child.start()
    results = [queue.get() for _ in children]
    for child in children:
        child.join()
    assert len({total for total, _ in results}) == 1 and sum(calls for _, calls in results) == 1
