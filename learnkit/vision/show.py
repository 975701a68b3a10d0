"""Grids of pictures. matplotlib is imported at the first drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from learnkit.logs.plots import import_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 1.5  # inches


def show_grid(pictures: Tensor, titles: Sequence[str], columns: int, *, colours: Sequence[str] | None = None) -> Figure:
    """Show pictures, float `(n, channels, height, width)` in [0, 1], row by row in a new figure, with titles."""
    pyplot = import_pyplot()
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    lines = max((title.count("\n") + 1 for title in titles), default=1)
    size = (columns * CELL, rows * (CELL * pictures.shape[2] / pictures.shape[3] + 0.17 * lines))
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for k, ax in enumerate(axes.flat):
        ax.axis("off")
        if k < len(pictures):
            show_picture(ax, pictures[k], titles[k], colours[k] if colours else "black")
    return figure


def show_picture(ax: Axes, picture: Tensor, title: str, colour: str) -> None:
    grey: Any = {"cmap": "gray", "vmin": 0, "vmax": 1} if len(picture) == 1 else {}
    ax.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), interpolation="nearest", **grey)
    ax.set_title(title, fontsize=8, color=colour, pad=3)
