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
    """Return predictions averaged over augmented versions of each picture, and the targets.

    The results are in dataset order and the same on every rank; all ranks must call this function. Scores become
    probabilities before they are averaged.

    Args:
        learn: a trained Learner
        dl: loader; None: valid_dl
        n: number of augmented versions, each with its own random numbers
        beta: weight of the plain version in the mean; the augmented versions share the rest
        tfms: transforms to use instead of the training transforms; `[flip_lr(p=1)]` with n=1 is the mirror image only

    Returns:
        (probabilities, targets); probabilities are float `(samples, classes)`.

    Raises:
        ValueError: when there is no data or nothing to augment with, or `n` or `beta` is outside its range
        TypeError: when `dl` is not a loader of an ImageDataBunch
    """
    if n < 1 or not 0 <= beta <= 1:
        raise ValueError(f"n={n}, beta={beta}: expected n of 1 or more, and beta from 0 to 1.")
    loader = learn.data.valid_dl if dl is None else dl
    if loader is None:
        raise ValueError("tta() has no data: the DataBunch has no valid_dl. Add one, or call tta(learn, dl).")
    augment = learn.data.train_dl.batch_tfms[:-1] if tfms is None and isinstance(learn.data.train_dl, LOADERS) else tfms
    if not augment:
        raise ValueError(
            "there are no transforms to augment with, because the training data has none: pass some, as in "
            "tta(learn, tfms=[flip_lr(p=1)], n=1)."
        )
    plain, targets = learn.get_preds(loader)
    versions = [learn.get_preds(augmented(loader, augment, k))[0].softmax(1) for k in range(n)]
    return torch.lerp(torch.stack(versions).mean(0), plain.softmax(1), beta), targets


LOADERS = (TensorLoader, SampleLoader)


def augmented(loader: Any, tfms: Sequence[Any], k: int) -> Any:
    """Return the loader in dataset order, with other transforms before the last one, which normalizes.

    Args:
        loader: a loader of an ImageDataBunch
        tfms: the transforms
        k: number of the version
    """
    own = in_order(loader)
    if not isinstance(own, LOADERS):
        raise TypeError(f"tta got a {type(loader).__name__}, expected a loader of an ImageDataBunch.")
    own.batch_tfms = (*(Version(accepted(transform), k) for transform in tfms), *own.batch_tfms[-1:])
    return own


class Version(SampleTransform):
    """A transform with the random numbers of epoch `k`. Evaluation alone always uses those of epoch 0.

    Example:
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
