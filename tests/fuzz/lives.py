"""Fits on forked ranks, one process group after the other in one folder: what each ended with, and what its ranks have
seen.
"""

from __future__ import annotations

import csv
import json
import os
import random
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnkit import Callback, Learner
from learnkit.checkpoint.resume import keys_of, random_state
from learnkit.checkpoint.snapshot import all_in, newest_snapshot
from learnkit.devices.dtensor import is_shard
from learnkit.distributed import RankFailed, destroy_process_group, get_rank, init_process_group, launch, watcher
from tests.fuzz.configuration import Configuration, Interruption
from tests.fuzz.interruptions import INTERRUPTIONS, Broken, interrupt, signal_of
from tests.fuzz.isolate import Crashed, isolated
from tests.fuzz.learner_source import Script, compiled, seed_all
from tests.fuzz.sources import numbers

SECONDS = 100  # for one process group; a hang is a failure
TIMED = ("Timer", "Profile", "StopAfter")  # callbacks whose state is times


@dataclass(frozen=True)
class Life:
    """One process group's: on `world` ranks, until the interruption or the end."""

    world: int = 1
    resume: bool = False
    interruption: Interruption | None = None


@dataclass
class Told:
    """How a life ended: "done", "interrupted" or "failed", with what each rank has at the end, or the reason."""

    how: str
    ranks: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    before_first_step: bool = False
    alike: bool = True  # whether a failure is the same on all ranks


@dataclass
class History:
    lives: list[Told]
    seen: list[dict[tuple[int, int, int], list[list[int]]]]  # of each life: (fit, epoch, batch) -> each rank's numbers
    litter: list[str]  # what is wrong with the checkpoints' folder at the end

    @property
    def last(self) -> Told:
        return self.lives[-1]


def history(c: Configuration, *lives: Life) -> History:
    """In a new folder, which is the processes' own too."""
    script, told, seen = compiled(c), [], []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        for k, life in enumerate(lives):
            told.append(live(c, script, life, folder, k))
            seen.append(read_seen(folder, k, life.world))
            if told[-1].how == "failed":
                break
        return History(
            told,
            seen,
            what_is_wrong(folder / "kept", dict(c.checkpoint).get("keep", 2) * (len(c.fits) + c.has("two fits"))),
        )


def live(c: Configuration, script: Script, life: Life, folder: Path, number: int) -> Told:
    ended = None
    try:
        if life.world == 1:
            results = [isolated(on_rank, c, script, life, folder, number, seconds=SECONDS)]
        else:
            results = launch(in_group, life.world, c, script, life, folder, number, timeout=SECONDS, every_rank=True)
    except TimeoutError as error:
        return Told("failed", reason=f"hang: {error}")
    except (RankFailed, Crashed) as error:
        ended = str(error)
    struck = life.interruption is not None and (folder / f"struck-{number}").exists()
    if ended is not None:
        if struck and is_the_end(life.interruption):
            return Told("interrupted", reason=ended)
        return Told("failed", reason=ended)
    errors = [result for result in results if "error" in result]
    if errors:
        alike = len(errors) == len(results) and len({result["error"] for result in errors}) == 1
        reason = "\n".join(result["error"] + "\n" + result["traceback"] for result in errors[:1])
        return Told(
            "failed", reason=reason, before_first_step=all(result["step"] == 0 for result in errors), alike=alike
        )
    if all("broken" in result for result in results):
        return Told("interrupted")
    codes = {result.get("exit") for result in results}
    if codes != {None}:
        expected = 128 + signal_of(life.interruption.kind) if life.interruption else None
        return (
            Told("interrupted")
            if codes == {expected}
            else Told("failed", reason=f"exit codes {codes}, expected {expected}")
        )
    return Told("done", results)


def is_the_end(i: Interruption | None) -> bool:
    """Whether it ends a process: outside of Checkpoint's part of a fit nobody handles a signal."""
    return i is not None and (INTERRUPTIONS[i.kind].has("ends") or (i.early and i.hook in ("before_fit", "after_fit")))


def in_group(*args: Any) -> dict[str, Any]:
    shorten_waits()
    init_process_group(timeout=30)
    try:
        return on_rank(*args)
    finally:
        destroy_process_group()


def shorten_waits() -> None:
    """A failing rank waits for the others to have seen why: on one machine that is soon."""
    sys.modules["learnkit.distributed.guard"].SEEN = 0.2  # type: ignore[attr-defined]
    watcher.POLL, watcher.LINGER = 0.05, 0.3


