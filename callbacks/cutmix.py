"""A part of each picture, from another one."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from learnkit.callbacks.mixup import first_input, losses
from learnkit.data.order import mix
from learnkit.devices.transfer import sent
from learnkit.hooks import Callback
from learnkit.learner import Learner


class CutMix(Callback):
    """Train on pictures with a rectangle of another one pasted in (Yun et al., 2019, arXiv:1905.04899); evaluation sees
    plain ones.

    One rectangle a batch, of the area 1 - l, l from Beta(alpha, alpha), about a centre that is anywhere; what sticks
    out of the picture is cut off. The loss is the mean of both targets' losses, weighted by the areas that are seen.
    The partner is out of the same batch of the same rank. Rectangles and partners are a function of (seed, epoch,
    batch, rank), so a resumed fit has the same.

    >>> learn.fit_one_cycle(5, 1e-2, callbacks=[CutMix(alpha=1.0)])  # doctest: +SKIP
    """

    order = 200
    unique = True

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}: expected a number above 0; without CutMix nothing is pasted.")
        self.alpha = alpha
        self.partners = torch.zeros(0)  # of the batch under way
        self.share = 1.0  # of the picture's area that is its own

    def before_forward(self, learn: Learner) -> None:
        if not learn.training:
            return
        x = first_input(learn, "CutMix")
        if x.ndim != 4:
            raise ValueError(
                f"CutMix cuts pictures, (batch, channels, height, width); this batch's input is {tuple(x.shape)}."
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
                losses(learn, learn.target) * self.share + losses(learn, learn.target[self.partners]) * (1 - self.share)
            ).mean()


def span(draw: random.Random, length: int, side: float) -> slice:
    """The part of `length` pixels that a rectangle of `side` times that length covers, about a place anywhere."""
    half, centre = round(length * side) / 2, draw.randrange(length)
    return slice(max(0, int(centre - half)), min(length, int(centre + half)))


def pasted(x: Tensor, partners: Tensor, rows: slice, columns: slice) -> Tensor:
    x = x.clone()
    x[:, :, rows, columns] = x[partners][:, :, rows, columns]
    return x
