"""Bars and a table in a terminal, one plain line per epoch elsewhere, and nothing where nothing was asked for."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner, SkipValidate, StopTrain, accuracy
from learnkit.callbacks import Progress
from tests.conftest import ROOT

LINE = re.compile(r"epoch (\d+)/(\d+)  train_loss (\S+)  valid_loss (\S+)  accuracy (\S+)  time \d\d:\d\d")


def make_learner(*callbacks: Callback, valid: bool = True, **options: Any) -> Learner:
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    data = DataBunch.from_tensors((x, y), (x, y) if valid else None, bs=4)
    return Learner(data, nn.Linear(3, 2), callbacks=callbacks, **options)


SCRIPT = """
import torch
from torch import nn
from learnkit import DataBunch, Learner, accuracy
x, y = torch.randn(64, 3), torch.randint(2, (64,))
learn = Learner(DataBunch.from_tensors((x, y), (x, y), bs=4), nn.Linear(3, 2), metrics=accuracy)
learn.fit_one_cycle(3)
learn.validate()
learn.get_preds()
print("after", flush=True)
with learn.no_bar(): learn.fit(1)
with learn.no_logging(): learn.fit(1)
print("last", flush=True)
learn.fit(1)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}


def in_a_terminal(folder: Path, script: str) -> str:
    """What a terminal of 80 columns is sent by a Python process that runs `script`."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=end, stdout=end, stderr=end, cwd=folder, env=environment()
    )
    os.close(end)
    received = b""
    try:
        while chunk := os.read(terminal, 65_536):
            received += chunk
    except OSError:
        pass  # Linux says so when the other end is closed
    finally:
        os.close(terminal)
    assert process.wait(60) == 0, received.decode()
    return received.decode()


def shown(raw: str) -> list[str]:
    """The lines that stay on the screen: what comes after a carriage return overwrites the line."""
    return [line.rstrip("\r").rpartition("\r")[2].strip() for line in raw.split("\n")]


# --- not a terminal ----------------------------------------------------------
def test_in_a_pipe_a_process_prints_one_line_an_epoch_and_nothing_else(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[3] == "after" and lines[5] == "last" and len(lines) == 7
    matches = [LINE.fullmatch(line) for line in (*lines[:3], lines[4], lines[6])]
    assert [m and m.groups()[:2] for m in matches] == [("1", "3"), ("2", "3"), ("3", "3"), ("1", "1"), ("1", "1")]


def test_a_line_has_the_values_of_its_epoch(capsys: pytest.CaptureFixture[str]):
    learn = make_learner(metrics=accuracy).fit(3)
    out, err = capsys.readouterr()
    rows = [LINE.fullmatch(line) for line in out.splitlines()]
    assert err == "" and len(rows) == 3
    for i, (match, row) in enumerate(zip(rows, learn.recorder.values, strict=True), 1):
        assert match is not None and match.groups()[:2] == (str(i), "3")
        assert [float(cell) for cell in match.groups()[2:]] == pytest.approx(row, abs=1e-6)


def test_without_validation_data_a_line_has_the_train_loss_alone(capsys: pytest.CaptureFixture[str]):
    make_learner(valid=False).fit(1)
    assert re.fullmatch(r"epoch 1/1  train_loss \S+  time 00:00\n", capsys.readouterr().out)


def test_validate_get_preds_and_predict_print_nothing(capsys: pytest.CaptureFixture[str]):
    learn = make_learner()
    learn.validate()
    learn.get_preds()
    learn.predict(torch.zeros(3))
    assert capsys.readouterr() == ("", "")


def test_epochs_that_were_left_early_are_printed_with_what_was_measured(capsys: pytest.CaptureFixture[str]):
    class Leaves(Callback):
        def before_batch(self, learn):
            if learn.epoch == 0 and learn.training:
                raise StopTrain

        def before_validate(self, learn):
            if learn.epoch == 1:
                raise SkipValidate

    make_learner(Leaves()).fit(2)
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1/2  valid_loss \S+  time 00:00", first)
    assert re.fullmatch(r"epoch 2/2  train_loss \S+  time 00:00", second)


def test_a_fit_that_breaks_prints_the_epochs_that_ended(capsys: pytest.CaptureFixture[str]):
    class Breaks(Callback):
        def before_batch(self, learn):
            if learn.epoch == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_learner(Breaks()).fit(3)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and err == ""


# --- quieter -----------------------------------------------------------------
def test_no_logging_prints_nothing_and_no_bar_prints_lines_and_both_are_undone(capsys: pytest.CaptureFixture[str]):
    learn = make_learner()
    for context, n_lines in ((learn.no_logging(), 0), (learn.no_bar(), 1)):
        with context:
            learn.fit(1)
        assert len(capsys.readouterr().out.splitlines()) == n_lines
        learn.fit(1)
        assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("name", ["no_bar", "no_logging"])
def test_quietness_ends_with_its_block_also_after_an_error_and_when_nested(name: str):
    learn = make_learner(Progress(bar=False))
    [bar] = [cb for cb in learn.callbacks if isinstance(cb, Progress)]
    with pytest.raises(LookupError, match="lost"), getattr(learn, name)():
        raise LookupError("lost")
    with learn.no_logging():
        with getattr(learn, name)() as inner:
            assert inner is learn
        assert (bar.bar, bar.lines) == (False, False)
    assert (bar.bar, bar.lines) == (False, True)


def test_a_progress_may_be_quiet_from_the_start_or_be_removed(capsys: pytest.CaptureFixture[str]):
    make_learner(Progress(lines=False)).fit(1)
    make_learner().remove_callback(Progress).fit(1)
    assert capsys.readouterr() == ("", "")


# --- a terminal --------------------------------------------------------------
@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    return in_a_terminal(tmp_path_factory.mktemp("terminal"), SCRIPT)


def test_in_a_terminal_bars_and_a_table_of_epochs_appear(raw: str):
    lines = shown(raw)
    header = next(i for i, line in enumerate(lines) if "train_loss" in line)
    assert lines[header].split() == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]
    rows = [line.split() for line in lines[header + 1 : header + 4]]
    assert [row[0] for row in rows] == ["0", "1", "2"] and all(len(row) == 5 for row in rows)
    assert "█" in raw and re.search(r"Epoch \d/3", raw) and re.search(r"\d+(\.\d+)?% \[\d+/16", raw)
    assert "Traceback" not in raw and "Error" not in raw


def test_in_a_terminal_the_training_loss_is_shown_while_it_runs(raw: str):
    assert re.search(r"train_loss \d\.\d{4}", raw)


def test_in_a_terminal_no_bar_draws_none_and_no_logging_writes_nothing(raw: str):
    between = raw.split("after")[1].split("last")[0]
    assert "█" not in between and len([line for line in shown(between) if line]) == 1
    assert re.search(r"epoch 1/1  train_loss", between) and "█" in raw.split("last")[1]


UNUSUAL = """
from learnkit import Callback
class Breaks(Callback):
    def after_batch(self, learn):
        if learn.step == 20: raise KeyboardInterrupt
