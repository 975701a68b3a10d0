# pyright: reportPrivateImportUsage=false
"""Stop a fit whose gradients are not finite, before the weights become so."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from learnkit.devices.dtensor import own_parts
from learnkit.hooks import Callback, StopFit
from learnkit.learner import Learner


class TerminateOnNaN(Callback):
    """Stop the fit before a step whose gradients are not finite; the weights stay those of the last good step.

    A warning names the parameters and, on several ranks, the loss of each rank. All ranks stop, because DDP gives them
    the same gradients. Costs one norm of the gradients and one read from the device per step.

    Example:
        >>> learn.fit(10, callbacks=[TerminateOnNaN()])  # doctest: +SKIP
    """

    in_trials = False

    def before_step(self, learn: Learner) -> None:
        named = [(name, p.grad) for name, p in learn.model.named_parameters() if p.grad is not None]
        gradients = [gradient for _, gradient in named]
        parts = own_parts(gradients)
        good = not named or bool(all_finite(parts))  # reads from the device
        if parts is not gradients and learn.world_size > 1:
            good = not learn.ranks.agree(not good)  # sharded: each rank has checked its own shards
        if good:
            return
        of_all = learn.ranks.gather(
            [name for (name, _), part in zip(named, parts, strict=True) if not bool(all_finite([part]))]
        )
        bad = list(dict.fromkeys(name for names in of_all for name in names))
        losses = learn.ranks.gather(learn.loss.detach().cpu() if isinstance(learn.loss, Tensor) else None)
        of_ranks = (
            "; losses by rank: " + ", ".join(f"{float(loss):.4g}" for loss in losses)
            if len(losses) > 1
            else f"; the loss is {float(losses[0]):.4g}"
            if losses[0] is not None
            else ""
        )
        if learn.rank == 0:
            warnings.warn(
                f"stopped before step {learn.step}: the gradients of {len(bad)} parameters are not finite "
                f"({', '.join(bad[:4])}{', …' if len(bad) > 4 else ''}{of_ranks}), {learn.where()}. The weights are "
                f"those of the step before. Use a lower learning rate, clip gradients, or check this batch.",
                stacklevel=2,
            )
        raise StopFit


def all_finite(gradients: list[Tensor]) -> Tensor:
    """Return a 0-d bool: whether all numbers are finite; a norm is not finite if one of its numbers is not."""
    parts = [g for g in gradients if g.numel()]  # a shard may be empty
    if not parts:
        return torch.tensor(True)
    norms = torch._foreach_norm(parts, torch.inf)
    if len({g.dtype for g in parts}) > 1:
        norms = [norm.float() for norm in norms]
    return torch.stack(norms).max().isfinite()  # the largest of numbers with a NaN is NaN
