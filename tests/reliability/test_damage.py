"""Damage is detected, the file is named, and a resume goes on from the newest checkpoint that is whole."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from learnkit import Callback
from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots
from learnkit.checkpoint.snapshot import Damaged
from tests.reliability.conftest import fit_and_keep, make_learner, outcome, times

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345\n"
HTML = (
    b"<!DOCTYPE html>\n<html><head><title>503 Service Unavailable</title></head><body>Try again later.</body></html>\n"
)
FILES = ("manifest.json", "model.pt", "optimizer.pt", "run.pt")


@pytest.fixture
def whole() -> Path:
    """A checkpoint of a fit, whole."""
    fit_and_keep(Path("kept"))
    path = snapshots.all_in(Path("kept"))[-1]
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    snapshots.read_snapshot(path)
    return path


def assert_refused(path: Path, file: str) -> None:
    with pytest.raises(Damaged) as refused:
        snapshots.read_snapshot(path)
    assert str(path) in str(refused.value) and file in str(refused.value)


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_every_flipped_bit_in_any_file_is_found_and_the_file_named(whole):
    draw = random.Random(0)
    n_refused = 0
    for _ in range(n := times(200, 2000)):
        file = whole / draw.choice(FILES)
        before = file.read_bytes()
        file.write_bytes(flipped(before, draw.randrange(len(before) * 8)))
        assert_refused(whole, file.name)
        file.write_bytes(before)
        n_refused += 1
    assert n_refused == n
    snapshots.read_snapshot(whole)


def test_each_bit_of_a_manifest_matters():
    """Also where both mean the same in JSON: the e of 1e-05, the digits of an escaped letter, white space."""
    path = snapshots.write_snapshot(
        Path("kept"), "000001-step-1", {"a": {}}, {"run": "é", "rate": 1e-05, "values": {"größe ±": "1"}}
    )
    manifest = path / "manifest.json"
    before = manifest.read_bytes()
    for bit in range(len(before) * 8):
        manifest.write_bytes(flipped(before, bit))
        with pytest.raises(Damaged, match=r"manifest\.json"):
            snapshots.read_manifest(path)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_by_one(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def lengthened(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def html(file: Path) -> None:
    file.write_bytes(HTML)


def lfs(file: Path) -> None:
    file.write_bytes(LFS)


def missing(file: Path) -> None:
    file.unlink()


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_link(file: Path) -> None:
    """To the very same bytes, but elsewhere."""
    shutil.move(file, "elsewhere")
    file.symlink_to(Path("elsewhere").absolute())


def a_pipe(file: Path) -> None:
    """Whoever opens one to read waits for ever."""
    file.unlink()
    os.mkfifo(file)


DAMAGE = (cut, cut_by_one, lengthened, empty, zeroed, html, lfs, missing, a_folder, a_link, a_pipe)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_what_was_written_is_refused(whole, file, damage):
    damage(whole / file)
    assert_refused(whole, file)
    with pytest.warns(UserWarning, match=f"skipped a damaged checkpoint: .*{file}"):
        assert snapshots.newest_snapshot(whole.parent) is None


def test_truncation_anywhere_is_found(whole):
    draw = random.Random(1)
    for _ in range(times(40, 400)):
        file = whole / draw.choice(FILES)
        before = file.read_bytes()
        os.truncate(file, draw.randrange(len(before)))
        assert_refused(whole, file.name)
        file.write_bytes(before)


def test_files_of_another_checkpoint_are_refused(whole):
    fit_and_keep(Path("other"), epochs=2)
    for file in FILES:
        before = (whole / file).read_bytes()
        shutil.copy(snapshots.all_in(Path("other"))[-1] / file, whole / file)
        with pytest.raises(Damaged):
            snapshots.read_snapshot(whole)
        (whole / file).write_bytes(before)
    snapshots.read_snapshot(whole)


def test_a_file_too_many_is_refused(whole):
    (whole / "extra.pt").write_bytes(b"")
    assert_refused(whole, "extra.pt")


def with_manifest(path: Path, change: Callable[[dict], object]) -> None:
    """Changed by somebody who knows how the hash is made."""
    manifest = snapshots.read_manifest(path)
    change(manifest)
    (path / "manifest.json").write_text(
        json.dumps({"manifest": manifest, "sha256": snapshots.hash_of(manifest)}, indent=1)
    )


@pytest.mark.parametrize(
    "name",
    [
        "../x.pt",
        "/tmp/x.pt",
        "..",
        ".",
        "",
        "a/../model.pt",
        "./model.pt",
        "sub/x.pt",
        "x\0.pt",
        "C:\\x.pt",
        "..\\x.pt",
    ],
)
def test_a_manifest_that_names_what_is_not_in_the_folder_is_refused(whole, name):
    outside = b"secret"
    told = {"sha256": snapshots.hashlib.sha256(outside).hexdigest(), "bytes": len(outside)}
    (whole.parent / "x.pt").write_bytes(outside)
    with_manifest(whole, lambda manifest: manifest["files"].update({name: told}))
    with pytest.raises(Damaged) as refused:
        snapshots.read_snapshot(whole)
    assert str(whole) in str(refused.value) and repr(name)[1:-1] in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format=None),
        lambda m: m.update(format="1"),
        lambda m: m.update(format=[1]),
        lambda m: m.pop("format"),
        lambda m: m.update(files=None),
        lambda m: m.update(files=["model.pt"]),
        lambda m: m.pop("files"),
        lambda m: m["files"].update({"model.pt": 7}),
        lambda m: m["files"].update({"model.pt": {}}),
        lambda m: m.update(about=None),
        lambda m: m.pop("about"),
        lambda m: m.update(about=[]),
    ],
)
def test_a_manifest_of_another_shape_is_refused(whole, change):
    with_manifest(whole, change)
    assert_refused(whole, "manifest.json")
    assert snapshots.snapshots_of_run(whole.parent, "x") == []


def test_a_newer_format_is_refused_with_what_to_do(whole):
    with_manifest(whole, lambda manifest: manifest.update(format=snapshots.SNAPSHOT_FORMAT + 1))
    with pytest.raises(
        Damaged, match="has format 3, this version of learnkit reads formats up to 2: install a newer version"
    ):
        snapshots.read_snapshot(whole)


@pytest.mark.parametrize("n", [0, -1, 10**30, 1e300, "12", None, [1]])
def test_a_declared_size_that_is_not_the_files_is_refused_and_allocates_nothing(whole, n):
    with_manifest(whole, lambda manifest: manifest["files"]["model.pt"].update(bytes=n))
    assert_refused(whole, "model.pt")


def test_a_manifest_that_says_a_key_twice_is_refused(whole):
    manifest = whole / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format"', '"format": 0, "format"', 1))
    assert_refused(whole, "manifest.json")


@pytest.mark.parametrize(
    "text", [b"[]", b"null", b"{}", b"7", b"\xff\xfe", b"[" * 100_000, b'{"manifest": 1, "sha256": 2}', b"9" * 10_000]
)
def test_a_manifest_that_is_any_other_json_or_none_is_refused(whole, text):
    (whole / "manifest.json").write_bytes(text)
    assert_refused(whole, "manifest.json")


# --- resuming ----------------------------------------------------------------
class Killed(Exception): ...


def interrupted() -> list[Path]:
    """The checkpoints of a fit that ended after 20 of its 24 steps, saved every four."""

    class Ends(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn) -> None:
            if learn.training and learn.step == 20:
                raise Killed

    learn = make_learner(Checkpoint("kept", every_n_steps=4, keep=3))
    with learn.no_logging(), pytest.raises(Killed):
        learn.fit_one_cycle(2, 1e-2, callbacks=[Ends()])
    return snapshots.all_in(Path("kept"))


@pytest.mark.parametrize(
    "damage", [None, cut, empty, html, lfs, missing, a_pipe], ids=lambda damage: damage.__name__ if damage else "a bit"
)
def test_resume_goes_on_from_the_newest_whole_one_and_says_which_was_passed_over(damage):
    expected = outcome(fit_and_keep(Path("alone"), epochs=2))
    for i, file in enumerate(FILES):
        shutil.rmtree("kept", ignore_errors=True)
        *_, older, newest = interrupted()
        if damage:
            damage(newest / file)
        else:
            (newest / file).write_bytes(flipped((newest / file).read_bytes(), 999 + i))
        learn = make_learner(Checkpoint("kept", every_n_steps=4, keep=3))
        torch.manual_seed(99)
        with (
            learn.no_logging(),
            pytest.warns(UserWarning, match=f"skipped a damaged checkpoint: .*{newest.name}.*{file}") as seen,
        ):
            learn.fit_one_cycle(2, 1e-2, resume=True)
        assert len(seen) == 1 and learn.resumed is not None and f"step-{learn.resumed['step']}" in older.name
        assert outcome(learn) == expected


def test_when_all_are_damaged_each_is_named_and_the_fit_begins_anew():
    paths = interrupted()
    for path in paths:
        cut(path / "model.pt")
    learn = make_learner(Checkpoint("kept"))
    with learn.no_logging(), pytest.warns(UserWarning, match="skipped a damaged") as seen:
        learn.fit_one_cycle(2, 1e-2, resume=True)
    assert [path.name in str(warning.message) for path, warning in zip(reversed(paths), seen, strict=True)] == [
        True
    ] * 3
    assert outcome(learn) == outcome(fit_and_keep(Path("alone"), epochs=2))
