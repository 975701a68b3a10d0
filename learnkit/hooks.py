"""The hook grammar: eight stages, three words, and two ways to leave a stage early.

    fit
    └─ epoch
       ├─ train
       │  └─ batch
       │     ├─ forward     pred, loss
       │     ├─ backward
       │     └─ step        optimizer step, zero_grad
       └─ validate
          └─ batch
             └─ forward

A stage X is a stack of layers, resolved once per fit, with the callback of the lowest order as the outermost layer:

    cb.before_X(learn)          observes
    cb.around_X(learn, run)     controls: `run` is everything further in, that is
        the layer of the next callback … the stage itself
    cb.after_X(learn)           observes

So before_ hooks are called from low to high order, after_ hooks from high to low, and what an around_ hook surrounds
includes the hooks of every callback of a higher order. An around_ hook that does not call `run` skips them; one that
calls it twice repeats them.

| raised while stage X runs | the rest of X | after_X hooks                   | stages between X and the raise |
| ------------------------- | ------------- | ------------------------------- | ------------------------------ |
| StopX                     | is skipped    | are called                      | end without their after_ hooks |
| SkipX                     | is skipped    | are not called                  | end without their after_ hooks |
| any other exception       | is skipped    | are not called                  | end without their after_ hooks |

StopX calls the after_X hooks of every layer that it passes on its way out. Callbacks further in than an around_X hook
that was not reached have seen no before_X, and see no after_X.

In all cases the `finally` of every around_ hook that was entered runs: clean-up belongs there. If an after_X hook
raises a Stop* or Skip* of an outer stage, the other after_X hooks are still called. The around_X hooks of callbacks
further out see it come out of `run`, and may catch it.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnkit.learner import Learner

STAGES = ("fit", "epoch", "train", "validate", "batch", "forward", "backward", "step")
WORDS = ("before", "around", "after")
HOOKS = tuple(f"{word}_{stage}" for stage in STAGES for word in WORDS)
Run = Callable[[], None]
RunStage = Callable[[], object]  # a whole stage: returns False if it was skipped
Tell = Callable[["Learner"], None]


class ControlFlow(Exception):
    """Base of Stop* and Skip*: raised by hooks to leave a stage; never an error in itself."""

    stage = ""
    raised_after = ""  # the stage whose after_ hook raised it: the other after_ hooks of that stage are still called


class Stop(ControlFlow):
    """Base of StopFit … StopStep: end that stage early; its after_ hooks are told."""


class Skip(ControlFlow):
    """Base of SkipFit … SkipStep: that stage did not happen; its after_ hooks are not told."""


class StopFit(Stop):
    stage = "fit"


class StopEpoch(Stop):
    stage = "epoch"


class StopTrain(Stop):
    stage = "train"


class StopValidate(Stop):
    stage = "validate"


class StopBatch(Stop):
    stage = "batch"


class StopForward(Stop):
    stage = "forward"


class StopBackward(Stop):
    stage = "backward"


class StopStep(Stop):
    stage = "step"


class SkipFit(Skip):
    stage = "fit"


class SkipEpoch(Skip):
    stage = "epoch"


class SkipTrain(Skip):
    stage = "train"


class SkipValidate(Skip):
    stage = "validate"


class SkipBatch(Skip):
    stage = "batch"


class SkipForward(Skip):
    stage = "forward"


class SkipBackward(Skip):
    stage = "backward"


class SkipStep(Skip):
    stage = "step"


class Interrupted(StopFit):
    """The fit is left because of a signal, and is not over: a checkpoint resumes it."""


STOPS: dict[str, type[Stop]] = {cls.stage: cls for cls in Stop.__subclasses__()}
SKIPS: dict[str, type[Skip]] = {cls.stage: cls for cls in Skip.__subclasses__()}


class Callback:
    """Something that happens during training: override the hooks that you need, and only those cost anything.

    `order` decides who is first (and outermost): low before high, equal ones as they were added. Write it relative to
    another callback's: `order = Recorder.order + 10`. A callback whose class sets `unique = True` may be there once
    only. A misspelt hook, or one with the wrong parameters, is a TypeError when the class is defined.

    >>> class StopWhenGood(Callback):
    ...     def after_epoch(self, learn):
    ...         if learn.values["valid_loss"] < 0.1:
    ...             raise StopFit
    """

    order: int = 0
    unique: bool = False
    per_rank: bool = (
        False  # whether its state differs between ranks: a checkpoint keeps each one's; so it does where weights differ
    )
    batches_per_step: int = 1  # how many training batches it makes one optimizer step of
    in_trials: bool = True  # whether it takes part in lr_find and the like: not if it decides, writes or draws
    restores: bool = False  # whether it can put a fit back to where it was: fit(…, resume=True) needs one that does

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for owner in cls.__mro__[: cls.__mro__.index(Callback)]:
            for name, value in vars(owner).items():
                if name in HOOKS or callable(value) or isinstance(value, (staticmethod, classmethod, property)):
                    check_hook(owner, name, value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: plain types and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        """What `rank` takes back where another number of ranks goes on, of what each had: with `per_rank`, else it is
        not asked.
        """
        return states[0]

    def before_fit(self, learn: Learner) -> None:
        "Told before anything happens; `learn.n_epochs`, `learn.opt` are set."

    def around_fit(self, learn: Learner, run: Run) -> None:
        run()

    def after_fit(self, learn: Learner) -> None:
        "Told when the fit ended, by itself or by StopFit."

    def before_epoch(self, learn: Learner) -> None:
        "Told at each epoch's start; `learn.epoch` counts from 0."

    def around_epoch(self, learn: Learner, run: Run) -> None:
        run()

    def after_epoch(self, learn: Learner) -> None:
        "Told when training and validation are over; `learn.values` has both."

    def before_train(self, learn: Learner) -> None:
        "Told when the model is in training mode."

    def around_train(self, learn: Learner, run: Run) -> None:
        run()

    def after_train(self, learn: Learner) -> None:
        "Told after an epoch's last training batch."

    def before_validate(self, learn: Learner) -> None:
        "Told before a pass without gradients (also get_preds, predict)."

    def around_validate(self, learn: Learner, run: Run) -> None:
        run()

    def after_validate(self, learn: Learner) -> None:
        "Told when `learn.values` has the new loss and metrics."

    def before_batch(self, learn: Learner) -> None:
        "Told when `learn.batch` is on the device; see `learn.training`."

    def around_batch(self, learn: Learner, run: Run) -> None:
        run()

    def after_batch(self, learn: Learner) -> None:
        "Told after a batch, in training and validation."

    def before_forward(self, learn: Learner) -> None:
        "Told before `learn.pred` and `learn.loss` are computed."

    def around_forward(self, learn: Learner, run: Run) -> None:
        run()

    def after_forward(self, learn: Learner) -> None:
        "Told with the batch's `learn.pred` and `learn.loss`."

    def before_backward(self, learn: Learner) -> None:
        "Told before `learn.loss` is differentiated."

    def around_backward(self, learn: Learner, run: Run) -> None:
        run()

    def after_backward(self, learn: Learner) -> None:
        "Told with the gradients in place."

    def before_step(self, learn: Learner) -> None:
        "Told before the optimizer's step number `learn.step`, from 0."

    def around_step(self, learn: Learner, run: Run) -> None:
        run()

    def after_step(self, learn: Learner) -> None:
        "Told when `learn.step` steps are done and the gradients are gone."


def overridden(callback: Callback, hook: str) -> bool:
    return getattr(type(callback), hook) is not getattr(Callback, hook)


def check_hook(owner: type, name: str, value: Any) -> None:
    """Refuse a method of a Callback class that looks like a hook and is none, or could never be called."""
    where = f"{owner.__qualname__}.{name}"
    if name not in HOOKS:
        near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.6 if is_reserved(name) else 0.85)
        if is_reserved(name) or near:
            hint = f"did you mean {near[0]}? " if near else ""
            raise TypeError(
                f"{where} is not a hook: {hint}Hooks are before_, around_ or after_ one of {', '.join(STAGES)}. "
                "A method of your own needs a name unlike these, or a leading underscore."
            )
        return
    wanted = "(self, learn, run)" if name.startswith("around_") else "(self, learn)"
    if not callable(value) or isinstance(value, (staticmethod, classmethod)):
        raise TypeError(f"{where} is a {type(value).__name__}; a hook is a plain method {name}{wanted}.")
    if inspect.isgeneratorfunction(value) or inspect.iscoroutinefunction(value) or inspect.isasyncgenfunction(value):
        raise TypeError(
            f"{where} is a generator or coroutine, so calling it would do nothing. Write a plain method "
            f"{name}{wanted}; an around_ hook brackets its stage by calling run()."
        )
    try:
        inspect.signature(value).bind(*[None] * (wanted.count(",") + 1))
    except TypeError:
        raise TypeError(
            f"{where}{inspect.signature(value)} cannot be called as a hook: expected {name}{wanted}."
        ) from None


def is_reserved(name: str) -> bool:
    return name.startswith(tuple(f"{word}_" for word in WORDS))


class Stages:
    """The eight stages of one fit, each a function of no arguments with its hooks already resolved."""

    __slots__ = STAGES
    fit: RunStage
    epoch: RunStage
    train: RunStage
    validate: RunStage
    batch: RunStage
    forward: RunStage
    backward: RunStage
    step: RunStage

    def __init__(self, learn: Learner, callbacks: Sequence[Callback], bodies: dict[str, Run]) -> None:
        for stage in STAGES:
            setattr(self, stage, resolve(stage, bodies[stage], callbacks, learn))


def resolve(stage: str, body: Run, callbacks: Sequence[Callback], learn: Learner) -> RunStage:
    """Return one stage as a function: layers of overridden hooks around `body`, one frame for each around_ hook and
    one for the hooks between two of them.
    """
    run, befores, afters = body, [], []
    for callback in reversed(callbacks):
        if overridden(callback, f"around_{stage}"):
            run = run_within(
                stage, getattr(callback, f"around_{stage}"), layer(stage, run, befores, afters, learn), learn
            )
            befores, afters = [], []
        if overridden(callback, f"before_{stage}"):
            befores.insert(0, getattr(callback, f"before_{stage}"))
        if overridden(callback, f"after_{stage}"):
            afters.append(getattr(callback, f"after_{stage}"))
    return layer(stage, run, befores, afters, learn, outermost=True)


def layer(
    stage: str, run: RunStage, befores: list[Tell], afters: list[Tell], learn: Learner, *, outermost: bool = False
) -> RunStage:
    """Return `run` with before_ and after_ hooks; the outermost layer ends what StopX and SkipX began."""
    stop, skip = STOPS[stage], SKIPS[stage]

    def run_layer() -> bool:
        hook, left = None, None
        try:
            for hook in befores:
                hook(learn)
            hook = None
            run()
        except skip:
            if outermost:
                return False
            raise
        except ControlFlow as signal:
            if not isinstance(signal, stop) and signal.raised_after != stage:
                raise
            left = signal
        except BaseException as error:
            blame(error, hook, f"before_{stage}", learn)
            raise
        if afters:
            left = call_afters(stage, afters, learn, left)
        if left is None or (outermost and isinstance(left, stop)):
            return True
        if outermost:
            left.raised_after = ""
        raise left

    return run_layer


def run_then(run: RunStage, action: Run) -> None:
    """`run`, and then `action`: also where a Stop* or Skip* ends it early, but not where an error does."""
    try:
        run()
    except ControlFlow:
        action()
        raise
    action()


class Deferred:
    """Defer a Stop* or Skip* that ends the block: `signal` has it, and `release` raises it, once the work that must
    come before is done. Errors are raised as they are.
    """

    def __init__(self, *kinds: type[ControlFlow]) -> None:
        self.kinds = kinds or (ControlFlow,)
        self.signal: ControlFlow | None = None

    def __enter__(self) -> Deferred:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, self.kinds):
            return False
        self.signal = error
        return True

    def release(self) -> None:
        if self.signal is not None:
            raise self.signal


def run_within(stage: str, around: Callable[[Learner, Run], None], run: RunStage, learn: Learner) -> Run:
    """`run` in the hands of an around_ hook, whose own errors are blamed on it."""

    def run_owned() -> None:
        try:
            around(learn, run)  # type: ignore[arg-type]
        except ControlFlow:
            raise
        except BaseException as error:
            blame(error, around, f"around_{stage}", learn)
            raise

    return run_owned


def call_afters(stage: str, afters: Iterable[Tell], learn: Learner, left: ControlFlow | None) -> ControlFlow | None:
    """Call every after_ hook of a layer; return how the stage is left: the first Stop* or Skip* of an outer stage that
    a hook raised, else `left`. The layers further out call their after_ hooks before it goes on.
    """
    for hook in afters:
        try:
            hook(learn)
        except (STOPS[stage], SKIPS[stage]):
            pass  # the stage is over already
        except ControlFlow as signal:
            if left is None or left.raised_after != stage:
                signal.raised_after, left = stage, signal
        except BaseException as error:
            blame(error, hook, f"after_{stage}", learn)
            raise
    return left


def blame(error: BaseException, hook: Any, name: str, learn: Learner) -> None:
    """Add one line to `error`: where in the loop it started. The first, innermost place counts; later ones are ignored.

    `hook`: the bound method called under `name`, None for the stage itself.
    """
    if learn.failure is not None and (learn.failure is error or learn.failure in causes(error)):
        return
    learn.failure = error
    place = f"the stage {name.partition('_')[2]}" if hook is None else f"{type(hook.__self__).__name__}.{name}"
    add_note(error, f"learnkit: raised in {place}, {learn.where()}")


def causes(error: BaseException) -> Iterable[BaseException]:
    """The exceptions during whose handling `error` was raised, nearest first."""
    seen: list[BaseException] = []
    while (error := error.__context__) is not None and error not in seen:  # type: ignore[assignment]
        seen.append(error)
    return seen


def add_note(error: BaseException, note: str) -> None:
    """`BaseException.add_note`, also on Python 3.10, where tracebacks show no notes: there it joins the message."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        setattr(error, "__notes__", [*getattr(error, "__notes__", []), note])  # noqa: B010
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{error.args[0]}\n{note}",)


class HookTable(dict[str, list[str]]):
    """Who runs when: for each hook that somebody overrides, the callbacks in the order in which they are called."""

    def __str__(self) -> str:
        width = max((len(hook) for hook in self), default=0)
        return "\n".join(f"{hook:{width}}  {', '.join(names)}" for hook, names in self.items()) or "no hooks"

    __repr__ = __str__


def hook_table(callbacks: Sequence[Callback]) -> HookTable:
    table = HookTable()
    for hook in HOOKS:
        names = [type(cb).__name__ for cb in callbacks if overridden(cb, hook)]
        if names:
            table[hook] = names[::-1] if hook.startswith("after_") else names
    return table
