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

A stage X is an onion, resolved once per fit, with the callback of the lowest order as its outermost layer:

    cb.before_X(learn)                                   told
    cb.around_X(learn, run)                              owns: `run` is all that lies further in
        the next callback's layer … the stage itself
    cb.after_X(learn)                                    told

So before_ hooks are called from low to high order, after_ hooks from high to low, and what an around_ hook brackets
includes the hooks of every callback of a higher order. An around_ hook that does not call `run` leaves them out; one
that calls it twice repeats them.

| raised while stage X runs | the rest of X | after_X            | stages between X and the raise |
| ------------------------- | ------------- | ------------------ | ------------------------------ |
| StopX                     | is left out   | told, by all       | left where they are, not told  |
| SkipX                     | is left out   | not told           | left where they are, not told  |
| any other exception       | is left out   | not told           | left where they are, not told  |

In all cases the `finally` of every around_ hook that was entered runs: clean-up belongs there. A Stop* or Skip* of an
outer stage that an after_X hook raises does not keep the other after_X hooks from being told; the around_X hooks of
callbacks further out see it come out of `run`, and may take it back.
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
    """One stage as a function: an onion of the overridden hooks around `body`, one frame for all layers without
    around_.
    """
    layers = Layers(stage, learn)
    run, befores, afters = body, [], []
    for callback in reversed(callbacks):
        if overridden(callback, f"around_{stage}"):
            run = run_within(stage, getattr(callback, f"around_{stage}"), layers.wrap(run, befores, afters), learn)
            befores, afters = [], []
        if overridden(callback, f"before_{stage}"):
            befores.insert(0, getattr(callback, f"before_{stage}"))
        if overridden(callback, f"after_{stage}"):
            afters.append(getattr(callback, f"after_{stage}"))
    return layers.wrap(run, befores, afters, outermost=True)


class Layers:
    """The layers of one stage, innermost first: each one's hooks that are told around what lies further in."""

    def __init__(self, stage: str, learn: Learner) -> None:
        self.stage, self.learn = stage, learn
        self.inner_afters: list[Tell] = []  # of all layers so far, in the order in which they are told
        self.inner_entries: list[int] | None = None  # [how often the last layer was entered]
        self.waiting: list[ControlFlow] = []  # signals of after_ hooks, for when all were told

    def wrap(self, run: RunStage, befores: list[Tell], afters: list[Tell], *, outermost: bool = False) -> RunStage:
        """`run` as the next layer. Stop* tells the after_ hooks from where it is to the outermost layer, which ends it;
        those further in that were never reached are told too.
        """
        stage, learn, stop, skip = self.stage, self.learn, STOPS[self.stage], SKIPS[self.stage]
        inner_afters, inner_entries, waiting = self.inner_afters, self.inner_entries or [0], self.waiting
        entries = [0]
        ends_here = (stop, skip) if outermost else ()

        def run_layer() -> bool:
            if outermost and waiting:
                return run_nested()
            hook, n_inner = None, inner_entries[0]
            entries[0] += 1
            try:
                try:
                    for hook in befores:
                        hook(learn)
                    hook = None
                    run()
                    if waiting:
                        waiting.clear()  # an around_ hook took it back
                except stop:
                    if inner_entries[0] == n_inner:
                        tell(inner_afters, learn, stop, skip, waiting)
                    tell(afters, learn, stop, skip, waiting)
                    raise
                except ControlFlow as signal:
                    if signal not in waiting:
                        waiting.clear()  # an around_ hook raised another one instead
                        raise
                if afters:
                    tell(afters, learn, stop, skip, waiting)
                if waiting:
                    raise waiting[0]
            except ends_here as signal:
                if not waiting:
                    return isinstance(signal, stop)
            except ControlFlow:
                if not outermost or not waiting:
                    raise
            except BaseException as error:
                blame(error, hook, f"before_{stage}", learn)
                waiting.clear()
                raise
            if waiting:
                signal = waiting[0]
                waiting.clear()
                raise signal
            return True

        def run_nested() -> bool:
            """From within an after_ hook of this very stage: an evaluation, say."""
            earlier = waiting[:]
            waiting.clear()
            try:
                return run_layer()
            finally:
                waiting[:] = earlier

        self.inner_afters, self.inner_entries = [*inner_afters, *afters], entries
        return run_layer


def run_then(run: RunStage, action: Run) -> None:
    """`run`, and then `action`: also where a Stop* or Skip* ends it early, but not where an error does."""
    try:
        run()
    except ControlFlow:
        action()
        raise
    action()


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


def tell(
    afters: Iterable[Tell], learn: Learner, stop: type[Stop], skip: type[Skip], waiting: list[ControlFlow]
) -> None:
    """Call every after_ hook; a Stop* or Skip* of an outer stage has to wait until all layers were told."""
    for hook in afters:
        try:
            hook(learn)
        except (stop, skip):
            pass  # the stage is over already
        except ControlFlow as signal:
            waiting.append(signal)
        except BaseException as error:
            blame(error, hook, f"after_{stop.stage}", learn)
            raise


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
