"""What loggers write is what the fit measured, once, also after an interruption; read back by the tools that they are
for.
"""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import Checkpoint, CSVLogger, JSONLogger, MLflowLogger, TensorBoardLogger, WandbLogger


class Dies(Callback):
    """Right after the step that it is given, when a checkpoint may have been taken."""

    order = Checkpoint.order - 10

    def __init__(self, step: int) -> None:
        self.at = step

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step == self.at:
            raise ConnectionAbortedError


def learner(*callbacks: Callback, nan: bool = False) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(24, 4)
    valid = (x[:5] * math.nan if nan else x[:5], (x[:5, 0] > 0).long())
    data = DataBunch.from_tensors((x, (x[:, 0] > 0).long()), valid, bs=4, seed=1)  # 6 steps an epoch
    return Learner(data, nn.Linear(4, 2), metrics=accuracy, callbacks=callbacks)


def table(path: str = "history.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def objects(path: str = "history.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- what is written ---------------------------------------------------------
def test_a_row_an_epoch_has_the_recorders_values():
    learn = learner(CSVLogger()).fit(3)
    assert [[float(row[name]) for name in learn.recorder.metric_names] for row in table()] == learn.recorder.values
    assert [(row["step"], row["epoch"]) for row in table()] == [("6", "0"), ("12", "1"), ("18", "2")]


@pytest.mark.parametrize("every", [1, 2, 4, 100])
def test_rows_of_steps_have_the_mean_loss_since_the_row_before(every: int):
    learn = learner(JSONLogger(every_n_steps=every)).fit_one_cycle(2)
    steps = [row for row in objects() if "loss" in row]
    assert [row["step"] for row in steps] == list(range(every, 13, every))
    for row in steps:
        assert row["loss"] == pytest.approx(
            sum(learn.recorder.losses[row["step"] - every : row["step"]]) / every, rel=1e-5
        )
        assert row["lr"] == learn.recorder.lrs[row["step"] - 1]


def test_the_settings_come_first_and_say_what_the_run_is():
    learn = learner(JSONLogger()).fit(2, 1e-2, wd=0.3)
    config = objects()[0]["config"]
    assert (
        config["model"],
        config["parameters"],
        config["optimizer"],
        config["lr"],
        config["weight_decay"],
        config["epochs"],
        config["steps"],
        config["batch_size"],
    ) == ("Linear", 10, "AdamW", 1e-2, 0.3, 2, 12, 4)
    assert len(objects()) == 1 + len(learn.recorder.values)


def test_what_is_no_number_is_null_in_json():
    learner(JSONLogger(), nan=True).fit(1)
    assert objects()[-1]["valid_loss"] is None and "NaN" not in Path("history.jsonl").read_text()


def test_steps_count_on_from_fit_to_fit_and_a_new_learner_begins_anew():
    learn = learner(CSVLogger(every_n_steps=3), JSONLogger())
    learn.fit(1).fit(2)
    assert [int(row["step"]) for row in table()] == [3, 6, 6, 9, 12, 12, 15, 18, 18]
    assert [row["step"] for row in objects() if "config" in row] == [0, 6]
    learner(CSVLogger(every_n_steps=3)).fit(1)
    assert [int(row["step"]) for row in table()] == [3, 6, 6]


def test_a_fit_that_fails_leaves_what_it_logged_and_no_open_file():
    log = CSVLogger(every_n_steps=1)
    with pytest.raises(ConnectionAbortedError):
        learner(log, Dies(4)).fit(1)
    assert [row["step"] for row in table()] == ["1", "2", "3", "4"] and log.lines.file is None


def test_a_file_that_cannot_be_written_is_told_with_its_name():
    Path("taken").write_text("")
    with pytest.raises(OSError, match=r"could not write taken/log.csv"):
        learner(CSVLogger("taken/log.csv")).fit(1)


def test_nothing_is_read_from_the_device_between_two_rows():
    reads = []

    class Counting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.__float__, torch.Tensor.item, torch.Tensor.tolist):
                reads.append(1)
            return super().__torch_function__(function, types, args, kwargs or {})

    def loss(pred, target):
        return nn.functional.cross_entropy(pred, target).as_subclass(Counting)

    n_reads = []
    for callbacks in ([], [JSONLogger(every_n_steps=5)]):
        reads.clear()
        learn = learner(*callbacks)
        learn.loss_func = loss
        learn.fit(2)
        n_reads.append(len(reads))
    assert n_reads[1] - n_reads[0] == 2  # at steps 5 and 10


# --- a resumed fit -----------------------------------------------------------
def interrupted(make: Any, at: int, every: int = 4) -> None:
    """A fit of 12 steps with checkpoints every 4, which dies after step `at` and is resumed."""
    callbacks = [make(), Checkpoint("kept", every_n_steps=every, every_n_epochs=None)]
    with pytest.raises(ConnectionAbortedError):
        learner(*callbacks, Dies(at)).fit(2)
    learner(make(), Checkpoint("kept", every_n_steps=every, every_n_epochs=None)).fit(2, resume=True)


@pytest.mark.parametrize("at", [2, 4, 5, 7, 8, 11])
def test_files_of_an_interrupted_fit_are_those_of_one_that_was_not(at: int):
    learner(CSVLogger("whole.csv", every_n_steps=3), JSONLogger("whole.jsonl", every_n_steps=3)).fit(2)
    interrupted(lambda: CSVLogger("log.csv", every_n_steps=3), at)
    assert Path("log.csv").read_text() == Path("whole.csv").read_text()
    shutil.rmtree("kept")
    interrupted(lambda: JSONLogger("log.jsonl", every_n_steps=3), at)
    assert Path("log.jsonl").read_text() == Path("whole.jsonl").read_text()


