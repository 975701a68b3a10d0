"""A model and an optimizer for your own training loop, prepared as by `learn.to_distributed`, with the same options."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from learnkit.devices.nested import as_float32, map_tensors
from learnkit.distributed.algorithms import Communication, Hook, as_algorithm
from learnkit.distributed.batchnorm import sync_batchnorm
from learnkit.distributed.reduce import needs_group
from learnkit.distributed.weights import reduce_after_backward, share_weights
from learnkit.distributed.world import get_device, take_device

UNPREPARED = (
    "algorithm={name!r} averages the weights after the optimizer's steps, and has no optimizer of this model yet: "
    "write optimizer = prepare_optimizer(optimizer, model) before the loop."
)


def prepare_model(
    model: nn.Module,
    *,
    local_rank: int | str | None = None,
    device: torch.device | None = None,
    algorithm: str | Hook = "allreduce",
    period: int | None = None,
    warmup_steps: int | None = None,
    rank: int | None = None,
    sync_bn: bool = False,
    delay_allreduce: bool = False,
    mixed_precision: torch.dtype | None = None,
    gradient_order: Sequence[str] = (),
    **ddp_options: Any,
) -> nn.Module:
    """Move the model to this rank's device, and wrap it in DistributedDataParallel, unless in a world of one.

    All ranks get rank 0's weights and buffers. Build the optimizer from the model afterwards. A model without trainable
    weights is not wrapped. For a model that is too large for one rank, use `shard_model`. What the algorithm keeps from
    step to step is in `communication_of(model).state_dict(optimizer)`.

    Args:
        model: the same on all ranks.
        local_rank: this process's number on its machine; None: `get_local_rank()`.
        device: None: `get_device(local_rank)`.
        algorithm: as in `Learner.to_distributed`; those that average weights need `prepare_optimizer`.
        period: as in `Learner.to_distributed`.
        warmup_steps: as in `Learner.to_distributed`.
        rank: as in `Learner.to_distributed`.
        sync_bn: as in `Learner.to_distributed`.
        delay_allreduce: one reduction of all gradients after each backward pass, of which a step may have several; the
            model is not wrapped.
        mixed_precision: torch.bfloat16 or torch.float16: forward passes with autocast, outputs in float32; float16
            needs a torch.amp.GradScaler.
        gradient_order: what `gradient_order_of` returned for the model in the earlier run that this one resumes.
        **ddp_options: DistributedDataParallel's; gradient_as_bucket_view is True by default.

    Returns:
        The model, or DistributedDataParallel.

    Raises:
        ValueError: for options that do not fit together, or when the ranks have different models.
        TypeError: when the model is wrapped already.
    """
    chosen = as_algorithm(algorithm, period=period, warmup_steps=warmup_steps, rank=rank)
    if delay_allreduce and chosen.name != "allreduce":
        raise ValueError(ONE_REDUCTION.format(name=chosen.name))
    if mixed_precision not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"mixed_precision={mixed_precision!r}: expected torch.bfloat16, torch.float16 or None.")
    device = get_device(local_rank) if device is None else device
    if isinstance(model, DistributedDataParallel):
        raise TypeError("the model is wrapped in DistributedDataParallel already.")
    together = needs_group()
    if together:
        take_device(device)
    model = model.to(device)
    if mixed_precision is not None:
        compute_in(model, mixed_precision, device)
    if not together:
        return model
    if sync_bn:
        model = sync_batchnorm(model)
    if not any(p.requires_grad for p in model.parameters()):
        return model  # which DDP refuses
    if delay_allreduce:
        share_weights(model)
        reduce_after_backward(model)
        return model
    devices = None if device.type == "cpu" else [device.index]
    options = {"gradient_as_bucket_view": True, **ddp_options}
    ddp = (
        DistributedDataParallel(model, device_ids=devices, **options)
        if not gradient_order
        else InOrder(model, gradient_order, device_ids=devices, **options)
    )
    if chosen.name != "allreduce":
        communicate(ddp, Communication(chosen, ddp))
    return ddp


class InOrder(DistributedDataParallel):
    """DistributedDataParallel that uses, from its first step on, the buckets that it otherwise uses from the second on.

    DDP collects gradients in buckets in the order in which they are ready, which it learns in its first step. The place
    of a gradient in its bucket decides the order in which three or more ranks add it up: without this, the first step
    of a resumed fit would round differently.
    """

    def __init__(self, model: nn.Module, gradient_order: Sequence[str], **options: Any) -> None:
        self.gradient_order = list(gradient_order)
        super().__init__(model, **options)
        self.reducer._push_all_rebuilt_params()  # as if they had become ready in the order of the parameters
        self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        names, place = parameter_names(self.module), {name: k for k, name in enumerate(self.gradient_order)}
        order = sorted(range(len(parameters)), key=lambda i: place.get(names[id(parameters[i])], len(place)))
        return [parameters[i] for i in order], [sparse[i] for i in order]


def gradient_order_of(model: nn.Module) -> list[str]:
    """Return the names of the parameters in the order in which DDP collects their gradients from its second step on.

    All ranks must call it, between two steps.

    Args:
        model: as `prepare_model` returned it.

    Returns:
        [] before the order is known (with static_graph=True, after the second step), or if it is always the same.
    """
    if not isinstance(model, DistributedDataParallel) or model.logger is None:
        return []
    if known := model.__dict__.get("gradient_order"):
        return known
    if model.reducer._rebuild_buckets():
        model._has_rebuilt_buckets = True  # else at the next forward pass
    model.logger.set_runtime_stats_and_log()
    told = model._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", "")
    names, parameters = parameter_names(model.module), model._build_params_for_reducer()[0]
    order = [names[id(parameters[int(k)])] for k in re.findall(r"\d+", told)]
    object.__setattr__(model, "gradient_order", order)
    return order


def parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in model.named_parameters()}


ONE_REDUCTION = "delay_allreduce is one all-reduce of all gradients, and algorithm={name!r} has none: use one of them."


def prepare_optimizer(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Average the weights after the optimizer's steps, if the `algorithm` of `prepare_model` does so.

    Args:
        optimizer: built from the parameters of `model`.
        model: as `prepare_model` returned it.

    Returns:
        The same optimizer.

    Raises:
        ValueError: when the optimizer has none of the model's parameters.

    Example:
        >>> model = prepare_model(nn.Linear(2, 2), algorithm="local_sgd")
        >>> optimizer = prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    """
    communication = communication_of(model)
    if communication is not None:
        own, given = (
            set(map(id, communication.parameters)),
            [p for group in optimizer.param_groups for p in group["params"]],
        )
        if not any(id(p) in own for p in given):
            raise ValueError("the optimizer has none of this model's parameters: build it from model.parameters().")
        communication.follow(optimizer)
    return optimizer


