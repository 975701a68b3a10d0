"""Which loss a batch gets, and what is refused before the first step rather than learned from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnkit.devices.nested import describe
from learnkit.hooks import add_note

LossFunc = Callable[..., Tensor]

ELEMENTWISE: tuple[Any, ...] = (
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
)
ELEMENTWISE_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


def choose_loss(
    loss_func: LossFunc | None, output: Any, target: Any, *, training: bool, labels: Any = True
) -> Callable[[Any, Any], Any]:
    """The function of (output, target) that gives this pass's losses.

    `loss_func` where there is one; else the output's own `.loss`; else cross-entropy for integer targets and mean
    squared error for float ones. Outside training a batch may have no target: then it has no loss. `labels`: see
    `check_target`.
    """
    if loss_func is None and isinstance(own_loss(output), Tensor):
        return lambda output, target: output.loss
    if target is None:
        if not training:
            return lambda output, target: None
        raise ValueError(
            "a training batch has no target: expected (x, y), or a mapping with 'labels' or 'target', or a model "
            f"whose output has a .loss; the model returned {describe(output)}."
        )
    if loss_func is None:
        loss_func = default_loss(output, target)
    check_target(loss_func, output, target, labels)
    return explaining_errors(loss_func)


def own_loss(output: Any) -> Any:
    return None if isinstance(output, (Tensor, tuple, list, dict)) else getattr(output, "loss", None)


def default_loss(output: Any, target: Any) -> LossFunc:
    got = f"target {describe(target)} and prediction {describe(output)}"
    if not isinstance(target, Tensor) or not isinstance(output, Tensor):
        raise TypeError(f"no loss is known for {got}: give Learner(…, loss_func=…).")
    if target.is_floating_point():
        return F.mse_loss
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"no loss is known for {got}: give Learner(…, loss_func=…), or class numbers as int64 targets.")
    if output.ndim < 2 or output.shape[1] == 1:
        raise ValueError(
            f"cross-entropy needs one score per class, got {got}. Give the model as many outputs as there are "
            "classes, or use loss_func=torch.nn.BCEWithLogitsLoss() with float targets of the same shape."
        )
    return F.cross_entropy


def check_target(loss_func: LossFunc, output: Any, target: Any, labels: Any = True) -> None:
    """Refuse targets of a dtype or shape that a known loss would reject less clearly, or would broadcast silently.

    `labels`: whether class numbers are read too, to see that there is a score for each; or the target on the CPU, to
    read them there.
    """
    if not isinstance(target, Tensor) or not isinstance(output, Tensor):
        return
    got = f"prediction {describe(output)} and target {describe(target)}"
    if loss_func in ELEMENTWISE or isinstance(loss_func, ELEMENTWISE_MODULES):
        if output.shape != target.shape:
            raise ValueError(
                f"{loss_name(loss_func)} compares element by element, got {got}: different shapes would be broadcast "
                f"against each other silently. {fit_shapes(output, target)}"
            )
        if not target.is_floating_point():
            raise TypeError(f"{loss_name(loss_func)} needs a float target, got {got}. Convert it with target.float().")
    if loss_func is F.cross_entropy or isinstance(loss_func, nn.CrossEntropyLoss):
        check_classes(loss_func, output, target, got, labels)


def check_classes(loss_func: LossFunc, output: Tensor, target: Tensor, got: str, labels: Any) -> None:
    name = loss_name(loss_func)
    if target.is_floating_point():
        if target.shape == output.shape:
            return  # class probabilities
        raise TypeError(
            f"{name} needs class numbers as integers (int64), got {got}. Convert the target with target.long(), or "
            "use loss_func=torch.nn.functional.mse_loss for a regression."
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{name} needs class numbers as int64, got {got}. Convert the target with target.long().")
    wanted = (output.shape[0], *output.shape[2:]) if output.ndim > 1 else ()
    if target.shape != wanted:
        raise ValueError(
            f"{name} expects a target of shape {tuple(wanted)} for such a prediction, got {got}. "
            "Squeeze the target's extra dimension, or check the model's last layer."
        )
    if labels is False or not target.numel():
        return
    ignored = getattr(loss_func, "ignore_index", -100)
    lowest, highest = range_of(labels if isinstance(labels, Tensor) else target, ignored)
    if lowest <= highest and (lowest < 0 or highest >= output.shape[1]):
        raise ValueError(
            f"targets run from {lowest} to {highest}, but the model gives {output.shape[1]} scores, for "
            f"classes 0 to {output.shape[1] - 1} ({got}). Check the number of outputs and the label encoding."
        )


def range_of(labels: Tensor, ignored: int) -> tuple[int, int]:
    """The lowest and the highest class number without `ignored`; (1, 0) where there is no other.

    One read, which waits for a device: on CUDA the loss's kernel would abort instead of raising an error.
    """
    labels = labels.detach().long()
    none = labels == ignored
    largest = torch.iinfo(torch.int64).max
    lowest, highest = torch.stack(
        [labels.masked_fill(none, largest).min(), labels.masked_fill(none, -largest).max()]
    ).tolist()
    return (lowest, highest) if highest > -largest else (1, 0)


def fit_shapes(output: Tensor, target: Tensor) -> str:
    if output.ndim == target.ndim + 1 and output.shape[-1] == 1:
        return "Take pred.squeeze(-1) in the model, or target.unsqueeze(-1)."
    if target.ndim == output.ndim + 1 and target.shape[-1] == 1:
        return "Take target.squeeze(-1) in the data."
    return "Make the model's last layer and the target agree."


def explaining_errors(loss_func: LossFunc) -> LossFunc:
    """The first call of a pass: an error of the loss itself gets a note with what it was given."""

    def first_call(output: Any, target: Any) -> Tensor:
        try:
            return loss_func(output, target)
        except Exception as error:
            add_note(
                error, f"{loss_name(loss_func)} was given prediction {describe(output)} and target {describe(target)}"
            )
            raise

    first_call.plain = loss_func  # type: ignore[attr-defined]
    return first_call


def check_loss(loss: Any, *, training: bool) -> None:
    """Refuse a loss that cannot be averaged or differentiated."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss is {describe(loss)} ({loss!r}), expected a 0-d tensor: compute it with torch, without .item()."
        )
    if loss.ndim:
        raise ValueError(
            f"the loss has shape {tuple(loss.shape)}, expected one number: average over the batch "
            "(reduction='mean' or .mean())."
        )
    if training and not loss.requires_grad:
        raise ValueError(
            "the loss has no graph, so nothing can be learned from it. Either every parameter is frozen "
            "(learn.unfreeze()), or the model or loss detaches (.detach(), .item(), torch.no_grad(), argmax)."
        )