@pytest.mark.parametrize("make, name", [(CSVLogger, "log.csv"), (JSONLogger, "log.jsonl")])
def test_an_epochs_row_after_its_last_checkpoint_is_not_there_twice(make: Any, name: str):
    class DiesBetweenEpochs(Callback):
        def before_epoch(self, learn: Learner) -> None:
            if learn.epoch == 1:
                raise ConnectionAbortedError

    learner(make(f"whole-{name}", every_n_steps=3)).fit(2)
    with pytest.raises(ConnectionAbortedError):  # the checkpoint of step 6 is within the epoch that it ends
        learner(
            make(name, every_n_steps=3), Checkpoint("kept", every_n_steps=3, every_n_epochs=None), DiesBetweenEpochs()
        ).fit(2)
    learner(make(name, every_n_steps=3), Checkpoint("kept", every_n_steps=3, every_n_epochs=None)).fit(2, resume=True)
    assert Path(name).read_text() == Path(f"whole-{name}").read_text()


def test_a_checkpoint_before_the_first_row_keeps_what_a_log_begins_with():
    learner(JSONLogger("whole.jsonl")).fit(2)
    with pytest.raises(ConnectionAbortedError):
        learner(JSONLogger("log.jsonl"), Checkpoint("kept", every_n_steps=1), Dies(2)).fit(2)
    learner(JSONLogger("log.jsonl"), Checkpoint("kept")).fit(2, resume=True)
    assert Path("log.jsonl").read_text() == Path("whole.jsonl").read_text()


def test_a_line_that_was_cut_off_by_a_kill_is_gone_after_the_resume():
    learner(CSVLogger("whole.csv", every_n_steps=1)).fit(2)
    with pytest.raises(ConnectionAbortedError):
        learner(CSVLogger("log.csv", every_n_steps=1), Checkpoint("kept", every_n_steps=4), Dies(5)).fit(2)
    with Path("log.csv").open("a") as file:
        file.write("6,0.2")
    learner(CSVLogger("log.csv", every_n_steps=1), Checkpoint("kept", every_n_steps=4)).fit(2, resume=True)
    assert Path("log.csv").read_text() == Path("whole.csv").read_text()


def test_of_two_fits_the_second_is_resumed_and_the_first_stays():
    def script(*callbacks: Callback, resume: bool = False) -> None:
        learn = learner(CSVLogger("log.csv", every_n_steps=2), Checkpoint("kept", every_n_steps=2), *callbacks)
        learn.fit(1, resume=resume).fit(2, resume=resume)

    class Second(Callback):
        order = Checkpoint.order - 10

        def __init__(self, step: int) -> None:
            self.at = step

        def after_batch(self, learn: Learner) -> None:
            if learn.training and learn.n_fits == 2 and learn.step == self.at:
                raise ConnectionAbortedError

    learn = learner(CSVLogger("whole.csv", every_n_steps=2))
    learn.fit(1).fit(2)
    for at in (1, 3, 7):
        with pytest.raises(ConnectionAbortedError):
            script(Second(at))
        script(resume=True)
        assert Path("log.csv").read_text() == Path("whole.csv").read_text(), at
        shutil.rmtree("kept")


# --- read back by their own tools --------------------------------------------
def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_measured_once_also_after_a_resume():
    pytest.importorskip("tensorboard")
    learn = learner(TensorBoardLogger("whole", every_n_steps=3))
    learn.fit(2)
    whole = scalars("whole")
    losses = learn.recorder.losses
    assert whole["loss"] == [(n, pytest.approx(sum(losses[n - 3 : n]) / 3, rel=1e-5)) for n in (3, 6, 9, 12)]
    assert whole["accuracy"] == [(6 * (i + 1), pytest.approx(row[2])) for i, row in enumerate(learn.recorder.values)]
    interrupted(lambda: TensorBoardLogger("log", every_n_steps=3), 7)
    assert scalars("log") == whole


def test_mlflow_has_each_value_once_also_after_a_resume(monkeypatch):
    tracking: Any = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = Path("mlruns").absolute().as_uri()
    interrupted(lambda: MLflowLogger("digits", tracking_uri=uri, every_n_steps=3), 7)
    client = tracking.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["model"] == "Linear"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [3, 6, 9, 12]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "valid_loss")] == [6, 12]


def test_without_the_package_it_says_which_to_install_before_anything_is_trained(monkeypatch):
    for name in ("mlflow", "mlflow.tracking", "wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for logger in (MLflowLogger(), WandbLogger(), TensorBoardLogger()):
        learn = learner(logger)
        with pytest.raises(ImportError, match=f"{type(logger).__name__} needs"):
            learn.fit(1)
        assert learn.step == 0


@pytest.mark.parametrize("make", [CSVLogger, JSONLogger, TensorBoardLogger, MLflowLogger, WandbLogger])
def test_the_state_goes_round_and_settings_are_checked(make: Any):
    logger, other = make(every_n_steps=4), make(every_n_steps=4)
    logger.load_state_dict(
        {
            "n_before": 3,
            "n_done": 2,
            "next_step": 9,
            "total": torch.ones(()),
            "count": 8,
            "world_size": 1,
            "run_id": "a",
        }
    )
    other.load_state_dict({**logger.state_dict(), "n_done": 0})
    assert other.journal.n_before == logger.journal.n_before == 5
    with pytest.raises(ValueError, match="every_n_steps=0"):
        make(every_n_steps=0)


def test_wandb_takes_no_id_of_the_users():
    with pytest.raises(TypeError, match="id=…, which it sets itself"):
        WandbLogger(id="a")
