"""The Lookahead optimizer wrapper: k steps forward, one step back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learnkit.callbacks.clip_gradients import ClipGradients
from learnkit.checkpoint.regroup import mean_state
from learnkit.devices.dtensor import like, own_parts
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner


class Lookahead(Callback):
    """After every `k` optimizer steps, keep only the share `alpha` of the weights' change in them (Zhang et al., 2019).

    Args:
        k: number of optimizer steps.
        alpha: share of the change that is kept, from 0 to 1.

    Raises:
        ValueError: when `k` is not a whole number of 1 or more, or `alpha` is not from 0 to 1.

    Example:
        >>> learn.fit(5, callbacks=[Lookahead(k=5)])  # doctest: +SKIP
    """

    order = ClipGradients.order + 10
    unique = True

    def __init__(self, k: int = 5, alpha: float = 0.5) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k={k!r}: expected a number of steps, 1 or more.")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha}: expected a number from 0 to 1.")
        self.k, self.alpha = k, alpha
        self.fast: list[Any] = []  # the model's parameters
        self.slow: list[Tensor] = []  # their values after the last k steps
        self.n_steps = 0  # number of steps of this fit

    def before_fit(self, learn: Learner) -> None:
        self.fast, self.n_steps = list(learn.model.parameters()), 0
        self.slow = [p.detach().clone() for p in self.fast]

    def around_step(self, learn: Learner, run: Run) -> None:
        run()
        self.n_steps += 1
        if self.n_steps % self.k:
            return
        with torch.no_grad():
            fast, slow = own_parts(self.fast), own_parts(self.slow)
            torch._foreach_lerp_(slow, fast, self.alpha)  # type: ignore[reportPrivateImportUsage]
            torch._foreach_copy_(fast, slow)  # type: ignore[reportPrivateImportUsage]

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        return mean_state(states)

    def state_dict(self) -> dict[str, Any]:
        return {"n_steps": self.n_steps, "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_steps = state["n_steps"]
        for own, value in zip(self.slow, state["slow"], strict=True):
            own.copy_(like(own, value))
