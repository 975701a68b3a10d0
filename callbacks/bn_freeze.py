"""Batch norm that stands still where its layer is frozen."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from learnkit.hooks import Callback
from learnkit.learner import Learner


class BnFreeze(Callback):
    """While training, keep the running statistics of batch norms as they are, and normalize with them.

    all     of every batch norm. Without it, of those whose own parameters are frozen: learn.freeze() leaves their
            statistics following the data, which for small new data sets is worse than those of the large old one

    >>> learn.fine_tune(3, callbacks=[BnFreeze()])  # doctest: +SKIP
    """

    def __init__(self, *, all: bool = False) -> None:
        self.all = all

    def before_train(self, learn: Learner) -> None:
        for module in learn.model.modules():
            if isinstance(module, _BatchNorm) and (self.all or is_frozen(module)):
                module.eval()  # the next epoch begins with train()


def is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not any(p.requires_grad for p in parameters)
