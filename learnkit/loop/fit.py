"""From the arguments of a fit method to the fit: rates and schedules, the steps that are planned, seeds, the
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from learnkit.data.loaders import check_loader, n_batches
from learnkit.data.order import EpochOrder, items_per_batch, mix, parts_of, rest_of
from learnkit.hooks import Callback
from learnkit.loop.session import as_callbacks, session
from learnkit.optim.groups import (
    check_rate,
    complete_state,
    has_modes,
    layer_groups,
    make_optimizer,
    momentum_name,
    own_rate,
    param_groups,
    set_rates,
    set_weight_decay,
    spread,
    zero_grad_of,
)

if TYPE_CHECKING:
    from learnkit.learner import Learner, Rate


def run_fit(
    learn: Learner,
    epochs: int,
    schedules: dict[str, Any],
    wd: float | None,
    callbacks: Callback | Iterable[Callback],
    max_steps: int | None,
    resume: bool,
) -> Learner:
    """All fit methods: `schedules["lr"]` is a rate, or a pair of it and a function of a rate that gives its
    schedule.
    """
    from learnkit.callbacks.optimizer_modes import OptimizerModes
    from learnkit.callbacks.param_scheduler import ParamScheduler
    from learnkit.callbacks.stop_after import StopAfter

    if learn.is_running:
        raise RuntimeError("fit was called while this Learner runs: let the fit under way end first.")
    check_count("epochs", epochs)
    check_loader(learn.data.train_dl, "train_dl")
    extra = as_callbacks(callbacks)
    if max_steps is not None:
        extra.append(StopAfter(steps=check_count("max_steps", max_steps)))
    opt = optimizer_of(learn)
    if has_modes(opt):
        extra.append(OptimizerModes())
    schedules = set_constant_rates(learn, opt, dict(schedules))
    if schedules:
        extra.append(ParamScheduler(schedules))
    if wd is not None or not isinstance(learn.opt_func, Optimizer):
        set_weight_decay(opt, check_rate("wd", learn.wd if wd is None else wd))
    learn.n_epochs, learn.max_steps, learn.resume, learn.resumed = epochs, max_steps, resume, None
    learn.epoch, learn.step, learn.batch_index, learn.n_items_done, learn.n_held = 0, 0, -1, 0, 0
    learn.n_fits += 1
    learn.zero_grad, learn.saved_weights = (
        zero_grad_of(opt),
        nullcontext,
    )  # an earlier fit's average is of other weights
    seed_ranks(learn)
    seed, learn.order_seed = learn.order_seed, seed_of_order(learn)
    try:
        with session(learn, extra):
            learn.plan_steps()
            learn.zero_grad()  # what an interrupted loop or a backward by hand left behind
            try:
                learn.stages.fit()
            finally:
                learn.zero_grad()
    finally:
        learn.order_seed = seed
    return learn


def set_constant_rates(learn: Learner, opt: Optimizer, schedules: dict[str, Any]) -> dict[str, Any]:
    """Set the rate of each layer group where it is constant; return the schedules of what is not."""
    lr, cycle = schedules.pop("lr") if isinstance(schedules["lr"], tuple) else (schedules.pop("lr"), None)
    rates = rates_of(learn, opt, lr)
    if cycle:
        schedules["lr"] = [cycle(rate) for rate in rates]
    else:
        set_rates(opt, rates)
    if "mom" in schedules and momentum_name(opt) is None:
        del schedules["mom"]
    return schedules


def rates_of(learn: Learner, opt: Optimizer, lr: Rate | None) -> list[float]:
    """One rate a layer group."""
    if lr is None and isinstance(learn.opt_func, Optimizer):
        return [own_rate(group) for group in opt.param_groups]
    n_groups = 1 + max(group.get("layer_group", i) for i, group in enumerate(opt.param_groups))
    return spread(learn.lr if lr is None else lr, n_groups)


def planned_steps(learn: Learner) -> tuple[int | None, int]:
    """(optimizer steps of this fit, by how many schedules are ahead of them), from the training loader as it is now and
    the place that a resumed fit goes on from; None: the loader has no length.

    On another number of ranks, the steps are those that were done and those of the samples that are left. What is left
    of a schedule is what would be left if it had been this number from the start: it is where the samples are, and ends
    with them.
    """
    loader, place = learn.data.train_dl, learn.resumed
    if place is not None and place["items_per_batch"] == items_per_batch(loader):
        return place["n_steps"], place.get("steps_ahead", 0)
    length = n_batches(loader)
    if length is None:
        return learn.max_steps, 0

    def n_steps(n_batches: int) -> int:
        return -(-n_batches // learn.batches_per_step)  # a last short window counts too

    def limited(n: int) -> int:
        return n if learn.max_steps is None else min(n, learn.max_steps)

    whole = n_steps(length) * learn.n_epochs
    if place is None:
        return limited(whole), 0
    rest = n_batches(rest_of(loader, learn.n_items_done))
    planned = limited(learn.step + n_steps(rest or 0) + n_steps(length) * (learn.n_epochs - learn.epoch - 1))
    return planned, limited(whole) - planned


def seed_of_order(learn: Learner) -> int:
    """The seed of the order of samples in a fit: the Learner's, else the one of its training loader."""
    if learn.order_seed is not None:
        return learn.order_seed
    return next(
        (part.seed for part in parts_of(learn.data.train_dl) if isinstance(part, EpochOrder)), torch.initial_seed()
    )


def seed_ranks(learn: Learner) -> None:
    """Seed torch from `seed` if there is one; on other ranks than 0 at any rate, whose dropout must not be rank 0's."""
    if learn.seed is not None:
        torch.manual_seed(mix(learn.seed, learn.epochs_trained, learn.rank))
    elif learn.rank:
        torch.manual_seed(mix(int(torch.randint(2**62, ())), learn.rank))


def optimizer_of(learn: Learner) -> Optimizer:
    """The optimizer of the model as it is now; one that exists is kept, with its state."""
    if learn.opt is None:
        assert not isinstance(learn.opt_func, Optimizer)
        groups = param_groups(learn.model, layer_groups(learn.model, learn.splitter), bn_wd=learn.bn_wd)
        if not groups:
            raise ValueError(f"the model ({type(learn.model).__name__}) has no parameters: there is nothing to train.")
        learn.opt = make_optimizer(learn.opt_func, groups, spread(learn.lr, 1)[-1])
    held = {id(p) for group in learn.opt.param_groups for p in group["params"]}
    if not any(id(p) in held for p in learn.model.parameters()):
        raise ValueError(
            "the optimizer holds none of the model's parameters: it was built for another model, or before the "
            "model was replaced. Build it from learn.model.parameters(), or set learn.opt = None."
        )
    lost = [name for name, p in learn.model.named_parameters() if p.requires_grad and id(p) not in held]
    if lost and not isinstance(learn.opt_func, Optimizer):
        raise ValueError(
            f"the optimizer does not hold {', '.join(lost[:5])}: the model was changed after the first fit. Set "
            "learn.opt = None, and the next fit builds a new one."
        )
    complete_state(learn.opt)
    return learn.opt


def check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not a whole number.")
    if value < 1:
        raise ValueError(f"{name}={value}: expected 1 or more.")
    return value
