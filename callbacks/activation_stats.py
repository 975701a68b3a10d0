# pyright: reportPrivateImportUsage=false
"""Statistics of every layer's outputs in training: means, standard deviations, dead units and histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learnkit.callbacks.recorder import Recorder
from learnkit.devices.nested import tensors_in
from learnkit.devices.transfer import stacked_on_host
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Select = Callable[[str, nn.Module], bool]


class ActivationStats(Callback):
    """Record statistics of layer outputs in training; plot them with `plot()` and `plot_histograms()`.

    Nothing is read from the device until you read `stats` or `histograms`, or plot them. On several ranks each rank
    records its own samples. The picture of histograms over time follows the idea of Stefano Giomo's "colorful
    dimension", which fastai has too.

    Args:
        every: record every `every`-th step.
        select: a function (name, module) -> whether this layer is recorded. None: all modules that have parameters and
            no submodules.
        limit: the histograms show |output| from 0 to `limit`; larger outputs count in the last bin.
        bins: number of bins of a histogram.
        near_zero: outputs of a smaller magnitude count as dead.

    Attributes:
        names: names of the recorded layers, in the model's order.
        stats: float (steps, layers, 3): mean, standard deviation, share near zero.
        histograms: float (steps, layers, bins): shares.

    Raises:
        ValueError: when `every` or `bins` is not a whole number of 1 or more, when `limit` > `near_zero` >= 0 is not
            true, or, at the start of the fit, when no layer is selected.

    Example:
        >>> learn.fit(1, callbacks=[seen := ActivationStats(every=5)])  # doctest: +SKIP
        >>> seen.plot_histograms()  # doctest: +SKIP
    """

    order = Recorder.order + 20
    per_rank = True
    in_trials = False

    def __init__(
        self,
        every: int = 1,
        *,
        select: Select | None = None,
        limit: float = 10.0,
        bins: int = 40,
        near_zero: float = 0.05,
    ) -> None:
        for name, value in (("every", every), ("bins", bins)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more.")
        if not limit > near_zero >= 0:
            raise ValueError(f"limit={limit}, near_zero={near_zero}: expected limit > near_zero >= 0.")
        self.every, self.select, self.limit, self.bins, self.near_zero = (
            every,
            select or is_leaf,
            limit,
            bins,
            near_zero,
        )
        self.names: list[str] = []
        self.steps: list[int] = []
        self.rows: list[Tensor] = []  # one per recorded step: (layers, 3 + bins), on the device
        self.seen: dict[str, Tensor] = {}  # rows of the current batch, by the layer's name

    def before_fit(self, learn: Learner) -> None:
        self.names = [name for name, module in learn.model.named_modules() if name and self.select(name, module)]
        if not self.names:
            raise ValueError("no layer is selected, so there is nothing to record: see `select`.")
        self.steps, self.rows = [], []

    def around_batch(self, learn: Learner, run: Run) -> None:
        if not learn.training or learn.step % self.every:
            return run()
        self.seen, step = {}, learn.step
        layers = [(name, module) for name, module in learn.model.named_modules() if name in self.names]
        handles = [module.register_forward_hook(self.hook(learn, name)) for name, module in layers]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        nothing = torch.full((3 + self.bins,), torch.nan, device=learn.device)  # for a layer that is not used
        self.steps.append(step)
        self.rows.append(torch.stack([self.seen.get(name, nothing) for name in self.names]))

    def hook(self, learn: Learner, name: str) -> Callable[..., None]:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not learn.training:
                return  # an evaluation that another callback runs within the batch
            tensors = [t.detach().float().flatten() for t in tensors_in(output) if t.is_floating_point()]
            if tensors:
                self.seen[name] = self.measure(torch.cat(tensors))

        return see

    def measure(self, values: Tensor) -> Tensor:
        size = values.abs()
        shares = torch.histc(size.clamp(max=self.limit), self.bins, 0.0, self.limit) / max(1, values.numel())
        return torch.cat(
            [torch.stack([values.mean(), values.std(correction=0), (size < self.near_zero).float().mean()]), shares]
        )

    # --- reading -------------------------------------------------------------
    @property
    def recorded(self) -> Tensor:
        """All rows: float (steps, layers, 3 + bins), on the CPU; reads from the device."""
        return stacked_on_host(self.rows) if self.rows else torch.zeros(0, len(self.names), 3 + self.bins)

    @property
    def stats(self) -> Tensor:
        """Mean, standard deviation and share near zero: float (steps, layers, 3), on the CPU; reads from the device."""
        return self.recorded[..., :3]

    @property
    def histograms(self) -> Tensor:
        """Histograms of the magnitudes: float (steps, layers, bins), on the CPU; reads from the device."""
        return self.recorded[..., 3:]

    def plot(self) -> Figure:
        """Plot mean, standard deviation and share near zero by step, one line per layer.

        Returns:
            The figure (matplotlib).
        """
        from learnkit.logs.plots import plot_layer_lines

        return plot_layer_lines(
            self.steps, self.stats, self.names, ("mean", "standard deviation", f"share below {self.near_zero}")
        )

    def plot_histograms(self) -> Figure:
        """Plot one picture per layer: x is the step, y the magnitude of outputs, colour their share.

        Returns:
            The figure (matplotlib).
        """
        from learnkit.logs.plots import plot_layer_pictures

        return plot_layer_pictures(self.steps, self.histograms, self.names, self.limit)

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "steps": self.steps, "recorded": self.recorded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.steps, self.rows = list(state["names"]), list(state["steps"]), list(state["recorded"])


def is_leaf(name: str, module: nn.Module) -> bool:
    return not any(module.children()) and next(module.parameters(), None) is not None
