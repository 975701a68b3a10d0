"""A session: one fit, validation or prediction, with its hooks resolved, and with all as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from learnkit.data.order import private_order
from learnkit.hooks import STAGES, Callback, ControlFlow, Stages, add_note, causes
from learnkit.loop.memory import note_out_of_memory
from learnkit.loop.placement import check_place, current

if TYPE_CHECKING:
    from learnkit.learner import Learner


@contextmanager
def session(learn: Learner, extra: Sequence[Callback] = (), dls: Sequence[Any] = ()) -> Iterator[None]:
    """Hooks resolved and loaders with an order of their own; afterwards all is as it was, whatever was raised."""
    everyone = sorted(check_callbacks([*learn.callbacks, *extra]), key=lambda callback: callback.order)
    if learn.resume and not any(callback.restores for callback in everyone):
        raise ValueError("resume=True has nothing to resume from: add callbacks=[Checkpoint(folder)] to the Learner.")
    check_place(learn)
    modes = [(module, module.training) for module in learn.model.modules()]
    learn.training_model = learn.evaluated_model = learn.model
    learn.running = tuple(everyone)
    learn.stages = Stages(learn, everyone, {stage: getattr(learn, f"_{stage}") for stage in STAGES})
    try:
        with current(learn.device), private_order(learn.data.train_dl, *dls):
            yield
    except ControlFlow as signal:
        raise RuntimeError(
            f"{type(signal).__name__} was raised where no {signal.stage} stage is under way to be left, "
            f"{learn.where()}."
        ) from signal
    except BaseException as error:
        first = surfacing(error, learn.failure)
        note_out_of_memory(learn, first)
        raise first  # noqa: B904
    finally:
        for module, mode in modes:
            module.training = mode
        learn.failure = learn.pred = learn.loss = None
        learn._labels_read = []
        learn.stages = None  # type: ignore[assignment]
        learn.running, learn.resume = (), False
        learn.training, learn.training_model = False, learn.model


def as_callbacks(callbacks: Callback | Iterable[Callback]) -> list[Callback]:
    return [callbacks] if isinstance(callbacks, (Callback, type)) else list(callbacks)  # type: ignore[list-item]


def check_callbacks(callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Refuse what is no callback, the same one twice, and two of a kind that may be there once only."""
    for i, callback in enumerate(callbacks):
        if isinstance(callback, type) and issubclass(callback, Callback):
            raise TypeError(f"{callback.__name__} is a class, expected an object: write {callback.__name__}().")
        if not isinstance(callback, Callback):
            raise TypeError(
                f"{callback!r} is {type(callback).__name__}, expected a Callback: derive its class from "
                f"learnkit.Callback."
            )
        name = type(callback).__name__
        if any(callback is other for other in callbacks[:i]):
            raise ValueError(f"the same {name} was added twice. Add it once.")
        if callback.unique and any(type(callback) is type(other) for other in callbacks[:i]):
            raise ValueError(
                f"this Learner has a {name} already, and two would undo each other. Change that one, or remove it with "
                f"remove_callback({name})."
            )
    return callbacks


def surfacing(error: BaseException, first: BaseException | None) -> BaseException:
    """The error that the user gets: the first one, where another was raised only while cleaning up after it.

    An error raised with `from` translates the first one on purpose, and stays.
    """
    if first is None or error is first or error.__cause__ is not None or first not in causes(error):
        return error
    add_note(first, f"learnkit: cleaning up after this error failed too: {type(error).__name__}: {error}")
    return first
