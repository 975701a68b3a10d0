"""A Learner in Ray Train: it reports to Ray, resumes after failures and reads Ray datasets.

Needs `ray[train]`, which is imported when it is used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from learnkit.callbacks.checkpoint import Checkpoint
from learnkit.checkpoint.files import as_path
from learnkit.checkpoint.resume import begin_at, order_states, place_of, restore_training, training_state
from learnkit.checkpoint.snapshot import newest_snapshot, next_name, write_snapshot
from learnkit.checkpoint.weights import snapshot_from_main
from learnkit.hooks import Callback, Deferred, Run, StopFit
from learnkit.learner import Learner


class RayReport(Callback):
    """Report `learn.values` and a checkpoint to Ray Train after each epoch, and resume exactly after a failure.

    For functions that are run by a ray.train.torch.TorchTrainer. Ray keeps the checkpoint of rank 0, which has the
    format of `Checkpoint`: its files are plain. With `FailureConfig(max_failures=…)` a run that lost a worker resumes
    from the last checkpoint and ends like one that did not. (Ray collects reports about once per second: if a worker is
    lost sooner after an epoch, that epoch is lost.)

    Raises:
        RuntimeError: at the start of the fit, when the process is not a Ray Train worker

    Example:
        >>> learn = Learner(data, model, callbacks=[RayReport()]).to_distributed()  # doctest: +SKIP
    """

    order = Checkpoint.order - 5
    unique = True
    in_trials = False

    def __init__(self) -> None:
        self.parts: dict[str, Any] | None = None  # of the checkpoint from which this fit resumes, until they are loaded

    def around_fit(self, learn: Learner, run: Run) -> None:
        check_in_ray()
        found = snapshot_from_main(learn, read_latest)
        self.parts = None
        if found is not None and begin_at(learn, found[1]["run"]["place"]):
            self.parts = found[1]
        run()

    def before_epoch(self, learn: Learner) -> None:
        self.put_back(learn)

    def after_fit(self, learn: Learner) -> None:
        self.put_back(learn)  # a finished fit has no epoch in which to load them

    def put_back(self, learn: Learner) -> None:
        parts, self.parts = self.parts, None
        if parts is not None:
            restore_training(learn, self, parts)

    def around_epoch(self, learn: Learner, run: Run) -> None:
        with Deferred(StopFit) as stop:
            run()
        self.report(learn, over=stop.signal is not None or learn.epoch + 1 == learn.n_epochs)
        stop.release()

    def report(self, learn: Learner, *, over: bool) -> None:
        """Report to Ray. All ranks must call this, because Ray waits for them; rank 0 provides the checkpoint."""
        from ray import train  # type: ignore[attr-defined]

        parts = training_state(learn, self, place_of(learn, epoch_over=True, over=over), order_states(learn))
        metrics = {"epoch": learn.epoch, "step": learn.step, **learn.values}
        with tempfile.TemporaryDirectory() as folder:
            about = {"run": "ray", "epoch": learn.epoch, "step": learn.step, "values": {}}
            learn.ranks.on_main(
                lambda: write_snapshot(Path(folder), next_name(Path(folder), learn.step), parts, about),
                "write a checkpoint for Ray",
            )
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder) if learn.rank == 0 else None)


def check_in_ray() -> None:
    try:
        from ray import train  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError("RayReport needs Ray Train: pip install 'ray[train]'.") from error
    try:
        train.get_context().get_world_size()
    except Exception as error:
        raise RuntimeError(
            "RayReport needs Ray Train, and this process is not one of its workers: run the function with "
            "fit_on_ray(…) or a ray.train.torch.TorchTrainer, or remove the callback."
        ) from error


def read_latest() -> list[Any] | None:
    """Return [name, parts] of the checkpoint that Ray gives to a resumed run; None at the first start."""
    from ray import train  # type: ignore[attr-defined]

    found = train.get_checkpoint()
    if found is None:
        return None
    with found.as_directory() as folder:
        found_there = newest_snapshot(Path(folder))
    return None if found_there is None else [found_there[0].name, found_there[1]]


class RayLoader:
    """A worker's shard of a Ray dataset as a loader: batches are mappings from column to tensor, one pass per epoch.

    The order is Ray's. It is not a function of (seed, epoch), and it changes with the number of workers.

    Args:
        shard: what ray.train.get_dataset_shard(name) returns; it is already the worker's own shard
        bs: rows per batch
        target: the column that is the target; it is passed to the model's loss as "target"
        drop_last: as in Ray's iter_torch_batches
        shuffle_buffer: number of rows within which rows are shuffled, as in Ray's iter_torch_batches; None: no
            shuffling

    Raises:
        KeyError: when the dataset has no column `target`

    Example:
        >>> DataBunch(RayLoader(ray.train.get_dataset_shard("train"), bs=64, target="label"))  # doctest: +SKIP
    """

    is_sharded = True

    def __init__(
        self,
        shard: Any,
        *,
        bs: int = 64,
        target: str = "target",
        drop_last: bool = True,
        shuffle_buffer: int | None = None,
    ) -> None:
        self.shard, self.batch_size, self.target, self.drop_last, self.shuffle_buffer = (
            shard,
            bs,
            target,
            drop_last,
            shuffle_buffer,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.shard.iter_torch_batches(
            batch_size=self.batch_size, drop_last=self.drop_last, local_shuffle_buffer_size=self.shuffle_buffer
        ):
            if self.target not in batch:
                raise KeyError(f"the dataset has no column {self.target!r}, expected one of {', '.join(batch)}.")
            yield {("target" if name == self.target else name): column for name, column in batch.items()}


def fit_on_ray(
    train_func: Callable[..., Any],
    num_workers: int = 2,
    use_gpu: bool = False,
    *,
    config: Mapping[str, Any] | None = None,
    datasets: Mapping[str, Any] | None = None,
    storage_path: str | Path | None = None,
    name: str | None = None,
    max_failures: int = 0,
) -> Any:
    """Run `train_func` on Ray workers, which are the ranks of one group.

    Args:
        train_func: a script as a function, without arguments, or with `config` as its argument if that is given
        num_workers: number of processes
        use_gpu: whether each process uses one GPU
        config: argument of `train_func`
        datasets: Ray datasets by name; the function reads one with RayLoader(ray.train.get_dataset_shard(name))
        storage_path: where Ray stores what RayReport reports; None: Ray's own folder
        name: name of the run; a run whose name exists is resumed; None: a new name
        max_failures: how many times a failed run is restarted from its last checkpoint

    Returns:
        Ray's Result (metrics, checkpoint, error).

    Example:
        >>> fit_on_ray(train, num_workers=2)  # doctest: +SKIP
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # type: ignore[import-not-found]
    from ray.train.torch import TorchTrainer  # type: ignore[import-not-found]

    run_config = RunConfig(
        name=name,
        storage_path=None if storage_path is None else str(as_path(storage_path).absolute()),
        failure_config=FailureConfig(max_failures=max_failures),
    )
    return TorchTrainer(
        train_func,
        train_loop_config=None if config is None else dict(config),
        datasets=dict(datasets or {}),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=run_config,
    ).fit()