class Stream:
    def __init__(self, dl): self.dl = dl
    def __iter__(self): return iter(self.dl)
try: learn.fit(3, callbacks=[Breaks()])
except KeyboardInterrupt: print("interrupted", flush=True)
learn.fit(1)
print("unsized", flush=True)
Learner((Stream(learn.data.train_dl), Stream(learn.data.valid_dl)), nn.Linear(3, 2)).fit(2)
"""


def test_after_a_fit_that_broke_and_with_loaders_without_a_length_a_terminal_shows_bars_and_tables(tmp_path: Path):
    raw = in_a_terminal(tmp_path, SCRIPT.partition("learn.fit_one_cycle")[0] + UNUSUAL)
    assert "Traceback" not in raw
    before, _, rest = raw.partition("interrupted")
    again, _, unsized = rest.partition("unsized")
    for part, rows in ((before, ["0"]), (again, ["0"]), (unsized, ["0", "1"])):
        lines = [line.split() for line in shown(part)]
        header = next(i for i, words in enumerate(lines) if words[:1] == ["epoch"])
        assert "█" in part or part is unsized
        assert [words[0] for words in lines[header + 1 :] if len(words) >= 4 and words[0].isdigit()] == rows


def test_a_graph_of_something_that_is_not_measured_is_refused():
    learn = make_learner(Progress(graph="f1"))
    with pytest.raises(ValueError, match="graph='f1': this fit measures train_loss"):
        learn.fit(1)