def on_rank(c: Configuration, script: Script, life: Life, folder: Path, number: int) -> dict[str, Any]:
    """What a rank has at the end of its fits, as plain values."""
    os.chdir(folder)
    torch.set_num_threads(1)
    rank, learn = get_rank(), None
    torch.manual_seed(100 + rank)
    random.seed(100 + rank)
    np.random.seed(100 + rank)
    try:
        learn = script.make(life.world, rank)
        if life.resume and Path("kept").is_dir() and all_in(Path("kept")):
            seed_all(1000 + number)  # another process has other random states
        added: list[Callback] = [Seen(folder / f"seen-{number}-{rank}")]
        if life.interruption is not None:
            i = life.interruption
            everywhere = INTERRUPTIONS[i.kind].has("all")
            added.append(
                interrupt(
                    i.kind,
                    i.hook,
                    i.step,
                    None if everywhere else i.rank,
                    early=i.early,
                    fit=i.fit,
                    note=folder / f"struck-{number}",
                )
            )
        with learn.no_logging():
            script.fit(learn, life.resume, added)
            return outcome(learn)
    except Broken:
        if life.world > 1:
            raise
        return {"broken": True}
    except SystemExit as leave:
        return {"exit": leave.code}
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {
            "error": text,
            "step": 0 if learn is None else learn.step - (learn.resumed or {}).get("step", 0),
            "traceback": traceback.format_exc(limit=-8),
        }


class Seen(Callback):
    """Writes down which samples each training batch has; into a file, which outlives the process."""

    order = -300
    in_trials = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def before_batch(self, learn: Learner) -> None:
        if learn.training:
            with self.path.open("a") as file:
                print(json.dumps([learn.n_fits, learn.epoch, learn.batch_index, numbers(learn.inputs)]), file=file)


def read_seen(folder: Path, number: int, world: int) -> dict[tuple[int, int, int], list[list[int]]]:
    seen: dict[tuple[int, int, int], list[list[int]]] = {}
    for rank in range(world):
        path = folder / f"seen-{number}-{rank}"
        for line in path.read_text().splitlines() if path.exists() else ():
            *place, own = json.loads(line)
            seen.setdefault(tuple(place), [[] for _ in range(world)])[rank] += own
    return seen


# --- what is compared --------------------------------------------------------
def outcome(learn: Learner) -> dict[str, Any]:
    """Everything that a fit leaves; measurements come last, as they may draw."""
    recorder = learn.recorder
    found: dict[str, Any] = {
        "step": learn.step,
        "epochs_trained": learn.epochs_trained,
        "measured": {
            name: learn.values[name] for name in learn.value_names if name in learn.values
        },  # a Timer's are times
        "weights": whole(dict(learn.model.state_dict())),
        "optimizer": whole(learn.opt.state_dict()),
        "requires_grad": [p.requires_grad for p in learn.model.parameters()],
        "history": {
            name: getattr(recorder, name) for name in ("losses", "lrs", "moms", "values", "ends", "metric_names")
        },
        "random": random_state(learn.device),
        "callbacks": {},
    }
    kept = [callback for callback in learn.callbacks if type(callback).__name__ not in ("Checkpoint", "Recorder")]
    for key, callback in zip(keys_of(kept), kept, strict=True):
        if type(callback).__name__ not in TIMED:
            state = whole(callback.state_dict())
            if "n_before" in state:  # a Journal: its sums are of a fit that is over, its logs are compared
                state = {"steps": state["n_before"]}
            found["callbacks"][key] = state
    if learn.rank == 0:
        found["logs"] = {
            path.name: log(path, ("step", "epoch", "loss", "lr", "config", *recorder.metric_names))
            for path in map(Path, ("log.csv", "log.jsonl"))
            if path.exists()
        }
    if learn.data.valid_dl is not None:
        found["validated"] = learn.validate()
        preds, targets, losses = learn.get_preds(with_loss=True)
        found["predicted"] = {"preds": preds, "targets": targets, "losses": losses}
    return found


def whole(value: Any) -> Any:
    """Copies, of sharded tensors the whole; all ranks have to come here."""
    if isinstance(value, Tensor):
        return (value.full_tensor() if is_shard(value) else value).detach().clone()  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return {key: whole(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(v) for v in value]
    return value


def log(path: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Its rows, without times."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with path.open(newline="") as file:
            rows = [{name: as_number(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{name: value for name, value in row.items() if name in names} for row in rows]


def as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def what_is_wrong(folder: Path, keep: int) -> list[str]:
    """Of a folder of checkpoints: too many, litter, or none that can be read."""
    if not folder.is_dir():
        return []
    wrong = [f"{path.name} is litter" for path in folder.iterdir() if path.name.startswith(".")]
    found = all_in(folder)
    if len(found) > keep:
        wrong.append(f"{len(found)} checkpoints are kept, expected {keep} at most: {[path.name for path in found]}")
    if found and newest_snapshot(folder) is None:
        wrong.append("no checkpoint can be read")
    return wrong
