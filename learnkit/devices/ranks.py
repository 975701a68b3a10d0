"""Communication between the ranks of one training, as the core and callbacks use it. With one process, it does nothing.

Ranks exchange sums and counts, never means. All ranks must call the same functions in the same order, and none while an
exception is handled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks of one Learner: `learn.ranks`.

    For your own training loop, learnkit.distributed has the same functions.
    """

    @property
    def apart(self) -> bool:
        """Whether the ranks' weights differ between two averages, as with algorithm="decentralized"."""
        ...

    def all_sum(self, tensors: Any) -> Any:
        """Return the sums over all ranks of a tensor, a number, or a nested structure of them, in one collective."""
        ...

    def batches_in_order(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return the rows of all ranks, one per batch, in the order of the dataset."""
        ...

    def on_main(self, action: Callable[[], object], name: str) -> None:
        """Run an action on rank 0 only; the other ranks wait for it, and raise if it fails.

        Args:
            action: the action
            name: its description for error messages
        """
        ...

    def gather(self, state: Any) -> list[Any]:
        """Return the values that the ranks passed, in rank order: plain types and tensors."""
        ...

    def gather_on_main(self, state: Any) -> list[Any]:
        """Like `gather`, but on rank 0 only; other ranks get []."""
        ...

    def from_main(self, action: Callable[[], Any]) -> Any:
        """Return on all ranks what `action` returns on rank 0: plain types and tensors. All ranks raise if it fails."""
        ...

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite these tensors with rank 0's values on every rank, in one broadcast."""
        ...

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the mean over all ranks of each floating-point tensor.

        If a tensor is the same on all ranks, the mean is exactly equal.
        """
        ...

    def agree(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank."""
        ...


class Alone:
    """A group of one rank."""

    apart = False

    def all_sum(self, tensors: Any) -> Any:
        return tensors

    def batches_in_order(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return rows

    def on_main(self, action: Callable[[], object], name: str) -> None:
        action()

    def gather(self, state: Any) -> list[Any]:
        return [state]

    def gather_on_main(self, state: Any) -> list[Any]:
        return [state]

    def from_main(self, action: Callable[[], Any]) -> Any:
        return action()

    def share(self, tensors: Sequence[Tensor]) -> None:
        pass

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def agree(self, flag: bool) -> bool:
        return flag
