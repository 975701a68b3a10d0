"""How a Learner joins the other ranks: what `to_distributed` and `to_fsdp` do."""

from __future__ import annotations

import atexit
from typing import Any

import torch
from torch.optim import Optimizer

from learnkit.callbacks.communicate import Communicate
from learnkit.callbacks.distributed import Distributed
from learnkit.callbacks.fully_shard import FullyShard
from learnkit.callbacks.one_model import OneModel
from learnkit.callbacks.reduce_afterwards import ReduceAfterwards
from learnkit.callbacks.sharded_weights import ShardedWeights
from learnkit.devices.dtensor import is_shard
from learnkit.distributed.algorithms import Algorithm
from learnkit.distributed.fully_shard import check_shardable, find_blocks, shard_model
from learnkit.distributed.group import Group
from learnkit.distributed.guard import guard
from learnkit.distributed.prepare import ONE_REDUCTION
from learnkit.distributed.reduce import broadcast_from_main
from learnkit.distributed.sharded_optimizer import check_optimizer, point_to
from learnkit.distributed.weights import share_weights
from learnkit.distributed.world import (
    as_local_rank,
    destroy_process_group,
    get_device,
    get_rank,
    get_world_size,
    init_process_group,
    take_device,
)
from learnkit.hooks import Callback
from learnkit.learner import Learner
from learnkit.loop.fit import optimizer_of
from learnkit.loop.placement import place
from learnkit.optim.state import load_optimizer


def attach_distributed(
    learn: Learner,
    local_rank: int | str | None,
    *,
    timeout: float | None,
    algorithm: Algorithm,
    delay_allreduce: bool,
    **options: Any,
) -> Learner:
    """Do what `learn.to_distributed` does: join the group, take this rank's device, start from rank 0's weights."""
    if learn.is_running:
        raise RuntimeError("to_distributed was called while this Learner runs: call it before.")
    callback = Distributed(**options)  # its errors before anything else
    if delay_allreduce and algorithm.name != "allreduce":
        raise ValueError(ONE_REDUCTION.format(name=algorithm.name))
    if learn.is_spread or any(map(is_shard, learn.model.parameters())):
        raise TypeError("the model is sharded already, by to_fsdp, for good: build it again for to_distributed.")
    asked = {
        "algorithm": algorithm.name if algorithm.name != "allreduce" else None,
        "delay_allreduce": delay_allreduce or None,
        **{name: value for name, value in options.items() if name != "hang_timeout" and value is not False},
    }
    learn.asked_of_ddp = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
    if not join_ranks(learn, local_rank, timeout, apart=algorithm.averages):
        return alone(learn, algorithm)
    others: list[Callback] = [] if algorithm.name == "allreduce" else [Communicate(algorithm)]
    if delay_allreduce:
        others.append(ReduceAfterwards())
    with guard(hang_timeout=callback.hang_timeout, describe=lambda: "to_distributed"):
        share_weights(learn.model)
        return install(learn, callback, *others)


def attach_fully_sharded(
    learn: Learner, local_rank: int | str | None, *, timeout: float | None, hang_timeout: float | None, **options: Any
) -> Learner:
    """Do what `learn.to_fsdp` does: join the group, start from rank 0's weights, and keep this rank's part of them."""
    if learn.is_running:
        raise RuntimeError("to_fsdp was called while this Learner runs: call it before.")
    if learn.asked_of_ddp:
        raise ValueError(
            f"to_fsdp after to_distributed({learn.asked_of_ddp}): fully_shard reduces gradients in its own way, and "
            f"has none of these options. Use one of the two methods."
        )
    callback = FullyShard(**options)  # its errors before anything else
    check_shardable(learn.model)
    find_blocks(learn.model, options["blocks"])
    built = isinstance(learn.opt_func, Optimizer)
    if built:
        check_optimizer(learn.opt)
    others = join_ranks(learn, local_rank, timeout)
    opt = None if learn.opt is None else learn.opt.state_dict()
    names = {id(p): name for name, p in learn.model.named_parameters()}
    with guard(hang_timeout=hang_timeout, describe=lambda: "to_fsdp"):
        shard_model(learn.model, device=learn.device, **options)
    learn.is_spread = True
    if not others:
        return learn
    if built:
        point_to(learn.opt, names, dict(learn.model.named_parameters()))
    elif opt is not None:
        learn.opt = None  # type: ignore[assignment]
        load_optimizer(optimizer_of(learn), opt)
    learn.callbacks = [cb for cb in learn.callbacks if not isinstance(cb, (FullyShard, ShardedWeights))]
    callback.watch(learn.model)
    innermost = ShardedWeights(lambda: callback.storages)
    return install(learn, Distributed(replicas=False, hang_timeout=hang_timeout), callback, innermost)


def join_ranks(learn: Learner, local_rank: int | str | None, timeout: float | None, *, apart: bool = False) -> bool:
    """Make the Learner one of the ranks, on its device; returns whether there are others."""
    as_local_rank(local_rank)  # a wrong one is an error also where it is not used: alone, without GPUs
    # A Learner on the CPU of a machine with devices: there may be more ranks than devices, and nothing is sent from
    # one.
    backend = "gloo" if learn.device.type == "cpu" else None
    if init_process_group(backend, local_rank=local_rank, timeout=timeout):
        atexit.register(destroy_process_group)
    if get_world_size() == 1:
        return False
    device = learn.device if learn.device.type == "cpu" else get_device(local_rank)
    take_device(device)
    place(learn, device)
    learn.rank, learn.world_size, learn.ranks = get_rank(), get_world_size(), Group(apart=apart)
    return True


def alone(learn: Learner, algorithm: Algorithm) -> Learner:
    """In a world of one, Communicate is added only where a checkpoint of several ranks may have a state for it."""
    learn.callbacks = [cb for cb in learn.callbacks if not isinstance(cb, Communicate)]
    return learn.add_callback(Communicate(algorithm)) if algorithm.keeps_own else learn


def install(learn: Learner, callback: Distributed, *others: Callback) -> Learner:
    """Add these callbacks, in the place of those that an earlier call has added."""
    callback.seed = broadcast_from_main(torch.initial_seed())
    learn.callbacks = [
        cb for cb in learn.callbacks if not isinstance(cb, (Distributed, Communicate, ReduceAfterwards, OneModel))
    ]
    for added in (*others, OneModel(), callback):
        learn.add_callback(added)
    return learn
