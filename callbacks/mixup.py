"""MixUp: blend the inputs and losses of pairs of samples."""

from __future__ import annotations

import random

import torch

from learnkit.data.order import mix
from learnkit.devices.transfer import sent
from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.loop.loss import each_loss
from learnkit.loop.mixing import first_input


class MixUp(Callback):
    """Train on weighted means of pairs of samples (Zhang et al., 2018, arXiv:1710.09412).

    Evaluation uses the unchanged samples. Each sample is blended with a partner from the same batch on the same rank;
    its weight is the larger one of l and 1 - l, with l from Beta(alpha, alpha). The loss is the weighted mean of both
    targets' losses, averaged over the batch. Pairs and weights are a function of (seed, epoch, batch, rank), so a
    resumed fit has the same ones. The loss needs the argument `reduction`, as torch's losses have.

    Args:
        alpha: parameter of the Beta distribution.

    Raises:
        ValueError: when `alpha` is not above 0.
        TypeError: when a batch is not (x, y) of tensors with floating-point x.

    Example:
        >>> learn.fit_one_cycle(5, 1e-2, callbacks=[MixUp(alpha=0.4)])  # doctest: +SKIP
    """

    order = 200  # further in than MixedPrecision, so that the loss is computed in its autocast
    unique = True

    def __init__(self, alpha: float = 0.4) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}: expected a number above 0; leave MixUp out to blend nothing.")
        self.alpha = alpha
        self.partners = self.weights = torch.zeros(0)  # of the current batch

    def before_forward(self, learn: Learner) -> None:
        if not learn.training:
            return
        x = first_input(learn, "MixUp")
        draw = random.Random(mix(learn.order_seed or 0, learn.epochs_trained, learn.batch_index, learn.rank))
        weights = [draw.betavariate(self.alpha, self.alpha) for _ in range(len(x))]
        self.weights = torch.tensor([max(w, 1 - w) for w in weights], dtype=x.dtype)
        self.partners = torch.tensor(draw.sample(range(len(x)), len(x)))
        if not x.is_cpu:
            self.weights, self.partners = sent(self.weights, x.device), sent(self.partners, x.device)
        blend = self.weights.view(-1, *[1] * (x.ndim - 1))
        learn.inputs = (torch.lerp(x[self.partners], x, blend), *learn.inputs[1:])  # type: ignore[index]

    def after_forward(self, learn: Learner) -> None:
        if learn.training:
            learn.loss = (
                each_loss(learn.loss_func, learn.pred, learn.target) * self.weights
                + each_loss(learn.loss_func, learn.pred, learn.target[self.partners]) * (1 - self.weights)
            ).mean()
