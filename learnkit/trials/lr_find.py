"""The learning-rate range test: a short fit with a rising rate, whose losses say which rates can be used."""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from learnkit.callbacks.param_scheduler import ParamScheduler
from learnkit.devices.accelerator import widest_float
from learnkit.hooks import Callback, StopFit
from learnkit.learner import Learner
from learnkit.loop.fit import check_count
from learnkit.optim.groups import check_rate, set_rates
from learnkit.schedule import exponential, linear
from learnkit.trials.trial import unchanged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.98  # of the losses, a debiased moving average, as in fastai v1
DIVERGED = 4.0  # times the best smoothed loss: where a sweep is stopped, as in fastai v1
SWEEPS = {"exponential": exponential, "linear": linear}
FEWEST = 10  # steps from which a curve says something


class RateFinder:
    """What a sweep of learning rates found: print it, plot it, or take `suggestion` for a fit.

    lrs             the rate of each step
    losses          the smoothed training loss after it, over the samples of all ranks
    raw_losses      as they were measured
    suggestions     {"valley", "steep", "minimum"}: rates, read off three ways; `suggestion` is the valley's

    >>> found = learn.lr_find()  # doctest: +SKIP
    >>> learn.fit_one_cycle(5, found.suggestion)  # doctest: +SKIP
    """

    def __init__(self, lrs: Sequence[float], raw_losses: Sequence[float], *, diverged: bool = False) -> None:
        self.lrs, self.raw_losses, self.diverged = list(lrs), list(raw_losses), diverged
        self.losses = smoothed(self.raw_losses)

    @property
    def suggestion(self) -> float:
        return self.suggestions["valley"]

    @cached_property
    def suggestions(self) -> dict[str, float]:
        """Rates by three rules. Raises ValueError where the sweep ended too soon for any."""
        lrs, losses = self.trusted()
        if len(lrs) < FEWEST:
            raise ValueError(
                f"the sweep ended after {len(self.lrs)} steps, at a rate of "
                f"{self.lrs[-1] if self.lrs else math.nan:.2g}: too soon to suggest one. Begin lower (start_lr), take "
                f"more steps (num_it), or check the untrained model's loss."
            )
        return {
            "valley": lrs[valley(losses)],
            "steep": lrs[steepest(lrs, losses)],
            "minimum": lrs[losses.index(min(losses))] / 10,
        }

    def trusted(self) -> tuple[list[float], list[float]]:
        """Without the first tenth, where the average is of few losses, and where it diverged without the last five."""
        start, stop = len(self.lrs) // 10, len(self.lrs) - 5 * self.diverged
        return self.lrs[start:stop], self.losses[start:stop]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The smoothed loss by rate, with a point at each suggestion."""
        from learnkit.logs.plots import new_axes, plot_sweep

        marks = self.suggestions if len(self.trusted()[0]) >= FEWEST else {}
        return plot_sweep(ax or new_axes(), self.lrs, self.losses, marks, best=min(self.losses, default=1.0))

    def __repr__(self) -> str:
        found = f"lr_find: {len(self.lrs)} steps" + (
            f" from {self.lrs[0]:.2g} to {self.lrs[-1]:.2g}" if self.lrs else ""
        )
        if len(self.trusted()[0]) < FEWEST:
            return f"{found}, too few for a suggestion"
        return f"{found}; " + ", ".join(f"{name} {rate:.2e}" for name, rate in self.suggestions.items())


# --- the sweep ---------------------------------------------------------------
def find_rate(learn: Learner, start_lr: float, end_lr: float, num_it: int, *, sweep: str, stop_div: bool) -> RateFinder:
    """What `learn.lr_find` does: see there."""
    check_count("num_it", num_it)
    for name, rate in {"start_lr": start_lr, "end_lr": end_lr}.items():
        check_rate(name, rate)
    if not 0 < start_lr < end_lr:
        raise ValueError(f"start_lr={start_lr}, end_lr={end_lr}: expected two rates above 0, the lower one first.")
    if sweep not in SWEEPS:
        raise ValueError(f"sweep={sweep!r}: expected {' or '.join(map(repr, SWEEPS))}.")
    rates = Sweep(SWEEPS[sweep](start_lr, end_lr).values(num_it), stop_div=stop_div)
    with unchanged(learn):
        learn.data = copy.copy(learn.data)
        learn.data.valid_dl = None  # nothing is measured between two steps
        learn.fit(num_it, start_lr, callbacks=[rates])  # an epoch has one step at least
    return RateFinder(rates.lrs[: len(rates.losses)], rates.losses, diverged=rates.diverged)


class Sweep(Callback):
    """Gives each step the next rate, and ends the fit after the last one, or where the loss has diverged, on all ranks
    alike.
    """

    order = ParamScheduler.order + 1  # after the schedules that a Learner may have

    def __init__(self, lrs: Sequence[float], *, stop_div: bool) -> None:
        self.lrs, self.stop_div, self.diverged = list(lrs), stop_div, False
        self.losses: list[float] = []
        self.average, self.best = SmoothedLoss(), math.inf

    def before_step(self, learn: Learner) -> None:
        set_rates(learn.opt, [self.lrs[learn.step]] * len(learn.opt.param_groups))

    def after_step(self, learn: Learner) -> None:
        loss = loss_of_all(learn)
        smooth = self.average.add(loss) if math.isfinite(loss) else math.inf
        self.best = min(self.best, smooth)
        self.diverged = self.stop_div and (smooth > DIVERGED * self.best if self.best > 0 else smooth == math.inf)
        if math.isfinite(smooth):
            self.losses.append(loss)
        if self.diverged or not math.isfinite(smooth) or learn.step == len(self.lrs):
            raise StopFit


def loss_of_all(learn: Learner) -> float:
    """The loss of the step just made, over the samples of all ranks: one collective and one read from the device."""
    n = learn.count(learn.inputs, learn.target) if learn.in_step is None else learn.in_step
    wide = widest_float(learn.device)
    n = n.to(learn.device, wide) if isinstance(n, torch.Tensor) else torch.full((), n, dtype=wide, device=learn.device)
    total, n = learn.ranks.all_sum([learn.loss.detach().to(wide) * n, n])
    return float(total / n)


class SmoothedLoss:
    """A debiased moving average."""

    def __init__(self) -> None:
        self.sum = self.weight = 0.0

    def add(self, value: float) -> float:
        self.sum = SMOOTHING * self.sum + (1 - SMOOTHING) * value
        self.weight = SMOOTHING * self.weight + 1 - SMOOTHING
        return self.sum / self.weight


def smoothed(losses: Sequence[float]) -> list[float]:
    average = SmoothedLoss()
    return [average.add(loss) for loss in losses]


# --- reading the curve -------------------------------------------------------
def steepest(lrs: Sequence[float], losses: Sequence[float]) -> int:
    """Where the loss falls most for a factor of the rate."""
    slopes = [
        (b - a) / math.log(right / left) for (a, b), (left, right) in zip(pairwise(losses), pairwise(lrs), strict=True)
    ]
    return slopes.index(min(slopes))


def valley(losses: Sequence[float]) -> int:
    """The middle of the longest fall: of the longest strictly decreasing subsequence, as an index into `losses`.

    Source: the rule called "valley" of fastai 2 (by ESRI), whose middle is half way along the subsequence, back from
    its end.
    """
    length, end = longest_fall(losses)
    third = length / 3
    return end - length + int(third) + int(third / 2)


def longest_fall(losses: Sequence[float]) -> tuple[int, int]:
    """(length, index of its last member) of the longest strictly decreasing subsequence; of several, the one that ends
    first.
    """
    tails: list[float] = []  # tails[k]: the largest last member, negated, of the falls of k + 1 so far
    length, end = 0, 0
    for i, loss in enumerate(losses):
        k = bisect_left(tails, -loss)
        tails[k : k + 1] = [-loss]
        if k + 1 > length:
            length, end = k + 1, i
    return length, end
