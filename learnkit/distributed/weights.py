"""The same model on all ranks: rank 0's weights for all, and the mean of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from learnkit.distributed.compare import check_same
from learnkit.distributed.reduce import broadcast_into, finish_collective, needs_group
from learnkit.distributed.world import get_world_size


def share_weights(model: nn.Module) -> None:
    """Put rank 0's weights and buffers on every rank; raises ValueError when the ranks have different models."""
    check_same(
        {
            "the torch version": torch.__version__,
            "the model": type(model).__name__,
            "the model's parameters": model_in_words(model),
        }
    )
    share_values([t for t in model.state_dict().values() if isinstance(t, Tensor) and not t.is_meta])


def share_values(values: Iterable[Any]) -> None:
    """Put rank 0's tensors in the place of this rank's."""
    broadcast_into([value for value in values if isinstance(value, Tensor)])


def model_in_words(model: nn.Module) -> str:
    return ", ".join(
        f"{name} {tuple(p.shape)}{'' if p.requires_grad else ' frozen'}" for name, p in model.named_parameters()
    )


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the mean of all ranks' gradients on all ranks, after the backward pass, in one collective for each dtype.

    Like DDP, this divides before it adds, in the gradients' own dtype, and sends gradients from the device that they
    are on. A parameter without a gradient counts as 0 if another rank has one; one number for each parameter shows
    which ranks have one. Only a rank without a gradient reads these numbers.
    """
    if not needs_group():
        return
    for _, alike in groupby(
        sorted((p for p in parameters if p.requires_grad or p.grad is not None), key=kind_of), key=kind_of
    ):
        own = list(alike)
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        lacking = [k for k, p in enumerate(own) if p.grad is None]
        has = given[0].new_ones(len(own))
        for k in lacking:
            has[k] = 0.0
        flat = torch.cat([*(g.reshape(-1) for g in given), has]).div_(get_world_size())
        finish_collective(dist.all_reduce(flat, async_op=True), flat.device)
        *parts, has = flat.split([*(g.numel() for g in given), len(own)])
        torch._foreach_copy_(given, [part.view_as(g) for g, part in zip(given, parts, strict=True)])  # type: ignore[reportPrivateImportUsage]
        anywhere = has.tolist() if lacking else []
        for k in lacking:
            if anywhere[k]:
                own[k].grad = given[k]


@torch.no_grad()
def means(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each tensor's mean over all ranks, in new memory, by two collectives for each dtype. It is rank 0's value
    plus the mean of the differences from it: where all ranks have the same value, the mean equals it to the last bit.
    """
    found = [t.detach().clone() for t in tensors]
    if not needs_group():
        return found
    for _, alike in groupby(sorted((t for t in found if t.is_floating_point()), key=kind_of), key=kind_of):
        group = list(alike)
        own = torch.cat([t.reshape(-1) for t in group])
        flat = own.clone()
        finish_collective(dist.broadcast(flat, 0, async_op=True), flat.device)
        own.sub_(flat).div_(get_world_size())
        finish_collective(dist.all_reduce(own, async_op=True), own.device)
        for t, part in zip(group, flat.add_(own).split([t.numel() for t in group]), strict=True):
            t.copy_(part.view_as(t))
    return found


def kind_of(tensor: Tensor) -> tuple[str, str]:
    return str(tensor.device), str(tensor.dtype)


def reduce_after_backward(model: nn.Module) -> None:
    """After each backward pass through the model, average its gradients over all ranks (Apex's delay_allreduce)."""
    parameters, under_way = [p for p in model.parameters() if p.requires_grad], [False]

    def reduce() -> None:
        under_way[0] = False
        average_gradients(parameters)

    def note(_: Tensor) -> None:
        if not under_way[0]:
            # after all gradients are computed
            Variable._execution_engine.queue_callback(reduce)  # type: ignore[attr-defined]
        under_way[0] = True

    for p in parameters:
        p.register_post_accumulate_grad_hook(note)
