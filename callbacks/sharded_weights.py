"""Keep a model's weights sharded between passes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from learnkit.callbacks.one_model import OneModel
from learnkit.distributed.fully_shard import reshard
from learnkit.distributed.replicas import listed_names
from learnkit.hooks import Callback, Run, run_then
from learnkit.learner import Learner


class ShardedWeights(Callback):
    """Added together with FullyShard, but innermost: the hooks of other callbacks find sharded weights before and after
    a pass.

    Raises RuntimeError where the `data` of a weight was replaced within a pass: for a sharded weight PyTorch ignores
    that, or crashes (2.15). `storages` returns those of the weights at the start of the current pass.
    """

    order = OneModel.order - 1
    unique = True

    def __init__(self, storages: Callable[[], list[tuple[str, Tensor, int]]]) -> None:
        self.storages = storages

    def around_train(self, learn: Learner, run: Run) -> None:
        run_then(run, lambda: self.end(learn))

    def around_validate(self, learn: Learner, run: Run) -> None:
        self.look()
        run_then(run, lambda: reshard(learn.model))

    def before_batch(self, learn: Learner) -> None:
        self.look()

    def end(self, learn: Learner) -> None:
        reshard(learn.model)
        self.look()

    def look(self) -> None:
        replaced = [name for name, p, storage in self.storages() if p.untyped_storage()._cdata != storage]
        if replaced:
            raise RuntimeError(
                f"the data of {len(replaced)} parameters was replaced: {listed_names(replaced)}. After to_fsdp each "
                f"rank has a part of each, and PyTorch ignores that. For p.data = value write p.copy_(value), in "
                f"torch.no_grad()."
            )
