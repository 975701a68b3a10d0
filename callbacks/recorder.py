"""The history of a fit: loss, rates and momentum of every step, the values of every epoch, and their plots."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from learnkit.checkpoint.files import as_path
from learnkit.data.batch import count_samples
from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.logs.trace import Trace
from learnkit.optim.groups import momentum_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALIKE = "Raise Skip* on all ranks, and Stop* in after_step or after_batch."


class Recorder(Callback):
    """Record the history of the last fit. Only reading an attribute reads from the device; recording never does.

    Attributes:
        losses: training loss of every optimizer step; on several ranks that of all ranks, after the end of the epoch.
        lrs: the last layer group's rate in each step.
        moms: the last layer group's momentum or first beta in each step.
        metric_names: names of the columns of `values`: train_loss, valid_loss, metrics.
        values: one row per epoch; train_loss is the mean over the epoch's samples.

    Example:
        >>> learn.recorder.values[-1]  # doctest: +SKIP
        [0.31, 0.35, 0.91]
    """

    order = 100
    unique = True
    in_trials = False
    per_rank = True  # within an epoch each rank keeps its own losses

    def __init__(self) -> None:
        self.trace = Trace()
        self.counts: list[Any] = []  # samples of each step, or its weight by Accumulate's `count`: 0-d tensors, too
        self.rates: list[Any] = []  # see lrs; 0-d tensors if the optimizer's rates are
        self.momenta: list[Any] = []  # see moms
        self.metric_names: tuple[str, ...] = ()
        self.values: list[list[float]] = []
        self.ends: list[int] = []  # number of steps at the end of each epoch
        self.momentum: str | None = None
        self.is_main = True

    @property
    def losses(self) -> list[float]:
        """Training loss of every optimizer step; reads from the device."""
        return self.trace.read().tolist()

    @property
    def lrs(self) -> list[float]:
        """The last layer group's rate in each step."""
        self.rates = read_losses(self.rates)
        return self.rates

    @property
    def moms(self) -> list[float]:
        """The last layer group's momentum or first beta in each step."""
        self.momenta = read_losses(self.momenta)
        return self.momenta

    def before_fit(self, learn: Learner) -> None:
        self.__init__()
        self.metric_names, self.momentum, self.is_main = learn.value_names, momentum_name(learn.opt), learn.rank == 0

    def after_step(self, learn: Learner) -> None:
        self.trace.append(learn.loss.detach().clone())  # a copy: the user may change the loss in place later
        self.counts.append(count_samples(learn.inputs, learn.target) if learn.in_step is None else learn.in_step)
        group = learn.opt.param_groups[-1]
        lr = group["lr"]
        self.rates.append(lr.clone() if isinstance(lr, torch.Tensor) else lr)
        if self.momentum is not None:
            if self.momentum not in group:
                group = next(g for g in reversed(learn.opt.param_groups) if self.momentum in g)
            mom = group[self.momentum]
            if self.momentum == "betas":
                mom = mom[0]
            self.momenta.append(mom.clone() if isinstance(mom, torch.Tensor) else mom)

    def after_train(self, learn: Learner) -> None:
        start = self.ends[-1] if self.ends else 0
        own = self.trace.read()[start:].double()  # reads from the device, once an epoch
        counts = torch.tensor(
            read_losses(self.counts[start:]), dtype=torch.float64
        )  # reads once more if `count` returns tensors,
        self.rates, self.momenta = self.lrs, self.moms  # and if the optimizer's rates are tensors on the device
        n_steps = learn.ranks.gather(len(counts))
        if len(set(n_steps)) > 1:
            raise ValueError(f"the ranks have done different numbers of steps in this epoch: {n_steps}. {ALIKE}")
        if len(counts) == 0:
            return
        sums, counts = learn.ranks.all_sum(
            [own * counts, counts]
        )  # once an epoch; a gather would return as many as there are ranks
        self.counts[start:] = counts.tolist()
        if learn.world_size > 1:
            self.trace.replace(start, sums / counts)
        learn.values["train_loss"] = float(sums.sum() / counts.sum())

    def after_epoch(self, learn: Learner) -> None:
        self.ends.append(len(self.counts))
        self.values.append([learn.values.get(name, float("nan")) for name in self.metric_names])

    def plot_losses(self, ax: Axes | None = None, *, skip_start: int = 0) -> Axes:
        """Plot the training loss of every step, its moving average as a thick line, and the epochs' validation losses.

        Args:
            ax: matplotlib axes to draw on. None: new ones.
            skip_start: number of first steps to leave out.

        Returns:
            The axes.
        """
        from learnkit.logs.plots import new_axes, plot_loss_curve

        column = self.metric_names.index("valid_loss") if "valid_loss" in self.metric_names else None
        valid = [] if column is None else [row[column] for row in self.values]
        return plot_loss_curve(ax or new_axes(), self.losses, valid, self.ends, skip_start)

    def plot_lr(self, ax: Axes | None = None) -> Axes:
        """Plot the rate of every step, and the momentum on a second axis.

        Args:
            ax: matplotlib axes to draw on. None: new ones.

        Returns:
            The axes.
        """
        from learnkit.logs.plots import new_axes, plot_rates

        return plot_rates(ax or new_axes(), self.lrs, self.moms)

    def plot_metrics(self, ax: Axes | None = None) -> Axes:
        """Plot every metric by epoch, without the losses.

        Args:
            ax: matplotlib axes to draw on. None: new ones.

        Returns:
            The axes.

        Raises:
            ValueError: when the fit has no metrics.
        """
        from learnkit.logs.plots import new_axes, plot_columns

        columns = {
            name: [row[i] for row in self.values]
            for i, name in enumerate(self.metric_names)
            if not name.endswith("_loss")
        }
        if not columns:
            raise ValueError("there are no metrics to plot: give Learner(…, metrics=…) and validation data.")
        return plot_columns(ax or new_axes(), columns)

    def to_csv(self, path: str | Path) -> Path:
        """Write a header and one row per epoch to a CSV file; on several ranks only rank 0 writes.

        Args:
            path: the file.

        Returns:
            The path.
        """
        path = as_path(path)
        if not self.is_main:
            return path
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", *self.metric_names])
            writer.writerows([i, *row] for i, row in enumerate(self.values))
        return path

    def state_dict(self) -> dict[str, Any]:
        rows = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("lrs", "moms", "ends")}
        rows["counts"] = torch.tensor(read_losses(self.counts), dtype=torch.float64)
        return {"losses": self.trace.read(), "values": self.values, "metric_names": list(self.metric_names), **rows}

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Combine the ranks' states: in the current epoch each rank had the losses of its own samples. Rank 0 gets the
        counts of all ranks.
        """
        first = states[0]
        start = int(first["ends"][-1]) if len(first["ends"]) else 0
        own = [state["counts"][start:].cpu() for state in states]
        sums = [state["losses"][start:].cpu().double() * counts for state, counts in zip(states, own, strict=True)]
        counts = torch.stack(own).sum(0)
        losses = (torch.stack(sums).sum(0) / counts).to(first["losses"])
        return {
            **first,
            "losses": torch.cat([first["losses"][:start], losses]),
            "counts": torch.cat([first["counts"][:start].cpu(), counts if rank == 0 else torch.zeros_like(counts)]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trace = Trace()
        self.trace.read_before = state["losses"].cpu()
        self.metric_names, self.values = tuple(state["metric_names"]), [list(row) for row in state["values"]]
        self.counts, self.rates, self.momenta = (state[name].tolist() for name in ("counts", "lrs", "moms"))
        self.ends = state["ends"].long().tolist()


def read_losses(values: list[Any]) -> list[float]:
    """Return the values as numbers; the tensors among them, all on one device, take one read."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        return values
    numbers = iter(torch.stack([tensor.to(tensors[-1].device) for tensor in tensors]).tolist())
    return [next(numbers) if isinstance(value, torch.Tensor) else value for value in values]
