"""Gradient accumulation: one optimizer step for several batches, equal to the step of one batch with all samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learnkit.callbacks.distributed import Distributed
from learnkit.data.loaders import n_batches
from learnkit.hooks import Callback, Run, SkipStep, StopFit
from learnkit.learner import Learner
from learnkit.loop.loss import count_like, not_zero, weighted


class Accumulate(Callback):
    """Make one optimizer step for every `n` batches: the gradient is that of one batch of all their samples.

    Each batch is weighted by its number of samples. On several ranks the samples of all ranks count, and gradients are
    reduced once per step. Schedules, clipping, averages and checkpoints count optimizer steps; during a step
    `learn.loss` is the mean over its batches. Batch norm normalizes each batch separately. When a fit is stopped
    between two steps, the batches since the last step are dropped, unless the fit is resumed.

    Args:
        n: batches per step. The batches left over at the end of an epoch make a step together.
        count: a function (inputs, target) -> the weight of a batch, for a loss that is a mean over something other than
            samples, for example over the tokens that are not padding. It returns a number or a 0-d tensor; the tensor
            is not read from the device. None: the number of samples.

    Raises:
        ValueError: when `n` is not a whole number of 1 or more.
        TypeError: when `count` is not a function.

    Example:
        >>> learn.fit_one_cycle(5, callbacks=[Accumulate(4)])  # doctest: +SKIP
    """

    order = Distributed.order - 5
    unique = True
    per_rank = True

    def __init__(self, n: int, count: Callable[[Any, Any], Any] | None = None) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n={n!r}: expected a number of batches, 1 or more.")
        if count is not None and not callable(count):
            raise TypeError(f"count={count!r}, expected a function (inputs, target) -> number.")
        self.batches_per_step, self.count = n, count
        self.unit: float | None = (
            None  # the usual weight of a batch, the same on all ranks: keeps gradients at their usual size
        )
        self.last_batch = -1  # the epoch's last batch index, where it is known
        self.is_final: bool | None = None  # whether the current batch is the last one of its window; None: no batch
        self.learned = False  # whether the current batch had a backward pass
        # The current window, which is the batches of one step:
        self.total: Any = 0  # sum of the batches' weights, on this rank
        self.total_of_all: Any = 0  # the same over all ranks, as far as it is known without communication
        self.loss: Any = 0.0  # weighted sum of the batches' losses
        self.parameters: list[torch.nn.Parameter] = []
        self.restored: dict[str, Any] | None = None  # the window of a checkpoint that was saved within one

    def around_fit(self, learn: Learner, run: Run) -> None:
        count, self.parameters, self.unit, self.restored = learn.count, list(learn.model.parameters()), None, None
        if self.count is not None:
            learn.count = self.count
        self.forget()
        try:
            run()
        finally:
            learn.count, self.parameters = count, []
            learn.n_held = self.forget()

    def around_train(self, learn: Learner, run: Run) -> None:
        n = n_batches(learn.dl)
        self.last_batch = -1 if n is None else learn.first_batch + n - 1
        leaves = False
        try:
            run()
        except StopFit:
            leaves = True  # a Checkpoint may save the window
            raise
        finally:
            if learn.n_held and not leaves:  # stopped within a window, so no step follows
                learn.zero_grad()
                learn.n_held = self.forget()

    def around_batch(self, learn: Learner, run: Run) -> None:
        if not learn.training:
            return run()
        if self.unit is None:
            self.unit = self.usual_count(learn)
        if self.restored is not None:
            self.put_back(learn)
        self.is_final = learn.n_held + 1 >= self.batches_per_step or learn.batch_index == self.last_batch
        self.learned, learn.whole = False, self.unit * self.batches_per_step
        try:
            if self.is_final:
                run()
            else:
                with learn.no_sync():
                    run()
        finally:
            self.is_final = learn.whole = None
            self.learned = False

    def after_backward(self, learn: Learner) -> None:
        self.learned = True

    def around_step(self, learn: Learner, run: Run) -> None:
        if self.learned:
            self.add(learn)
        elif self.is_final is not False:
            learn.reduce_gradients()  # the window's last batch had no backward pass, or there was no such batch
        if self.is_final is False:
            learn.n_held += 1
            raise SkipStep
        loss, whole = learn.loss, learn.whole
        if isinstance(self.total, Tensor) or self.total:
            learn.whole = self.weigh(learn)  # a second pass within the step needs it, too
        if isinstance(self.loss, Tensor):
            learn.loss, learn.in_step = self.loss / not_zero(self.total), self.total
        try:
            run()
        finally:
            learn.loss, learn.whole, learn.in_step = loss, whole, None
            learn.n_held = self.forget()

    def add(self, learn: Learner) -> None:
        own = learn.count(learn.inputs, learn.target)
        self.total = self.total + own
        if self.count is None:
            self.total_of_all += learn.n_of_all(learn.batch_index, own)
        self.loss = self.loss + weighted(learn.loss, own)

    def weigh(self, learn: Learner) -> Any:
        """Rescale the gradients from the total weight of a regular window to that of this one; return a rank's share of
        the latter.
        """
        assert self.unit is not None
        regular = self.unit * self.batches_per_step
        total = not_zero(self.total_of_all if self.count is None else learn.ranks.all_sum(self.total))
        share = (count_like(self.loss, total) if isinstance(total, Tensor) else total) / learn.world_size
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients and (isinstance(share, Tensor) or share != regular):
            torch._foreach_mul_(gradients, regular / share)  # type: ignore[reportPrivateImportUsage]
        return share

    def usual_count(self, learn: Learner) -> float:
        """Return the weight of the fit's first batch, the mean over ranks; reads from the device, once."""
        return float(learn.ranks.all_sum(learn.count(learn.inputs, learn.target))) / learn.world_size or 1.0

    def forget(self) -> int:
        """Begin a new window; returns its number of batches, 0."""
        self.total, self.total_of_all, self.loss = 0, 0, 0.0
        return 0

    # --- within a window -----------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"unit": self.unit}
        if isinstance(self.loss, Tensor):
            state["window"] = {
                "total": self.total,
                "total_of_all": self.total_of_all,
                "loss": self.loss,
                "gradients": [p.grad for p in self.parameters],
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unit, self.restored = state["unit"], state.get("window")

    def put_back(self, learn: Learner) -> None:
        """Restore the window of the checkpoint, unless this fit resumes from the window's start."""
        window, self.restored = self.restored, None
        assert window is not None
        if not learn.n_held:
            return
        self.total, self.total_of_all, self.loss = (
            to_device_of(learn, window[name]) for name in ("total", "total_of_all", "loss")
        )
        for p, gradient in zip(self.parameters, window["gradients"], strict=True):
            p.grad = None if gradient is None else gradient.to(p.device, copy=True)


def to_device_of(learn: Learner, value: Any) -> Any:
    return value.to(learn.device) if isinstance(value, Tensor) else value
