"""Test-time augmentation: predictions averaged over several versions of each picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnkit.data.loaders import TensorLoader, in_order
from learnkit.data.random import Draws, SampleTransform
from learnkit.learner import Learner
from learnkit.vision.samples import SampleLoader
from learnkit.vision.transform import accepted


def tta(
    learn: Learner, dl: Any = None, *, n: int = 4, beta: float = 0.5, tfms: Sequence[Any] | None = None
) -> tuple[Tensor, Tensor]:
    """(probabilities, targets) of `dl` (None: valid_dl), float (samples, classes), averaged over augmented versions of
    each picture.

    n       augmented versions, each with draws of its own
    beta    share of the plain version in the mean; the augmented ones have the rest
    tfms    what makes them, instead of the training transforms; `[flip_lr(p=1)]` with n=1 is the mirror image alone

    In dataset order and the same on every rank, all of which have to call it. Scores become probabilities before they
    are averaged.
    """
    if n < 1 or not 0 <= beta <= 1:
        raise ValueError(f"n={n}, beta={beta}: expected 1 or more versions, and a share of 0 to 1.")
    loader = learn.data.valid_dl if dl is None else dl
    if loader is None:
        raise ValueError("tta() has no data: the DataBunch has no valid_dl. Give one, or call tta(learn, dl).")
    augment = learn.data.train_dl.batch_tfms[:-1] if tfms is None and isinstance(learn.data.train_dl, LOADERS) else tfms
    if not augment:
        raise ValueError(
            "there is nothing to augment with, as the training data has no transforms: tta(learn, tfms=[flip_lr(p=1)], "
            "n=1)."
        )
    plain, targets = learn.get_preds(loader)
    versions = [learn.get_preds(augmented(loader, augment, k))[0].softmax(1) for k in range(n)]
    return torch.lerp(torch.stack(versions).mean(0), plain.softmax(1), beta), targets


LOADERS = (TensorLoader, SampleLoader)


def augmented(loader: Any, tfms: Sequence[Any], k: int) -> Any:
    """The loader in order, with other transforms before its last one, which normalizes; `k`: which version."""
    own = in_order(loader)
    if not isinstance(own, LOADERS):
        raise TypeError(f"tta augments loaders of an ImageDataBunch; this one is a {type(loader).__name__}.")
    own.batch_tfms = (*(Version(accepted(transform), k) for transform in tfms), *own.batch_tfms[-1:])
    return own


class Version(SampleTransform):
    """A transform with the draws of another epoch, as an evaluation's is always the first.

    >>> Version(accepted(torch.neg), 3)(torch.ones(2), Draws(0, 0, torch.arange(2)))
    tensor([-1., -1.])
    """

    def __init__(self, transform: Any, k: int) -> None:
        self.transform, self.k = transform, k

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        return (
            self.transform(x, draws.at(epoch=self.k))
            if isinstance(self.transform, SampleTransform)
            else self.transform(x)
        )
