# pyright: reportPrivateImportUsage=false
"""Norms of gradients, weights and updates, for each parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learnkit.callbacks.recorder import Recorder
from learnkit.devices.dtensor import whole
from learnkit.devices.transfer import stacked_on_host
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMS = ("gradients", "weights", "updates")


class GradientStats(Callback):
    """Record the norms of every parameter, of its gradient, and of its change in the step; plot them with `plot()`.

    The gradients are those that the optimizer uses: of all ranks, clipped, unscaled. Nothing is read from the device
    until you read the norms or plot them. Each recorded step costs a copy of the weights. An update of about a
    thousandth of its weight per step is usual.

    Args:
        every: record every `every`-th step.

    Attributes:
        names: names of the parameters.
        gradients: float (steps, parameters): norms of the gradients; 0 for a parameter without a gradient.
        weights: float (steps, parameters): norms of the parameters before the step.
        updates: float (steps, parameters): norms of the changes in the step.

    Raises:
        ValueError: when `every` is not a whole number of 1 or more.

    Example:
        >>> learn.fit(1, callbacks=[seen := GradientStats(every=10)])  # doctest: +SKIP
        >>> seen.plot()  # doctest: +SKIP
    """

    order = Recorder.order + 20  # innermost: after all callbacks that change gradients
    in_trials = False

    def __init__(self, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: expected 1 or more.")
        self.every = every
        self.names: list[str] = []
        self.steps: list[int] = []
        self.rows: list[Tensor] = []  # one per recorded step: (3, parameters), on the device

    def before_fit(self, learn: Learner) -> None:
        self.names, self.steps, self.rows = [name for name, _ in learn.model.named_parameters()], [], []

    def around_step(self, learn: Learner, run: Run) -> None:
        if learn.step % self.every:
            return run()
        parameters, step = [p.detach() for p in learn.model.parameters()], learn.step
        gradients = norms([torch.zeros_like(p) if p.grad is None else p.grad for p in learn.model.parameters()])
        before = [p.clone() for p in parameters]
        run()
        self.steps.append(step)
        self.rows.append(torch.stack([gradients, norms(before), norms(list(torch._foreach_sub(parameters, before)))]))

    # --- reading -------------------------------------------------------------
    @property
    def recorded(self) -> Tensor:
        """All rows: float (steps, 3, parameters), on the CPU; reads from the device."""
        return stacked_on_host(self.rows) if self.rows else torch.zeros(0, 3, len(self.names))

    @property
    def gradients(self) -> Tensor:
        """Norms of the gradients: float (steps, parameters), on the CPU; reads from the device."""
        return self.recorded[:, 0]

    @property
    def weights(self) -> Tensor:
        """Norms of the parameters before the step: float (steps, parameters), on the CPU; reads from the device."""
        return self.recorded[:, 1]

    @property
    def updates(self) -> Tensor:
        """Norms of the changes in the step: float (steps, parameters), on the CPU; reads from the device."""
        return self.recorded[:, 2]

    def plot(self) -> Figure:
        """Plot the norms of gradients, of weights, and of updates relative to their weights, by step; one line per
        parameter, on a logarithmic axis.

        Returns:
            The figure (matplotlib).
        """
        from learnkit.logs.plots import plot_layer_lines

        gradients, weights, updates = self.recorded.unbind(1)
        values = torch.stack([gradients, weights, (updates / weights).where(weights > 0, torch.nan)], -1)
        return plot_layer_lines(self.steps, values, self.names, ("gradient", "weight", "update / weight"), log=True)

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "steps": self.steps, "recorded": self.recorded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.steps, self.rows = list(state["names"]), list(state["steps"]), list(state["recorded"])


def norms(tensors: list[Tensor]) -> Tensor:
    """Return the norms of the whole tensors, also where they are sharded."""
    return whole(torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]))
