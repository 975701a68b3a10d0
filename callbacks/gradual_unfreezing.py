"""Gradual unfreezing: train the last layer group first, then one more group at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import Parameter

from learnkit.callbacks.distributed import Distributed
from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.optim.groups import layer_groups


class GradualUnfreezing(Callback):
    """Train the last layer group first, and one more group every `every` epochs, within one fit and one schedule.

    Frozen groups are not stepped: their gradients are dropped, so momentum and weight decay do not change them either.
    The gradients are computed, so a step costs as much as with an unfrozen model; but any wrapper, on any number of
    ranks, has the same parameters during the whole fit. Source: Howard & Ruder, 2018.

    Args:
        every: number of epochs until the next group joins.
        plan: replaces `every`: {epoch: how many of the first groups are frozen from there on}, such as
            {0: 2, 3: 1, 5: 0}.

    Raises:
        ValueError: when `every` is not a whole number of 1 or more, or, at the start of the fit, when the model has
            only one layer group or `plan` does not match the groups.

    Example:
        >>> learn.fit_one_cycle(6, slice(1e-4, 1e-2), callbacks=[GradualUnfreezing(every=2)])  # doctest: +SKIP
    """

    order = Distributed.order - 1  # after the ranks have reduced gradients, before other callbacks read them

    def __init__(self, every: int = 1, *, plan: Mapping[int, int] | None = None) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: expected a whole number of epochs, 1 or more.")
        self.every, self.plan = every, None if plan is None else dict(plan)
        self.groups: list[list[Parameter]] = []
        self.waiting: list[Parameter] = []

    def before_fit(self, learn: Learner) -> None:
        self.groups = layer_groups(learn.model, learn.splitter)
        if len(self.groups) == 1:
            raise ValueError(
                "the model is one layer group, so there is nothing to unfreeze gradually: give Learner(…, splitter=…)."
            )
        for epoch, n in (self.plan or {}).items():
            if epoch < 0 or not 0 <= n < len(self.groups):
                raise ValueError(
                    f"plan={self.plan}: expected epochs from 0, and numbers of groups from 0 to {len(self.groups) - 1}."
                )

    def before_epoch(self, learn: Learner) -> None:
        self.waiting = [p for group in self.groups[: self.n_waiting(learn.epoch)] for p in group]

    def n_waiting(self, epoch: int) -> int:
        if self.plan is None:
            return max(0, len(self.groups) - 1 - epoch // self.every)
        begun = [start for start in self.plan if start <= epoch]
        return self.plan[max(begun)] if begun else len(self.groups) - 1

    def after_backward(self, learn: Learner) -> None:
        self.drop_gradients()  # also after SAM's second pass within the step

    def before_step(self, learn: Learner) -> None:
        self.drop_gradients()  # also those that the ranks have just reduced

    def drop_gradients(self) -> None:
        for p in self.waiting:
            p.grad = None