def loss_per_sample(loss_func: LossFunc) -> LossFunc:
    """The same loss, one value a sample: float (batch,). Needs a loss with a `reduction`."""

    def losses(output: Any, target: Any) -> Tensor:
        if isinstance(loss_func, nn.Module) and isinstance(getattr(loss_func, "reduction", None), str):
            was = loss_func.reduction
            setattr(loss_func, "reduction", "none")  # noqa: B010
            try:
                values = loss_func(output, target)
            finally:
                setattr(loss_func, "reduction", was)  # noqa: B010
        else:
            try:
                values = loss_func(output, target, reduction="none")
            except TypeError as error:
                raise TypeError(
                    f"{loss_name(loss_func)} gives no loss per sample: with_loss=True needs a loss with "
                    "reduction='none', as those of torch.nn have."
                ) from error
        return values.flatten(1).mean(1) if values.ndim > 1 else values

    return losses


def loss_name(loss_func: Any) -> str:
    return getattr(loss_func, "__name__", type(loss_func).__name__)


def each_loss(loss_func: LossFunc | None, pred: Any, target: Any) -> Tensor:
    """Each sample's own loss, float (samples,); None: by the default of these."""
    return loss_per_sample(loss_func or default_loss(pred, target))(pred, target)


def weighted(loss: Tensor, n: Any) -> Tensor:
    """A mean over n, a number or a 0-d tensor, as a sum without its graph; 0 where n is: a mean over nothing is NaN."""
    if isinstance(n, Tensor):
        return torch.where(n != 0, loss.detach() * n, 0.0)
    return loss.detach() * n if n else torch.zeros_like(loss)


def count_like(loss: Tensor, n: Tensor) -> Tensor:
    """A count in the precision of a loss."""
    return n.to(torch.promote_types(loss.dtype, torch.float32))


def not_zero(n: Any) -> Any:
    """What a sum over n can be divided by, 1 where n is 0; a device is not read."""
    return n + (n == 0)
