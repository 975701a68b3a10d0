"""`Checkpoint(sharded=True)`: each rank writes and reads its own part of a spread model; whoever goes on, goes on from
the same state.
"""

import resource
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp  # imported here, so that forked ranks need not
from safetensors import safe_open
from torch import nn

from learnkit.callbacks import EMA, Checkpoint, Lookahead
from learnkit.checkpoint import snapshot as snapshots
from learnkit.distributed import get_rank
from tests.distributed.test_fully_shard import KINDS, Kill, Killed, Net, close, fitted, history, learner, net


def resumable(kind: str, folder: Path, model: nn.Module, *, sharded: bool = True) -> Any:
    return learner(
        kind, [Checkpoint(folder, every_n_steps=3, sharded=sharded), EMA(0.9), Lookahead(2)], model=model, seed=5
    )


def begin(folder: Path, kind: str = "fsdp", p: float = 0.0, **options: Any) -> None:
    with pytest.raises(Killed):
        fitted(resumable(kind, folder, net(p), **options), 2, callbacks=[Kill(6)])


def go_on(folder: Path, kind: str = "fsdp", p: float = 0.0, **options: Any) -> Any:
    learn = fitted(resumable(kind, folder, net(p), **options), 2, resume=True)
    assert (learn.resumed is None) == (not folder.name.startswith("begun"))
    losses, values, weights = history(learn)
    return losses, values[-2:], weights


def test_a_fit_goes_on_from_parts_in_any_kind_and_world(ranks, tmp_path: Path):
    places = [("one process", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 3)]
    ranks(2, lambda: [begin(tmp_path / f"begun 2 {place}") for place in places])
    ranks(3, lambda: begin(tmp_path / "begun 3 ('fsdp', 2)"))
    expected = go_on(tmp_path / "uninterrupted", "one process")
    for kind, world in places:

        def run(place: Any = (kind, world)) -> Any:
            return [go_on(path, place[0]) for n in (2, 3) if (path := tmp_path / f"begun {n} {place}").exists()]

        for results in [run()] if world == 1 else ranks(world, run):
            assert len(results) == 1 + ((kind, world) == ("fsdp", 2))
            for found in results:
                assert all(close(a, b, within=3e-6) for a, b in zip(found, expected, strict=True)), (kind, world)


def test_on_as_many_ranks_it_goes_on_bit_for_bit_as_from_a_whole_one_with_dropout_and_average(ranks, tmp_path: Path):
    def run() -> Any:
        begin(tmp_path / "begun in parts", p=0.5)
        begin(tmp_path / "begun whole", p=0.5, sharded=False)
        return [
            go_on(tmp_path / "begun in parts", p=0.5),
            go_on(tmp_path / "begun whole", p=0.5, sharded=False),
            go_on(tmp_path / "plain", p=0.5),
        ]

    for parts, whole, uninterrupted in ranks(2, run):
        assert parts == whole == uninterrupted


def test_a_model_on_the_meta_device_goes_on_from_parts(ranks, tmp_path: Path):
    def run() -> Any:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Net()
        begin(tmp_path / "begun")
        learn = fitted(resumable("fsdp", tmp_path / "begun", model), 2, resume=True)
        return history(learn), history(fitted(resumable("fsdp", tmp_path / "whole", net()), 2))

    for resumed, expected in ranks(2, run):
        assert resumed == expected


def newest(folder: Path) -> Path:
    return snapshots.all_in(folder)[-1]


def test_each_rank_writes_its_own_rows_and_nobody_the_whole(ranks, tmp_path: Path):
    ranks(2, lambda: begin(tmp_path / "begun"))
    folder = newest(tmp_path / "begun")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2 and sorted(p.name for p in folder.glob("*.pt")) == ["model.pt", "optimizer.pt", "run.pt"]
    model, optimizer = net().state_dict(), 2 * len(net().state_dict())
    n_rows = []
    for path in files:
        with safe_open(path, "pt") as file:
            assert len(file.keys()) <= len(model) + optimizer
            n_rows.append(sum(file.get_tensor(key).numel() for key in file.keys()))  # noqa: SIM118
    n = sum(p.numel() for p in net().parameters())
    assert sum(n_rows) == 3 * n and max(n_rows) < 0.6 * 3 * n  # weights and two moments, in halves
    [parts] = [snapshots.read_snapshot(folder)[0]]
    assert all(value.is_meta for value in parts["model"].values())
    assert not any(type(torch.load(path, weights_only=True)) is not dict for path in folder.glob("*.pt"))


@pytest.mark.filterwarnings("default:skipped a damaged checkpoint")
def test_a_part_that_was_changed_is_found_and_the_checkpoint_before_is_taken(ranks, tmp_path: Path):
    ranks(2, lambda: begin(tmp_path / "begun"))
    [_, part] = sorted(newest(tmp_path / "begun").glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(snapshots.Damaged, match=r"shard-00002.*was changed after it was written"):
        snapshots.read_snapshot(part.parent)

    def run() -> Any:
        learn = fitted(resumable("fsdp", tmp_path / "begun", net()), 2, resume=True)
        return learn.resumed["step"], history(learn)

    expected = go_on(tmp_path / "uninterrupted", "one process")
    for step, (losses, _, weights) in ranks(2, run):
        assert step == 4 and close(losses, expected[0], within=3e-6) and close(weights, expected[2], within=3e-6)


def test_where_one_rank_cannot_write_all_hear_of_it_and_nothing_is_left(ranks, tmp_path: Path):
    def run() -> str:
        if get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # as a full disk of its own
        try:
            begin(tmp_path / "begun")
        except (OSError, RuntimeError) as error:
            return str(error)
        return "nothing was said"

    for told in ranks(2, run):
        assert "could not write" in told and "rank 1" in told and "File too large" in told and "Make room" not in told
    assert not list((tmp_path / "begun").iterdir())


def test_another_model_is_told_before_anything_is_read(ranks, tmp_path: Path):
    ranks(2, lambda: begin(tmp_path / "begun"))

    def run(kind: str) -> str:
        other = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        learn = (
            KINDS[kind](learner("one process", [Checkpoint(tmp_path / "begun", sharded=True)], model=other))
            if kind != "fsdp"
            else learner("one process", [Checkpoint(tmp_path / "begun", sharded=True)], model=other).to_fsdp(
                blocks=nn.Linear
            )
        )
        try:
            fitted(learn, 2, resume=True)
        except ValueError as error:
            return str(error)
        return ""

    for told in (run("one process"), *ranks(2, run, "fsdp")):
        assert "the file is of another model" in told


def test_where_nothing_is_spread_the_checkpoint_is_a_plain_one(tmp_path: Path):
    begin(tmp_path / "begun", "one process")
    assert not list(newest(tmp_path / "begun").glob("*.safetensors"))
    assert snapshots.read_manifest(newest(tmp_path / "begun"))["format"] == 1


def test_what_does_not_go_together_or_is_not_installed_is_said(tmp_path: Path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"sharded=True cannot be combined with async_write=True.*Use only one of them"
    ):
        Checkpoint(tmp_path, sharded=True, async_write=True)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        Checkpoint(tmp_path, sharded=True)
    assert list(chain(tmp_path.iterdir())) == []
