"""Loading runs no code: files that were made to, whole as far as any hash can tell, are refused with an error that says
so.
"""

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots
from learnkit.checkpoint.snapshot import Damaged
from tests.reliability.conftest import fit_and_keep, make_learner

CANARY = Path("canary")


class Calls:
    """Unpickled without care, it calls a function."""

    def __init__(self, fn: Callable[..., Any], *args: Any) -> None:
        self.call = fn, args

    def __reduce__(self) -> Any:
        return self.call


class SetsState:
    """A harmless object whose state is made by a call."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), Calls(os.system, touch())


def touch() -> str:
    return f"touch '{CANARY.absolute()}'"


def in_python() -> str:
    return f"__import__('pathlib').Path({str(CANARY.absolute())!r}).touch()"


def with_code(call: Any) -> Any:
    return {"weight": torch.ones(2), "state": {"deep": [1, (2, {"er": call})]}}


def zipped(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def in_torchs_zip(data: bytes) -> bytes:
    """A file of torch.save whose data.pkl was exchanged."""
    buffer, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(zipped({"weight": torch.ones(2)})))
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, data if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


def by_hand(module: str, name: str, argument: str) -> bytes:
    """As old pickles say it: GLOBAL, a string, REDUCE."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def with_build() -> bytes:
    """BUILD lets an object of torch's own take a state that was made by a call."""
    return b"ccollections\nOrderedDict\n)R" + by_hand("os", "system", touch())[:-1] + b"b."


def extension_code() -> bytes:
    return b"\x80\x02" + b"\x82\x01" + b"."


