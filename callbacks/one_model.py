"""One model for every evaluation, whatever the ranks have trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from learnkit.devices.dtensor import is_shard
from learnkit.hooks import Callback, Run, run_then
from learnkit.learner import Learner


class OneModel(Callback):
    """Make all ranks evaluate the same model. The innermost callback, so that it applies to whatever other callbacks
    have put in the model's place.

    Rank 0's buffers (batch norm's statistics) go to all ranks when an epoch's training ends, early or not, and before
    an evaluation. Weights that differ between ranks are averaged then; in an evaluation during training, only for its
    length.
    """

    order = 10_000
    unique = True

    def around_train(self, learn: Learner, run: Run) -> None:
        run_then(run, lambda: unite(learn, learn.model))

    def around_validate(self, learn: Learner, run: Run) -> None:
        model = learn.evaluated_model
        if learn.meter.everywhere and not any(map(is_shard, model.parameters())):
            return run()  # one rank may predict by itself
        learn.ranks.share(list(model.buffers()))
        with borrowed_means(learn, model) if learn.ranks.apart else nullcontext():
            run()


@torch.no_grad()
def unite(learn: Learner, model: nn.Module) -> None:
    """Put rank 0's buffers, and the means of weights that differ between ranks, on all ranks."""
    learn.ranks.share(list(model.buffers()))
    if not learn.ranks.apart:
        return
    parameters = list(model.parameters())
    for p, value in zip(parameters, learn.ranks.mean(parameters), strict=True):
        p.copy_(value)


@contextmanager
def borrowed_means(learn: Learner, model: nn.Module) -> Iterator[None]:
    """Within the block the model's weights are the means; then each rank has its own again. Storages are exchanged: see
    `Average`.
    """
    parameters = list(model.parameters())
    own = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, learn.ranks.mean(parameters), strict=True):
            p.data = value
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value
