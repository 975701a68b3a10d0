# pyright: reportPrivateImportUsage=false
"""How large gradients, weights and updates are, parameter by parameter."""

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
    """Record the norms of every parameter's gradient, of the parameter, and of what the step changes, every `every`-th
    step.

    names       of the parameters
    gradients, weights, updates     float (steps, parameters): norms; a gradient's is 0 where there is none

    Gradients are those that the optimizer sees: of all ranks, clipped, unscaled. Nothing is read from the device until
    one of these is. Costs a copy of the weights at each recorded step. An update of about a thousandth of its weight
    per step is usual.

    >>> learn.fit(1, callbacks=[seen := GradientStats(every=10)])  # doctest: +SKIP
    >>> seen.plot()  # doctest: +SKIP
    """

    order = Recorder.order + 20  # innermost: after whoever changes gradients
    in_trials = False

    def __init__(self, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: expected 1 or more.")
        self.every = every
        self.names: list[str] = []
        self.steps: list[int] = []
        self.rows: list[Tensor] = []  # one a recorded step: (3, parameters), on the device

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
        """float (steps, 3, parameters), on the CPU; reads the device."""
        return stacked_on_host(self.rows) if self.rows else torch.zeros(0, 3, len(self.names))

    @property
    def gradients(self) -> Tensor:
        return self.recorded[:, 0]

    @property
    def weights(self) -> Tensor:
        return self.recorded[:, 1]

    @property
    def updates(self) -> Tensor:
        return self.recorded[:, 2]

    def plot(self) -> Figure:
        """Norms of gradients, of weights, and of updates as a share of their weights, by step; one line a parameter,
        logarithmic.
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
    """Of the whole tensors, also where each rank has a part of them."""
    return whole(torch.stack([norm.float() for norm in torch._foreach_norm(tensors)]))
