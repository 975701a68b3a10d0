# ruff: noqa: PT017
"""An error of the disk, at whichever call, is loud, says what was to be written and what is free, and costs no older
checkpoint.
"""

import errno
import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots
from tests.reliability.conftest import fit_and_keep, litter, make_learner, newest, outcome, times

TOLD = r"could not write .*kept.*: .*It needs about [\d.]+ MB; [\d.]+ MB are free there\..*intact"
CALLS = ("open", "write", "flush", "close", "fsync", "rename", "mkdir", "open folder")


class Faulty:
    """A file whose writes, flushes and closing can fail."""

    def __init__(self, file: Any, faults: "Faults") -> None:
        self.file, self.faults, self.failed = file, faults, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def write(self, data: Any) -> int:
        self.faults.called("write")
        return self.file.write(data)

    def flush(self) -> None:
        self.faults.called("flush")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        self.faults.called("close")


class Faults:
    """The n-th call of one kind fails, in files that are opened for writing here."""

    def __init__(self, call: str, n: int, number: int) -> None:
        self.call, self.left, self.number, self.hit = call, n, number, False

    def called(self, call: str, what: Any = None) -> None:
        if call != self.call:
            return
        self.left -= 1
        if self.left == 0:
            self.hit = True
            raise OSError(self.number, os.strerror(self.number), what if isinstance(what, (str, Path)) else None)

    @contextmanager
    def injected(self) -> Iterator["Faults"]:
        real_open, real_os_open = io.open, os.open

        def faulty_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if "r" in mode or Path(str(file)).suffix not in (".pt", ".json"):
                return real_open(file, mode, *args, **options)
            self.called("open", file)
            return Faulty(real_open(file, mode, *args, **options), self)

        def faulty_os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags == os.O_RDONLY and not options and Path(os.fsdecode(path)).is_dir():
                self.called("open folder", path)
            return real_os_open(path, flags, *args, **options)

        def before(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def faulty(what: Any, *args: Any, **options: Any) -> Any:
                if not (call == "mkdir" and Path(what).is_dir()):
                    self.called(call, what)
                return real(what, *args, **options)

            return faulty

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(io, "open", faulty_open)
            patch.setattr(os, "open", faulty_os_open)
            for call in ("fsync", "rename", "mkdir"):
                patch.setattr(os, call, before(call, getattr(os, call)))
            yield self


def parts() -> dict[str, Any]:
    return {"model": {"w": torch.ones(50_000)}, "run": {"place": {"step": 1}}}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", CALLS)
def test_whichever_call_fails_a_write_raises_and_the_checkpoint_before_is_intact(call, number):
    folder = Path("kept")
    before = snapshots.write_snapshot(folder, "000001-step-1", parts(), {"run": "a"})
    bytes_before = {file.name: file.read_bytes() for file in before.iterdir()}
    for n in range(1, 200):
        with Faults(call, n, number).injected() as faults:
            try:
                path = snapshots.write_snapshot(folder, "000002-step-2", parts(), {"run": "a"})
            except OSError as error:
                assert faults.hit and error.errno == number
                with pytest.raises(OSError, match=TOLD):
                    raise
            else:
                assert not faults.hit  # else it was silent
                break
        assert {file.name: file.read_bytes() for file in before.iterdir()} == bytes_before
        assert litter(folder) == []
        for path in snapshots.all_in(folder):
            snapshots.read_snapshot(path)  # the new one may be there, if only its rename was not made durable
        shutil.rmtree(folder / "000002-step-2", ignore_errors=True)
    assert n > 1 and newest(folder)[0] == path


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename", "mkdir", "open folder"])
def test_whichever_call_fails_the_fit_raises_and_a_resume_is_exact(call, asynchronous):
    expected = outcome(fit_and_keep(Path("alone"), epochs=1, every_n_steps=5))
    step = times({"write": 29, "fsync": 3, "open": 2}.get(call, 1), 1)
    n, n_raised = 1, 0
    while True:
        shutil.rmtree("kept", ignore_errors=True)
        learn = make_learner(Checkpoint("kept", every_n_steps=5, async_write=asynchronous))
        with learn.no_logging(), Faults(call, n, errno.ENOSPC).injected() as faults:
            try:
                learn.fit_one_cycle(1, 1e-2)
            except OSError as error:
                assert faults.hit, error
                n_raised += 1
                text = str(error)
                assert "kept" in text
            else:
                assert not faults.hit, f"silent: {call} {n}"
                break
        whole = snapshots.newest_snapshot(Path("kept")) if Path("kept").exists() else None
        for path in snapshots.all_in(Path("kept")):
            snapshots.read_snapshot(path)
        learn = make_learner(Checkpoint("kept", every_n_steps=5))
        torch.manual_seed(99 if whole else 3)
        if whole is None:
            learn = make_learner(Checkpoint("kept", every_n_steps=5))
        with learn.no_logging():
            learn.fit_one_cycle(1, 1e-2, resume=True)
        assert outcome(learn) == expected and litter(Path("kept")) == []
        n += step
    assert n_raised


def test_what_is_not_an_error_of_the_disk_stays_what_it_is():
    with pytest.raises(TypeError, match="cannot be saved"):
        snapshots.write_snapshot(Path("kept"), "000001-step-1", {"model": {"x": object()}}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        snapshots.write_snapshot(Path("kept"), "000001-step-1", {}, {"x": object()})
    assert list(Path("kept").iterdir()) == []


def test_a_read_only_folder_is_refused_before_the_first_step():
    with small_disk("ro") as folder:
        learn = make_learner(Checkpoint(folder))
        with learn.no_logging(), pytest.raises(OSError, match=f"could not write .*{folder}.*: Read-only file system"):
            learn.fit(1)
        assert learn.step == 0


# --- a disk that is really full ----------------------------------------------
@contextmanager
def small_disk(options: str = "rw") -> Iterator[Path]:
    """3 MB."""
    folder = Path("disk").absolute()
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size=3m,{options}", "tmpfs", str(folder)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
def test_on_a_full_disk_the_fit_says_so_and_goes_on_when_there_is_room(asynchronous):
    expected = outcome(fit_and_keep(Path("alone"), epochs=2, every_n_steps=3))
    with small_disk() as folder:
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(2_900_000))
        kept = folder / "kept"
        kept.mkdir()
        learn = make_learner(Checkpoint(kept, every_n_steps=3, keep=9, async_write=asynchronous))
        with learn.no_logging(), pytest.raises(OSError, match=TOLD.replace("any", "")) as full:
            learn.fit_one_cycle(2, 1e-2)
        assert full.value.errno == errno.ENOSPC and "Make room, or choose another folder" in str(full.value)
        assert str(kept) in str(full.value) and litter(kept) == []
        saved = snapshots.all_in(kept)
        assert 0 < len(saved) < 8
        for path in saved:
            snapshots.read_snapshot(path)
        ballast.unlink()
        learn = make_learner(Checkpoint(kept, every_n_steps=3))
        torch.manual_seed(99)
        with learn.no_logging():
            learn.fit_one_cycle(2, 1e-2, resume=True)
        assert outcome(learn) == expected


def test_a_write_is_whole_or_raises_however_little_room_there_is():
    with small_disk() as folder:
        n_raised = n_whole = 0
        for room in range(0, 700_000, 16_384):
            for path in snapshots.all_in(folder):
                snapshots.remove_snapshot(path)
            ballast = folder / "ballast"
            ballast.write_bytes(b"")
            free = shutil.disk_usage(folder).free
            ballast.write_bytes(bytes(max(0, free - room)))
            try:
                path = snapshots.write_snapshot(
                    folder, "000001-step-1", {"model": {"w": torch.ones(100_000)}, "run": {}}, {}
                )
            except OSError as error:
                n_raised += 1
                assert error.errno == errno.ENOSPC and "needs about 0.4 MB" in str(error) and str(folder) in str(error)
                assert snapshots.all_in(folder) == [] and litter(folder) == []
            else:
                n_whole += 1
                snapshots.read_snapshot(path)
        assert n_raised > 10 and n_whole > 10


def test_learn_save_on_a_full_disk_leaves_the_old_file_and_says_so():
    with small_disk() as folder:
        learn = make_learner(path=folder, width=20_000)  # 0.6 MB
        path = learn.save("a", with_opt=False)
        before = path.read_bytes()
        (folder / "ballast").write_bytes(bytes(shutil.disk_usage(folder).free - 300_000))
        with pytest.raises(OSError, match=r"could not write .*a\.pt: No space left.*needs about .* MB are free"):
            learn.save("a", with_opt=False)
        assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["a.pt"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_everything_is_flushed_before_the_rename_and_the_folder_after_it(monkeypatch):
    """In whatever order threads get to it: this is what a power cut cannot undo."""
    done: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        real_fsync(handle)
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    def rename(source: Any, target: Any) -> None:
        done.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    for i in range(1, 20):
        done.clear()
        path = snapshots.write_snapshot(Path("kept"), f"{i:06d}-step-{i}", parts(), {"run": "a"})
        before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
        hidden = next(name for name in before if name.startswith("."))
        assert sorted(before) == sorted(["model.pt", "run.pt", "manifest.json", hidden]) and before.index(
            "manifest.json"
        ) < before.index(hidden)
        assert after == ["kept"] and path.name in hidden
