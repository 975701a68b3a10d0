"""CutMix: a rectangle of each picture comes from another picture."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from learnkit.data.order import mix
from learnkit.devices.transfer import sent
from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.loop.loss import each_loss
from learnkit.loop.mixing import first_input


class CutMix(Callback):
    """Train on pictures with a rectangle of another picture pasted in (Yun et al., 2019, arXiv:1905.04899).

    Evaluation uses the unchanged pictures. Each batch has one rectangle of the area 1 - l, with l from
    Beta(alpha, alpha), around a centre anywhere in the picture; the part outside of the picture is cut off. The loss is
    the mean of both targets' losses, weighted by the visible areas. The other picture is from the same batch on the
    same rank. Rectangles and pairs are a function of (seed, epoch, batch, rank), so a resumed fit has the same ones.

    Args:
        alpha: parameter of the Beta distribution.

    Raises:
        ValueError: when `alpha` is not above 0, or the inputs are not (batch, channels, height, width).
        TypeError: when a batch is not (x, y) of tensors with floating-point x.

    Example:
        >>> learn.fit_one_cycle(5, 1e-2, callbacks=[CutMix(alpha=1.0)])  # doctest: +SKIP
    """

    order = 200
    unique = True

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}: expected a number above 0; leave CutMix out to paste nothing.")
        self.alpha = alpha
        self.partners = torch.zeros(0)  # index of the other picture, for each sample of the current batch
        self.share = 1.0  # share of the picture's area that is its own

    def before_forward(self, learn: Learner) -> None:
        if not learn.training:
            return
        x = first_input(learn, "CutMix")
        if x.ndim != 4:
            raise ValueError(
                f"CutMix expects pictures (batch, channels, height, width); this batch's input is {tuple(x.shape)}."
            )
        draw = random.Random(mix(learn.order_seed or 0, learn.epochs_trained, learn.batch_index, learn.rank, 1))
        side = (1 - draw.betavariate(self.alpha, self.alpha)) ** 0.5
        rows, columns = (span(draw, length, side) for length in x.shape[2:])
        self.partners = torch.tensor(draw.sample(range(len(x)), len(x)))
        if not x.is_cpu:
            self.partners = sent(self.partners, x.device)
        self.share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (x.shape[2] * x.shape[3])
        learn.inputs = (pasted(x, self.partners, rows, columns), *learn.inputs[1:])  # type: ignore[index]

    def after_forward(self, learn: Learner) -> None:
        if learn.training:
            learn.loss = (
                each_loss(learn.loss_func, learn.pred, learn.target) * self.share
                + each_loss(learn.loss_func, learn.pred, learn.target[self.partners]) * (1 - self.share)
            ).mean()


def span(draw: random.Random, length: int, side: float) -> slice:
    """Return the part of `length` pixels that a rectangle of `side` times that length covers, at a random place."""
    half, centre = round(length * side) / 2, draw.randrange(length)
    return slice(max(0, int(centre - half)), min(length, int(centre + half)))


def pasted(x: Tensor, partners: Tensor, rows: slice, columns: slice) -> Tensor:
    x = x.clone()
    x[:, :, rows, columns] = x[partners][:, :, rows, columns]
    return x
