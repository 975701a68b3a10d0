"""The learning-rate range test: a short fit with an increasing rate, whose losses show which rates are usable."""

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

SMOOTHING = 0.98  # of the debiased moving average of the losses, as in fastai v1
DIVERGED = 4.0  # a sweep stops at this multiple of the best smoothed loss, as in fastai v1
SWEEPS = {"exponential": exponential, "linear": linear}
FEWEST = 10  # a curve with fewer steps is not used


class RateFinder:
    """The result of a learning-rate sweep: print it, plot it, or use its `suggestion` for a fit.

    Attributes:
        lrs: the rate of each step
        losses: the smoothed training loss after each step, over the samples of all ranks
        raw_losses: the losses before smoothing
        suggestions: {"valley", "steep", "minimum"}: rates by three rules; `suggestion` is the valley's

    Example:
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
        """Return the rates by three rules.

        Raises:
            ValueError: when the sweep has too few steps
        """
        lrs, losses = self.trusted()
        if len(lrs) < FEWEST:
            raise ValueError(
                f"the sweep ended after {len(self.lrs)} steps, at a rate of "
                f"{self.lrs[-1] if self.lrs else math.nan:.2g}: too soon to suggest one. Start lower (start_lr), use "
                f"more steps (num_it), or check the untrained model's loss."
            )
        return {
            "valley": lrs[valley(losses)],
            "steep": lrs[steepest(lrs, losses)],
            "minimum": lrs[losses.index(min(losses))] / 10,
        }

    def trusted(self) -> tuple[list[float], list[float]]:
        """Return (rates, losses) without the first tenth, where the average has few losses.

        If the sweep diverged, the last five are removed too.
        """
        start, stop = len(self.lrs) // 10, len(self.lrs) - 5 * self.diverged
        return self.lrs[start:stop], self.losses[start:stop]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the smoothed loss by rate, with a point at each suggestion.

        Args:
            ax: axes to draw on; None: a new figure
        """
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
    """Implement `learn.lr_find`."""
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
        learn.data.valid_dl = None  # no validation between two steps
        learn.fit(num_it, start_lr, callbacks=[rates])  # an epoch has at least one step
    return RateFinder(rates.lrs[: len(rates.losses)], rates.losses, diverged=rates.diverged)


class Sweep(Callback):
    """Set the next rate before each step; end the fit after the last rate, or when the loss diverged, on all ranks."""

    order = ParamScheduler.order + 1  # after the Learner's own schedules

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
    """Return the loss of the last step, over the samples of all ranks: one collective and one read from the device."""
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
    """Return where the loss falls most for a constant factor of the rate."""
    slopes = [
        (b - a) / math.log(right / left) for (a, b), (left, right) in zip(pairwise(losses), pairwise(lrs), strict=True)
    ]
    return slopes.index(min(slopes))


def valley(losses: Sequence[float]) -> int:
    """Return the middle of the longest strictly decreasing subsequence, as an index into `losses`.

    Source: the rule called "valley" of fastai 2 (by ESRI), whose middle is half of the subsequence's length before its
    end.
    """
    length, end = longest_fall(losses)
    third = length / 3
    return end - length + int(third) + int(third / 2)


def longest_fall(losses: Sequence[float]) -> tuple[int, int]:
    """Return (length, index of the last member) of the longest strictly decreasing subsequence.

    If there are several, it is the one that ends first.
    """
    tails: list[float] = []  # tails[k]: the largest last member, negated, of decreasing subsequences of length k + 1
    length, end = 0, 0
    for i, loss in enumerate(losses):
        k = bisect_left(tails, -loss)
        tails[k : k + 1] = [-loss]
        if k + 1 > length:
            length, end = k + 1, i
    return length, end
