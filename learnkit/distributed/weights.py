"""One model on all ranks: rank 0's weights for each, and the mean of all ranks' gradients."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from learnkit.distributed.compare import check_same
from learnkit.distributed.reduce import all_sum, broadcast_from_main
from learnkit.distributed.world import get_world_size


def share_weights(model: nn.Module) -> None:
    """Rank 0's weights and buffers on every rank; raises ValueError where the ranks have different models."""
    check_same({"the torch version": torch.__version__, "the model": type(model).__name__, "the model's parameters": model_in_words(model)})
    share([t for t in model.state_dict().values() if isinstance(t, Tensor) and not t.is_meta])


def share(values: list[Any]) -> None:
    """Put rank 0's tensors in the place of this rank's, in one broadcast."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors: return
    with torch.no_grad():
        for own, given in zip(tensors, broadcast_from_main(tensors), strict=True): own.copy_(given)


def model_in_words(model: nn.Module) -> str:
    return ", ".join(f"{name} {tuple(p.shape)}{'' if p.requires_grad else ' frozen'}" for name, p in model.named_parameters())


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """What DDP does during the backward pass, afterwards and in one collective: the mean of all ranks' gradients, on all."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients: return
    for gradient, total in zip(gradients, all_sum(gradients), strict=True): gradient.copy_(total / get_world_size())


def reduce_after_backward(model: nn.Module) -> None:
    """Whenever a backward pass through the model is over, make its gradients the mean of all ranks' (Apex's delay_allreduce)."""
    parameters, under_way = [p for p in model.parameters() if p.requires_grad], [False]

    def reduce() -> None:
        under_way[0] = False
        average_gradients(parameters)

    def note(_: Tensor) -> None:
        if not under_way[0]: Variable._execution_engine.queue_callback(reduce)  # type: ignore[attr-defined]  # when all gradients are there
        under_way[0] = True
    for p in parameters: p.register_post_accumulate_grad_hook(note)