def a_tar() -> bytes:
    """What torch 0.1 wrote."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Calls(os.system, touch()))
            told = tarfile.TarInfo(name)
            told.size = len(data)
            file.addfile(told, io.BytesIO(data))
    return buffer.getvalue()


def legacy() -> bytes:
    return zipped(with_code(Calls(os.system, touch())), _use_new_zipfile_serialization=False)


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


RUNS: dict[str, Callable[[], bytes]] = {  # each does run its code where nobody takes care
    "a bare pickle": lambda: pickle.dumps(Calls(os.system, touch())),
    "protocol 0": lambda: pickle.dumps(Calls(os.system, touch()), protocol=0),
    "protocol 4 in torch's zip": lambda: in_torchs_zip(pickle.dumps(Calls(os.system, touch()), protocol=4)),
    "in torch's zip": lambda: zipped(Calls(os.system, touch())),
    "deep beside tensors": lambda: zipped(with_code(Calls(os.system, touch()))),
    "exec": lambda: zipped(with_code(Calls(exec, in_python()))),
    "eval": lambda: zipped(with_code(Calls(eval, in_python()))),
    "mkdir": lambda: zipped(with_code(Calls(os.mkdir, str(CANARY.absolute())))),
    "subprocess": lambda: zipped(with_code(Calls(subprocess.call, ["touch", str(CANARY.absolute())]))),
    "a method of a Path": lambda: zipped(with_code(Calls(Path.touch, CANARY.absolute()))),
    "a state that a call makes": lambda: zipped({"x": SetsState()}),
    "BUILD": lambda: in_torchs_zip(with_build()),
    "GLOBAL posix.system": lambda: in_torchs_zip(by_hand("posix", "system", touch())),
    "a key": lambda: in_torchs_zip(b"}" + by_hand("os", "system", touch())[:-1] + b"K\x01s."),
    "the legacy format": legacy,
}
REFUSED: dict[str, Callable[[], bytes]] = {  # objects that are no plain types, and files made to mislead a reader
    "a tar of torch 0.1": a_tar,
    "a numpy scalar": lambda: zipped({"lr": np.float64(0.1)}),
    "a numpy array": lambda: zipped({"x": np.ones(3)}),
    "a Path": lambda: zipped({"x": Path("x")}),
    "a module": lambda: zipped(nn.Linear(2, 2)),
    "torchscript": torchscript,
    "a function": lambda: zipped({"f": os.system}),
    "an extension code": lambda: in_torchs_zip(extension_code()),
    "HTML": lambda: b"<!DOCTYPE html><html></html>",
    "nothing": lambda: b"",
    "a zip of something else": lambda: in_torchs_zip(b"")[:200],
    "no end": lambda: in_torchs_zip(b"}"),
    "an empty stack": lambda: in_torchs_zip(b"."),
    "a memo that is not there": lambda: in_torchs_zip(b"\x80\x02h\x07."),
    "text that is no UTF-8": lambda: in_torchs_zip(b"\x80\x02X" + struct.pack("<I", 2) + b"\xff\xff."),
    "a tensor larger than its bytes": lambda: in_torchs_zip(pickle_of_a_large_tensor()),
    "another type's arguments": lambda: in_torchs_zip(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02tR."),
    "a packed record": lambda: unfolds(),
    "data.pkl twice": lambda: with_a_record_twice("archive/data.pkl"),
    "a tensor twice": lambda: with_a_record_twice("archive/data/0"),
    "a persistent id that is none": lambda: in_torchs_zip(b"\x80\x02K\x01Q."),
}


def unfolds(n: int = 2**24) -> bytes:
    """A few kilobytes that would take a thousand times as much memory."""
    buffer, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(zipped({"weight": torch.zeros(n // 4)})))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert len(buffer.getvalue()) < n / 500
    return buffer.getvalue()


def with_a_record_twice(name: str) -> bytes:
    buffer = io.BytesIO(zipped({"weight": torch.ones(2)}))
    with zipfile.ZipFile(buffer, "a") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target.writestr(name, target.read(name))
    return buffer.getvalue()


def pickle_of_a_large_tensor() -> bytes:
    data = zipfile.ZipFile(io.BytesIO(zipped({"weight": torch.ones(2)}))).read("archive/data.pkl")
    assert data.count(b"K\x02\x85") == 1  # the shape (2,)
    return data.replace(b"K\x02\x85", b"J" + struct.pack("<i", 2**30) + b"\x85")


def hashed(path: Path, **exchanged: bytes) -> Path:
    """Files exchanged by somebody who knows how the hashes are made."""
    manifest = snapshots.read_manifest(path)
    for part, data in exchanged.items():
        (path / f"{part}.pt").write_bytes(data)
        manifest["files"][f"{part}.pt"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (path / "manifest.json").write_text(
        json.dumps({"manifest": manifest, "sha256": snapshots.hash_of(manifest)}, indent=1)
    )
    snapshots.verify_snapshot(path)
    return path


def assert_no_advice(text: str) -> None:
    for words in (
        "weights_only=False",
        "trust the source",
        "can still be loaded",
        "add_safe_globals",
        "set to `False`",
        "arbitrary code",
    ):
        assert words not in text


@pytest.mark.parametrize("kind", RUNS)
def test_the_files_of_these_tests_do_run_code_when_nobody_takes_care(kind):
    data = io.BytesIO(RUNS[kind]())
    try:
        torch.load(data, weights_only=False)
    except Exception:
        assert CANARY.exists()
    assert CANARY.exists()


KINDS = list(RUNS | REFUSED)
# of torch, about other pickle protocols and TorchScript, before it refuses them
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:'torch.load' received"),
]


@pytest.mark.parametrize("part", ["model", "run"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_a_checkpoint_runs_code_and_an_error_names_it(kind, part):
    fit_and_keep(Path("kept"))
    path = hashed(snapshots.all_in(Path("kept"))[-1], **{part: (RUNS | REFUSED)[kind]()})
    with pytest.raises(Damaged, match=rf"{part}\.pt cannot be read safely as a state of plain tensors") as refused:
        snapshots.read_snapshot(path)
    assert refused.value.__cause__ is None and (refused.value.__context__ is None or refused.value.__suppress_context__)
    assert not CANARY.exists()


@pytest.mark.parametrize("kind", ["deep beside tensors", "the legacy format", "BUILD"])
def test_a_resume_runs_no_code_and_goes_on_from_the_one_before(kind):
    fit_and_keep(Path("kept"), epochs=2)
    older, newest = snapshots.all_in(Path("kept"))
    hashed(newest, optimizer=RUNS[kind]())
    learn = make_learner(Checkpoint("kept"))
    with (
        learn.no_logging(),
        pytest.warns(UserWarning, match=rf"skipped a damaged checkpoint: .*{newest.name}.optimizer\.pt"),
    ):
        learn.fit_one_cycle(2, 1e-2, resume=True)
    assert learn.resumed is not None and f"step-{learn.resumed['step']}" in older.name
    assert learn.step == 24 and not CANARY.exists()


@pytest.mark.parametrize(
    "kind, named",
    [("in torch's zip", r"posix\.system"), ("eval", r"GLOBAL \S*eval"), ("a Path", "PosixPath"), ("HTML", "")],
)
def test_the_message_names_what_the_file_would_have_called_and_advises_nothing_unsafe(kind, named):
    fit_and_keep(Path("kept"))
    path = hashed(snapshots.all_in(Path("kept"))[-1], model=(RUNS | REFUSED)[kind]())
    with pytest.raises(Damaged, match=rf"model\.pt .*{named}") as refused:
        snapshots.read_snapshot(path)
    assert_no_advice(str(refused.value))


# --- learn.load --------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_learn_load_runs_no_code_and_changes_nothing(kind):
    Path("models").mkdir()
    Path("models/theirs.pt").write_bytes((RUNS | REFUSED)[kind]())
    learn = make_learner()
    before = [value.clone() for value in learn.model.state_dict().values()]
    with pytest.raises(
        ValueError, match=r"theirs\.pt (cannot be read safely|is incomplete or was changed) .*Nothing was loaded"
    ):
        learn.load("theirs")
    assert not CANARY.exists()
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.state_dict().values(), strict=True))
