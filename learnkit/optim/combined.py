"""Several optimizers as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from learnkit.optim.groups import complete_state
from learnkit.optim.state import load_optimizer


class Together(Optimizer):
    """Several optimizers for different parameters that step, are scheduled, saved and skipped (in float16) as one.

    If a fit is given no rate, each optimizer keeps its own. To give one of them its own loss, use a callback and
    differentiate the loss with `learn.differentiate(loss)`, which scales it if float16 requires that.

    Args:
        *optimizers: optimizers; no two may have a parameter in common

    Raises:
        ValueError: when there is no optimizer, or two have the same parameter
        TypeError: when an argument is not a torch.optim.Optimizer

    Example:
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]  # doctest: +SKIP
        >>> rest = [p for p in model.parameters() if p.ndim != 2]  # doctest: +SKIP
        >>> opt = Together(Muon(matrices, lr=0.02), AdamW(rest, lr=3e-3))  # doctest: +SKIP
        >>> Learner(data, model, opt_func=opt).fit_one_cycle(5)  # doctest: +SKIP
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise ValueError("Together got no optimizer, expected one or more.")
        for opt in optimizers:
            if not isinstance(opt, Optimizer):
                raise TypeError(f"Together got {type(opt).__name__}, expected a torch.optim.Optimizer.")
        for opt in optimizers:
            complete_state(opt)
        self.optimizers = optimizers
        groups = [group for opt in optimizers for group in opt.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.param_groups = groups  # the optimizers' own groups: a rate that is set here applies to them

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Together cannot take a closure, because it is unclear which optimizer would call it.")
        for opt in self.optimizers:
            opt.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state like that of one optimizer: the parameters of all are numbered consecutively."""
        state, groups = {}, []
        for opt, first in self.numbered():
            own = opt.state_dict()
            state |= {first + number: value for number, value in own["state"].items()}
            groups += [
                {**group, "params": [first + number for number in group["params"]]} for group in own["param_groups"]
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = list(state_dict["param_groups"])
        for opt, first in self.numbered():
            own, groups = groups[: len(opt.param_groups)], groups[len(opt.param_groups) :]
            last = first + sum(len(group["params"]) for group in own)
            load_optimizer(
                opt,
                {
                    "state": {n - first: value for n, value in state_dict["state"].items() if first <= n < last},
                    "param_groups": [{**group, "params": [n - first for n in group["params"]]} for group in own],
                },
            )

    def numbered(self) -> list[tuple[Optimizer, int]]:
        """Return each optimizer with the number of its first parameter."""
        found, n = [], 0
        for opt in self.optimizers:
            found.append((opt, n))
            n += sum(len(group["params"]) for group in opt.param_groups)
        return found