def communication_of(model: nn.Module) -> Communication | None:
    """Return the algorithm of a model that `prepare_model` has wrapped; None if gradients are all-reduced, or in a
    world of one.
    """
    found = model.__dict__.get("communication")
    return found if isinstance(found, Communication) else None


def communicate(ddp: DistributedDataParallel, communication: Communication) -> None:
    """Keep the algorithm with its model; without a call of `prepare_optimizer`, an error is raised before the second
    step.
    """
    object.__setattr__(ddp, "communication", communication)  # no module, and no part of its state
    if not communication.algorithm.averages:
        return
    n_forwards = 0

    def check(module: nn.Module, args: Any) -> None:
        nonlocal n_forwards
        n_forwards += module.training and torch.is_grad_enabled()
        if communication.n_followed:
            handle.remove()
        elif n_forwards > 1:
            raise RuntimeError(UNPREPARED.format(name=communication.algorithm.name))

    handle = ddp.register_forward_pre_hook(check)


def compute_in(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Make the model's forward run with autocast, and return float32."""
    forward: Callable[..., Any] = model.forward

    @wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            outputs = forward(*args, **kwargs)  # type: ignore[reportPrivateImportUsage]
        return map_tensors(as_float32, outputs)

    model.forward = cast


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model that DistributedDataParallel wraps; any other model is returned unchanged.

    Use it for evaluation and for saving: DDP's forward waits for the other ranks (it shares buffers), which may have
    fewer batches, and its state_dict has `module.` before every name.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
