"""Pictures of a fit. matplotlib is imported here, by whoever draws first, and is the extra `plots`."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH, RAW, VALID, SECOND = "#1f4e9c", "#b9cbe8", "#d1603d", "#3b8f5a"


def need_pyplot() -> Any:
    """matplotlib.pyplot; ImportError says what to install."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: it is the extra 'plots' of this library.") from error
    return pyplot


def new_axes() -> Axes:
    """Axes of a new figure, 6.4 × 4 inches."""
    ax = need_pyplot().subplots(figsize=(6.4, 4), layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values at each place, of fewer at the start."""
    sums = [0.]
    for value in values: sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def plot_loss_curve(ax: Axes, losses: Sequence[float], valid: Sequence[float], ends: Sequence[int], skip_start: int) -> Axes:
    steps, shown = range(skip_start, len(losses)), losses[skip_start:]
    window = max(1, len(shown) // 30)
    ax.plot(steps, shown, color=RAW, linewidth=.8, label="train, each step" if window > 1 else "train")
    if window > 1: ax.plot(steps, moving_average(shown, window), color=SMOOTH, linewidth=1.8, label=f"train, mean of {window} steps")
    if ends and valid: ax.plot(ends, valid, color=VALID, linewidth=1.8, marker="o", markersize=4, label="validation")
    ax.set(xlabel="step", ylabel="loss")
    ax.legend(frameon=False)
    return ax


def plot_rates(ax: Axes, lrs: Sequence[float], moms: Sequence[float]) -> Axes:
    lines = ax.plot(lrs, color=SMOOTH, linewidth=1.8, label="learning rate")
    ax.set(xlabel="step", ylabel="learning rate")
    if moms:
        right = ax.twinx()
        right.spines["top"].set_visible(False)
        lines += right.plot(moms, color=VALID, linewidth=1.4, linestyle="--", label="momentum")
        right.set_ylabel("momentum")
    ax.legend(handles=lines, frameon=False, loc="upper center", bbox_to_anchor=(.5, 1.12), ncols=2)
    return ax


def plot_columns(ax: Axes, columns: Mapping[str, Sequence[float]]) -> Axes:
    """One line a column, by epoch."""
    from matplotlib.ticker import MaxNLocator
    for name, values in columns.items():
        ax.plot(range(1, len(values) + 1), values, linewidth=1.8, marker="o", markersize=4, label=name)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(columns) == 1: ax.set_ylabel(next(iter(columns)))
    else: ax.legend(frameon=False)
    return ax
