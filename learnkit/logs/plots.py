"""Plots of a fit. matplotlib, the extra `plots`, is imported at the first plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

SMOOTH, RAW, VALID, SECOND = "#1f4e9c", "#b9cbe8", "#d1603d", "#3b8f5a"


def import_pyplot() -> Any:
    """Return matplotlib.pyplot, or raise an ImportError that says what to install."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: install matplotlib, or the extra 'plots' of this library."
        ) from error
    return pyplot


def new_axes() -> Axes:
    """Return the axes of a new figure, 6.4 × 4 inches."""
    pyplot = import_pyplot()
    ax = pyplot.subplots(figsize=(6.4, 4), layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at each position, of fewer at the start."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def plot_loss_curve(
    ax: Axes, losses: Sequence[float], valid: Sequence[float], ends: Sequence[int], skip_start: int
) -> Axes:
    steps, shown = range(skip_start, len(losses)), losses[skip_start:]
    window = max(1, len(shown) // 30)
    ax.plot(steps, shown, color=RAW, linewidth=0.8, label="train, each step" if window > 1 else "train")
    if window > 1:
        ax.plot(
            steps, moving_average(shown, window), color=SMOOTH, linewidth=1.8, label=f"train, mean of {window} steps"
        )
    if ends and valid:
        ax.plot(ends, valid, color=VALID, linewidth=1.8, marker="o", markersize=4, label="validation")
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
    ax.legend(handles=lines, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
    return ax


def plot_columns(ax: Axes, columns: Mapping[str, Sequence[float]]) -> Axes:
    """Plot one line per column, by epoch."""
    from matplotlib.ticker import MaxNLocator

    for name, values in columns.items():
        ax.plot(range(1, len(values) + 1), values, linewidth=1.8, marker="o", markersize=4, label=name)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(columns) == 1:
        ax.set_ylabel(next(iter(columns)))
    else:
        ax.legend(frameon=False)
    return ax


def plot_sweep(
    ax: Axes, lrs: Sequence[float], losses: Sequence[float], marks: Mapping[str, float], best: float
) -> Axes:
    """Plot losses by rate on a logarithmic axis, with a point for each of `marks`.

    Values far above the start are cut off.
    """
    ax.plot(lrs, losses, color=SMOOTH, linewidth=1.8)
    for (name, rate), color in zip(marks.items(), (VALID, SECOND, "#8a5fb0"), strict=False):
        nearest = min(range(len(lrs)), key=lambda i: abs(lrs[i] - rate))
        ax.plot(
            rate, losses[nearest], marker="o", markersize=7, color=color, linestyle="none", label=f"{name} {rate:.1e}"
        )
    ax.set(xlabel="learning rate", ylabel="loss", xscale="log")
    if losses:
        ax.set_ylim(best - 0.05 * abs(losses[0] - best), max(losses[0] + 0.6 * abs(losses[0] - best), best * 1.05))
    if marks:
        ax.legend(frameon=False)
    return ax


def new_grid(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of rows × columns axes, each of the given size in inches, and these axes in reading order."""
    figure, grid = import_pyplot().subplots(
        rows, columns, figsize=(columns * width, rows * height), layout="constrained", squeeze=False
    )
    return figure, list(grid.flat)


def plot_layer_lines(
    steps: Sequence[int], values: Tensor, names: Sequence[str], titles: Sequence[str], *, log: bool = False
) -> Figure:
    """Plot one panel for each of `titles`, with one line for each of `names`.

    values: (steps, names, titles). Early layers are dark, late ones light.
    """
    figure, panels = new_grid(1, len(titles), width=4, height=3.2)
    from matplotlib import colormaps

    colors = colormaps["viridis"]([0.9 * i / max(1, len(names) - 1) for i in range(len(names))])
    for i, (ax, title) in enumerate(zip(panels, titles, strict=True)):
        for j, name in enumerate(names):
            ax.plot(steps, values[:, j, i].tolist(), color=colors[j], linewidth=1.3, label=name)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set(xlabel="step", title=title, yscale="log" if log else "linear")
    shown = [0, *range(-4, 0)] if len(names) > 12 else range(len(names))  # if many: the first and the last few
    handles = panels[-1].get_lines()
    figure.legend(handles=[handles[j] for j in shown], loc="outside right center", frameon=False, fontsize="small")
    return figure


def plot_layer_pictures(steps: Sequence[int], histograms: Tensor, names: Sequence[str], limit: float) -> Figure:
    """Plot one picture per name: histograms (steps, names, bins) side by side, colours on a logarithmic scale."""
    columns = min(3, len(names))
    figure, panels = new_grid(-(-len(names) // columns), columns, width=4, height=2.4)
    for ax in panels[len(names) :]:
        ax.remove()
    extent = (steps[0], max(steps[-1], steps[0] + 1), 0.0, limit) if steps else (0, 1, 0.0, limit)
    for j, (ax, name) in enumerate(zip(panels, names, strict=False)):
        shares = (1 + 1e4 * histograms[:, j].T).log()
        ax.imshow(
            shares.tolist() or [[0.0]],
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="magma",
            interpolation="nearest",
        )
        ax.set_title(name, fontsize="medium")
        ax.set(xlabel="step" if j >= len(names) - columns else "", ylabel="|output|" if j % columns == 0 else "")
    return figure
