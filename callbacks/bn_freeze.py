"""Batch norm whose running statistics do not change where its layer is frozen."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from learnkit.hooks import Callback
from learnkit.learner import Learner


class BnFreeze(Callback):
    """Keep the running statistics of batch norm layers unchanged in training, and normalize with them.

    `learn.freeze()` alone lets the statistics of frozen layers follow the new data. For a small new data set these are
    worse than the statistics of the large old one.

    Args:
        all: apply to every batch norm layer. False: only to layers whose own parameters are frozen.

    Example:
        >>> learn.fine_tune(3, callbacks=[BnFreeze()])  # doctest: +SKIP
    """

    def __init__(self, *, all: bool = False) -> None:
        self.all = all

    def before_train(self, learn: Learner) -> None:
        for module in learn.model.modules():
            if isinstance(module, _BatchNorm) and (self.all or is_frozen(module)):
                module.eval()  # the next epoch begins with model.train()


def is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not any(p.requires_grad for p in parameters)
