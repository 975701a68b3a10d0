"""A log for MLflow."""

from __future__ import annotations

import os
from typing import Any

from learnkit.callbacks.recorder import Recorder
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.logs.journal import Journal


class MLflowLogger(Callback):
    """Log to MLflow: the settings as parameters, the values of every epoch, and the loss and rate of every n-th step.

    A resumed fit continues its run. MLflow cannot remove values, so those that the run already has of steps after the
    checkpoint stay, and these steps are not logged twice. On several ranks rank 0 logs. Needs the package mlflow or
    mlflow-skinny.

    Args:
        experiment: name of the experiment; it is created if it does not exist.
        run_name: name of the run. None: MLflow chooses it.
        tracking_uri: where MLflow logs to. None: as MLflow's own settings say.
        every_n_steps: also log the loss and the rate of every n-th step. None: only epochs.

    Raises:
        ImportError: at the start of the fit, when neither package is installed.

    Example:
        >>> learn.fit(5, callbacks=[MLflowLogger("digits")])  # doctest: +SKIP
    """

    order = Recorder.order - 20
    in_trials = False
    per_rank = True

    def __init__(
        self,
        experiment: str = "learnkit",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        *,
        every_n_steps: int | None = None,
    ) -> None:
        self.experiment, self.run_name = experiment, run_name
        self.tracking_uri = None if tracking_uri is None else os.path.expanduser(tracking_uri)
        self.journal = Journal(every_n_steps)
        self.run_id = ""  # ID of the current run, on rank 0
        self.known: dict[str, int] = {}  # name -> the last step that the run has for it
        self.client: Any = None

    def around_fit(self, learn: Learner, run: Run) -> None:
        mlflow_client()  # raises before training when the package is missing
        with self.journal.of_fit(learn, self):
            run()

    def after_step(self, learn: Learner) -> None:
        self.journal.step(learn, self)

    def after_epoch(self, learn: Learner) -> None:
        self.journal.epoch(learn, self)

    def state_dict(self) -> dict[str, Any]:
        return {**self.journal.state(), "run_id": self.run_id}

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        return self.journal.regroup(states, rank)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.journal.load(state)
        self.run_id = state["run_id"]

    # --- the sink ------------------------------------------------------------
    def open(self, after: int | None, names: list[str]) -> None:
        self.client = mlflow_client()(self.tracking_uri)
        if after is None or not self.run_id:
            self.run_id = self.new_run()
        else:
            self.client.update_run(self.run_id, status="RUNNING")
        self.known = {
            name: max((point.step for point in self.client.get_metric_history(self.run_id, name)), default=-1)
            for name in names
        }

    def new_run(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        number = self.client.create_experiment(self.experiment) if found is None else found.experiment_id
        return self.client.create_run(number, run_name=self.run_name).info.run_id

    def config(self, values: dict[str, Any]) -> None:
        there = self.client.get_run(self.run_id).data.params
        for name, value in values.items():  # keep the first fit's: MLflow's parameters cannot change
            if name not in there:
                self.client.log_param(self.run_id, name, value)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            if step <= self.known.get(name, -1):
                continue
            self.client.log_metric(self.run_id, name, value, step=step)
            self.known[name] = step

    def finish(self) -> None:
        self.client.set_terminated(self.run_id)


def mlflow_client() -> Any:
    try:
        from mlflow.tracking import MlflowClient  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "MLflowLogger needs MLflow, which is not installed: install mlflow, or mlflow-skinny."
        ) from error
    return MlflowClient
