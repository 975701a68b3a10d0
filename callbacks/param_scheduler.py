"""Schedules of the optimizer's hyper-parameters, from tables that are computed before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.optim.groups import check_hyper, scale_of, separate, set_hyper
from learnkit.schedule import Schedule

PerGroup = Schedule | Sequence[Schedule]


class ParamScheduler(Callback):
    """Set optimizer hyper-parameters before each step, from a Schedule for all layer groups or from one for each.

    The fit must know its number of steps: for a loader without a length, give fit(…, max_steps=…). A schedule replaces
    the value that fit was given for the same name.

    Args:
        schedules: {name: a Schedule, or a list of one for each layer group}. Names are those of the optimizer's groups
            ("lr", "weight_decay", "eps", …), "mom" for its momentum or first beta, and "wd" for the decoupled weight
            decay of an optimizer that has none of its own.

    Raises:
        ValueError: at the start of the fit, when the number of steps is not known, or the number of schedules is not
            that of the layer groups.
        TypeError: at the start of the fit, when a value is not a Schedule.

    Example:
        >>> from learnkit.schedule import linear
        >>> warm_up = ParamScheduler({"lr": linear(1e-5, 1e-3)})
    """

    order = -20

    def __init__(self, schedules: Mapping[str, PerGroup]) -> None:
        self.schedules = dict(schedules)
        self.n_steps = 0
        self.tables: list[tuple[dict, str, list[float]]] = []  # (optimizer group, name, a value for each step)

    def before_fit(self, learn: Learner) -> None:
        if learn.n_steps is None:
            raise ValueError(
                f"a schedule of {', '.join(self.schedules)} needs the number of steps, and "
                f"{type(learn.data.train_dl).__name__} has no length. "
                "Give fit(…, max_steps=…), or train at a constant rate with fit."
            )
        self.n_steps, self.tables = learn.n_steps + learn.steps_ahead, []
        for name, schedule in self.schedules.items():
            check_hyper(learn.opt, name)
            if not all(
                isinstance(part, Schedule) for part in (schedule if isinstance(schedule, Sequence) else [schedule])
            ):
                raise TypeError(
                    f"{name}: got {schedule!r}, expected a Schedule or a list of one for each layer group: use one of "
                    "learnkit.schedule, such as constant(0.1)."
                )
            n_groups = 1 + max(group.get("layer_group", i) for i, group in enumerate(learn.opt.param_groups))
            if not isinstance(schedule, Schedule) and len(schedule) != n_groups:
                raise ValueError(
                    f"{name}: got {len(schedule)} schedules, expected one for each of the {n_groups} layer groups."
                )
            for i, group in enumerate(learn.opt.param_groups):
                if name in ("wd", "weight_decay") and not group.get("decays", True):
                    continue
                own = schedule if isinstance(schedule, Schedule) else schedule[group.get("layer_group", i)]
                values, scale = own.values(self.n_steps), scale_of(group, name)
                self.tables.append((group, name, values if scale == 1 else [scale * value for value in values]))
            if len({tuple(values) for _, own_name, values in self.tables if own_name == name}) > 1:
                separate(learn.opt, name)

    def before_step(self, learn: Learner) -> None:
        step = learn.step + learn.steps_ahead
        if step >= self.n_steps:
            if step == self.n_steps:
                warnings.warn(late(learn), stacklevel=2)
            return
        for group, name, values in self.tables:
            if name == "mom":
                set_hyper(group, name, values[step])
            elif isinstance(held := group[name], Tensor):
                held.fill_(values[step])  # as set_hyper does, without a call for each group
            else:
                group[name] = values[step]


def late(learn: Learner) -> str:
    return (
        f"{type(learn.data.train_dl).__name__} gave more batches than its length, so the schedule of {learn.n_steps} "
        f"steps has ended; the rates no longer change. Correct its __len__."
    )
