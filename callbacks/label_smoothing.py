"""Label smoothing: a cross-entropy loss with smoothed targets."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.loop.loss import LossFunc, loss_name


class LabelSmoothing(Callback):
    """Train with a share `eps` of each target distributed evenly over all classes (Szegedy et al., 2016,
    arXiv:1512.00567).

    Training uses torch's cross-entropy with label_smoothing=eps, and the class weights and ignore_index of the
    Learner's own loss. Evaluations, also those during training, use the loss without smoothing. MixUp and CutMix mix
    the smoothed losses.

    Args:
        eps: the share, between 0 and 1.

    Raises:
        ValueError: when `eps` is not between 0 and 1.
        TypeError: at the start of the fit, when the Learner's loss is not cross-entropy, or has label smoothing or
            another reduction than "mean".

    Example:
        >>> learn.fit_one_cycle(5, 1e-2, callbacks=[LabelSmoothing(0.1)])  # doctest: +SKIP
    """

    unique = True

    def __init__(self, eps: float = 0.1) -> None:
        if not 0 < eps < 1:
            raise ValueError(f"eps={eps}: expected a share between 0 and 1.")
        self.eps = eps
        self.plain: LossFunc | None = None  # the Learner's own

    def before_fit(self, learn: Learner) -> None:
        self.smoothed(learn.loss_func)  # raises its error before the first step

    def around_train(self, learn: Learner, run: Run) -> None:
        self.plain = learn.loss_func
        learn.loss_func = self.smoothed(self.plain)
        try:
            run()
        finally:
            learn.loss_func = self.plain

    def around_validate(self, learn: Learner, run: Run) -> None:
        before = learn.loss_func
        if isinstance(before, Smoothed):
            learn.loss_func = self.plain
        try:
            run()
        finally:
            learn.loss_func = before

    def smoothed(self, plain: LossFunc | None) -> Smoothed:
        if plain is None or plain is F.cross_entropy:
            return Smoothed(label_smoothing=self.eps)
        if type(plain) is nn.CrossEntropyLoss and plain.label_smoothing == 0 and plain.reduction == "mean":
            return Smoothed(plain.weight, ignore_index=plain.ignore_index, label_smoothing=self.eps)
        raise TypeError(
            f"LabelSmoothing works with cross-entropy; the Learner's loss is {loss_name(plain)}. Leave loss_func out, "
            f"or give torch.nn.CrossEntropyLoss() without label_smoothing and with reduction='mean'."
        )


class Smoothed(nn.CrossEntropyLoss):
    """The smoothed loss, as a class of its own to distinguish it from a loss that the user gave."""
