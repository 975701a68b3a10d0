"""What the processes that train together tell each other, as the core and callbacks ask for it. Alone, there is nothing
to tell.

Sums and counts travel, never means. All ranks must call the same of these in the same order, and none on an exception's
path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks of one Learner: `learn.ranks`. learnkit.distributed has the same for those who keep their own loop."""

    @property
    def apart(self) -> bool:
        """Whether each rank's weights are its own from one average to the next, as with algorithm="decentralized"."""
        ...

    def all_sum(self, tensors: Any) -> Any:
        """The sums over all ranks of a tensor, a number, or a nested structure of them, in one collective."""
        ...

    def batches_in_order(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """All ranks' rows, one a batch, in the order of the data set."""
        ...

    def on_main(self, action: Callable[[], object], name: str) -> None:
        """Do something on rank 0 only; the others that come here wait for it, and raise if it fails. `name` says
        what.
        """
        ...

    def gather(self, state: Any) -> list[Any]:
        """What each rank gave, in rank order: plain types and tensors."""
        ...

    def gather_on_main(self, state: Any) -> list[Any]:
        """As `gather`, on rank 0 alone; [] on the others."""
        ...

    def from_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, on all ranks: plain types and tensors; all raise if it fails."""
        ...

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's values in the place of these tensors' on every rank, in one broadcast."""
        ...

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of each tensor, of floating point, the mean over all ranks; where all have the same, exactly that."""
        ...

    def agree(self, flag: bool) -> bool:
        """Whether any rank's flag is true."""
        ...


class Alone:
    """A world of one."""

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
