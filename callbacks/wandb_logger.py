"""A log for Weights & Biases."""

from __future__ import annotations

from typing import Any

from learnkit.callbacks.recorder import Recorder
from learnkit.checkpoint.files import as_path
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.logs.journal import Journal


class WandbLogger(Callback):
    """Log to Weights & Biases: the settings, the values of every epoch, and the loss and rate of every n-th step.

    A resumed fit continues its run; steps that the run already has are not logged twice. On several ranks rank 0 logs.
    Needs the package wandb.

    Args:
        every_n_steps: also log the loss and the rate of every n-th step. None: only epochs.
        options: arguments of wandb.init: project, name, dir, mode="offline" and so on.

    Raises:
        TypeError: when `options` has id, resume or config, which the callback sets itself.
        ImportError: at the start of the fit, when wandb is not installed.

    Example:
        >>> learn.fit(5, callbacks=[WandbLogger(project="digits")])  # doctest: +SKIP
    """

    order = Recorder.order - 20
    in_trials = False
    per_rank = True

    def __init__(self, *, every_n_steps: int | None = None, **options: Any) -> None:
        for name in ("id", "resume", "config"):
            if name in options:
                raise TypeError(
                    f"WandbLogger got {name}=…, which it sets itself: give the other options of wandb.init only."
                )
        self.options = options | ({"dir": str(as_path(options["dir"]))} if options.get("dir") else {})
        self.journal = Journal(every_n_steps)
        self.run_id = ""  # ID of the current run, on rank 0
        self.run: Any = None

    def around_fit(self, learn: Learner, run: Run) -> None:
        import_wandb()  # raises before training when the package is missing
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
        goes_on = after is not None and self.run_id
        self.run = import_wandb().init(**self.options, **({"id": self.run_id, "resume": "allow"} if goes_on else {}))
        self.run_id = self.run.id

    def config(self, values: dict[str, Any]) -> None:
        self.run.config.update(values, allow_val_change=True)

    def log(self, values: dict[str, float], step: int) -> None:
        if step >= self.run.step:
            self.run.log(values, step=step)

    def finish(self) -> None:
        self.run.finish()


def import_wandb() -> Any:
    try:
        import wandb  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("WandbLogger needs the package wandb, which is not installed.") from error
    return wandb
