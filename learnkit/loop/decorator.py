"""A plain function as a callback: what `learn.on` makes of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from learnkit.hooks import HOOKS, STAGES, Callback

if TYPE_CHECKING:
    from learnkit.learner import Learner

Function = Callable[..., Any]


@final
class Handle:
    """The function that was given to `learn.on`: call it, or take it off the Learner with `remove()`."""

    def __init__(self, learn: Learner, function: Function, callback: Callback) -> None:
        self.learn, self.function, self.callback = learn, function, callback

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def remove(self) -> None:
        """Not called again. Raises ValueError where it was removed before."""
        self.learn.remove_callback(self.callback)


def attach_function(
    learn: Learner, hook: str, function: Function, *, every: int, order: int, in_trials: bool
) -> Handle:
    """What `learn.on(hook, …)` does with the function below it."""
    wanted = "(learn, run)" if hook.startswith("around_") else "(learn)"
    try:
        inspect.signature(function).bind(*[None] * (wanted.count(",") + 1))
    except TypeError:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(
            f"{name}{inspect.signature(function)} cannot be called as a hook: expected {name}{wanted}."
        ) from None
    made = around(hook, function, every) if hook.startswith("around_") else as_hook(hook, function, every)
    cls = type(
        getattr(function, "__name__", "function"), (Callback,), {hook: made, "order": order, "in_trials": in_trials}
    )
    callback = cls()
    learn.add_callback(callback)
    return Handle(learn, function, callback)


def check_event(hook: str, every: int) -> None:
    if hook not in HOOKS:
        near = difflib.get_close_matches(hook, HOOKS, n=1, cutoff=0.5)
        hint = f": did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"{hook!r} is not a hook{hint} Hooks are before_, around_ or after_ one of {', '.join(STAGES)}."
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}: expected a whole number, 1 or more.")


def as_hook(hook: str, function: Function, every: int) -> Function:
    def call(self: Callback, learn: Learner) -> None:
        if count_so_far(hook, learn) % every == 0:
            function(learn)

    return call if every > 1 else lambda self, learn: function(learn)


def around(hook: str, function: Function, every: int) -> Function:
    def call(self: Callback, learn: Learner, run: Callable[[], None]) -> None:
        if count_so_far(hook, learn) % every == 0:
            function(learn, run)
        else:
            run()

    return call


def count_so_far(hook: str, learn: Learner) -> int:
    """Which step of the fit, batch of the pass, epoch or fit it is, counted from 1."""
    word, _, stage = hook.partition("_")
    if stage == "step":
        return learn.step + (word != "after")
    if stage in ("batch", "forward", "backward"):
        return learn.batch_index + 1
    return learn.n_fits if stage == "fit" else learn.epoch + 1
