"""Messages of callbacks, printed between the lines of the epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from learnkit.learner import Learner


@runtime_checkable
class Speaker(Protocol):
    """A callback that prints the messages of others, as Progress does."""

    def say(self, text: str) -> None: ...


def say(learn: Learner, text: str) -> None:
    """Print a message on rank 0, if a callback of this fit prints messages."""
    speaker = next((cb for cb in learn.running if isinstance(cb, Speaker)), None)
    if speaker is not None and learn.rank == 0:
        speaker.say(text)
