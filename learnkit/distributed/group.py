"""The ranks of a process group, as a Learner and its callbacks use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from learnkit.distributed.reduce import (
    agree,
    all_sum,
    broadcast_from_main,
    gather_objects,
    gather_on_main,
    on_main,
)
from learnkit.distributed.weights import means, share_values
from learnkit.distributed.world import get_rank


class Group:
    """All ranks of the process group, as `learn.ranks`: see learnkit.devices.ranks.Ranks."""

    def __init__(self, *, apart: bool = False) -> None:
        self.apart = apart

    def all_sum(self, tensors: Any) -> Any:
        return all_sum(tensors)

    def share(self, tensors: Any) -> None:
        share_values(list(tensors))

    def mean(self, tensors: Any) -> list[Tensor]:
        return means(list(tensors))

    def agree(self, flag: bool) -> bool:
        return bool(agree(flag))

    def gather(self, state: Any) -> list[Any]:
        return gather_objects(state)

    def gather_on_main(self, state: Any) -> list[Any]:
        return gather_on_main(state)

    def on_main(self, action: Callable[[], object], name: str) -> None:
        on_main(action, name)

    def from_main(self, action: Callable[[], Any]) -> Any:
        error, sent = None, None
        if get_rank() == 0:
            try:
                sent = [True, action()]
            except Exception as raised:
                error, sent = raised, [False, f"{type(raised).__name__}: {raised}"]
        done, result = broadcast_from_main(sent)
        if error is not None:
            raise error
        if not done:
            raise RuntimeError(f"rank 0 failed: {result}")
        return result

    def batches_in_order(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Ranks have contiguous parts of each global batch, in rank order."""
        shares = gather_objects(rows)
        return [share[k] for k in range(max(map(len, shares))) for share in shares if k < len(share)]
