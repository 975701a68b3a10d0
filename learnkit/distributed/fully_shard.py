# pyright: reportPrivateImportUsage=false
"""A model whose weights, gradients and optimizer states are sharded over the ranks: PyTorch's fully_shard, block by
block.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from learnkit.data.order import EpochOrder, set_seed_and_epoch
from learnkit.devices.accelerator import can_pin
from learnkit.devices.dtensor import is_shard
from learnkit.distributed.reduce import agree, broadcast_from_main, gather_objects, needs_group
from learnkit.distributed.weights import share_weights
from learnkit.distributed.world import backends, get_device, get_world_size, take_device

Blocks = Any  # a class, a name, or several of them


def shard_model(
    model: nn.Module,
    *,
    blocks: Blocks = (),
    activation_checkpointing: bool = False,
    cpu_offload: bool = False,
    mixed_precision: Any = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Shard a model over the ranks in place (ZeRO-3, Rajbhandari et al., 2020).

    All ranks get rank 0's weights. Weights on the meta device are drawn, block by block, by each module's
    `reset_parameters` from rank 0's random state, so that no rank ever has them all. In a world of one, this is all
    that is done. Build the optimizer afterwards.

    Args:
        model: the same on all ranks.
        blocks: what is gathered at a time, while the rest stays sharded: a class such as nn.TransformerEncoderLayer,
            the name of a module (for a ModuleList or Sequential: each of its members), or several. (): all at once.
        activation_checkpointing: compute each block's activations again in the backward pass.
        cpu_offload: keep weights, gradients and optimizer states in the CPU's memory, and step there.
        mixed_precision: torch.bfloat16: gather and compute in it, except batch norm, and reduce in float32; or a
            torch.distributed.fsdp.MixedPrecisionPolicy.
        device: None: `get_device()`.

    Returns:
        The model.

    Raises:
        ValueError: when the model has no such block, or has parameters that cannot be sharded.
        TypeError: when the model is sharded or wrapped already.

    Example:
        >>> shard_model(nn.Sequential(nn.Linear(2, 2)), blocks=nn.Linear)
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    device = get_device() if device is None else device
    policy, found = as_policy(mixed_precision), find_blocks(model, blocks)
    if activation_checkpointing and not found:
        raise ValueError(
            "activation_checkpointing=True has no blocks to compute again: give blocks=, such as the class of the "
            "layers."
        )
    if not needs_group():
        with shared_random_state(device):
            materialize(model, device)
        return model
    check_shardable(model)
    take_device(device)
    if cpu_offload:
        check_offload()
    share_weights(model)
    if activation_checkpointing:
        for block in found:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    options = {"mesh": mesh_of(device), "reshard_after_forward": True}
    if cpu_offload:
        options["offload_policy"] = offload_policy(device)
    shard = partial(fully_shard, policy=policy, options=options)
    apart = {id(module) for module in (*found, *spared(model, policy))}
    with shared_random_state(device):
        materialize(model, device, apart, partial(shard, root=False))
    shard(model, root=True)
    prefetch([block for block in found if block is not model])
    return model


def fully_shard(module: nn.Module, *, policy: Any, options: dict[str, Any], root: bool) -> None:
    from dataclasses import replace

    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if is_spared(module, policy):
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    # Only the outermost module casts its outputs: predictions and losses are float32.
    if root and policy.param_dtype is not None and policy.output_dtype is None:
        policy = replace(policy, output_dtype=torch.float32)
    fully_shard(module, mp_policy=policy, **options)


def spared(model: nn.Module, policy: Any) -> list[nn.Module]:
    return [module for module in model.modules() if is_spared(module, policy)]


def is_spared(module: nn.Module, policy: Any) -> bool:
    """Whether a module is batch normalization, which keeps its weights in float32, like its statistics: torch supports
    no other combination.
    """
    return policy.param_dtype is not None and isinstance(module, _BatchNorm) and module.weight is not None


def is_fully_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def check_shardable(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise TypeError(
            "the model is sharded already, which cannot be undone: build it again for other blocks or options."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("the model is wrapped in DistributedDataParallel: give the model itself.")
    scalars = [name for name, p in model.named_parameters() if p.ndim == 0]
    if scalars:
        raise ValueError(f"0-d parameters cannot be sharded: {', '.join(scalars[:5])}. Give them the shape (1,).")
    scattered = [name for name, p in model.named_parameters() if not p.is_contiguous()]
    if scattered:
        raise ValueError(
            f"parameters that are not contiguous cannot be sharded: {', '.join(scattered[:5])}. to_channels_last() "
            f"cannot be combined with to_fsdp(); for other models, make p.data contiguous."
        )
    if getattr(FSDPModule, "reset_iter_state", None) is None:
        raise RuntimeError(
            f"sharding a model needs a newer PyTorch than {torch.__version__}: the fully_shard of 2.15 is known to "
            f"work. to_distributed() works with this one."
        )


def mesh_of(device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (get_world_size(),))


def offload_policy(device: torch.device) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return CPUOffloadPolicy(pin_memory=can_pin(device))


def check_offload() -> None:
    """Raise RuntimeError when the group sends nothing from the CPU, where offloaded shards are gathered, clipped and
    saved.
    """
    if "cpu" not in backends():
        given = ",".join(f"{kind}:{backend}" for kind, backend in backends().items())
        raise RuntimeError(
            f"cpu_offload=True keeps weights on the CPU, but the process group was made with backend {given!r}, which "
            f"sends nothing from there. Make it with init_process_group('cpu:gloo,{given}'), let learnkit make it, or "
            "leave cpu_offload out."
        )


def as_policy(mixed_precision: Any) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if mixed_precision is None:
        return MixedPrecisionPolicy()
    if mixed_precision == torch.bfloat16:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed_precision
    if torch.float16 in (policy, getattr(policy, "param_dtype", None), getattr(policy, "reduce_dtype", None)):
        raise ValueError(
            "mixed_precision=torch.float16 overflows without a scaled loss: use torch.bfloat16, or learn.to_fp16(), "
            "which scales it."
        )
    if not isinstance(policy, MixedPrecisionPolicy):
        raise TypeError(
            f"mixed_precision={policy!r}: expected None, torch.bfloat16 or a "
            f"torch.distributed.fsdp.MixedPrecisionPolicy."
        )
    return policy


# --- blocks ------------------------------------------------------------------
def find_blocks(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """The modules that `blocks` names, in the model's order; raises ValueError or TypeError for a block that the model
    does not have.
    """
    asked = [blocks] if isinstance(blocks, (str, type)) else list(blocks)
    found = {id(module) for block in asked for module in those_of(model, block)}
    return [module for module in model.modules() if id(module) in found]


def those_of(model: nn.Module, block: Any) -> list[nn.Module]:
    named = dict(model.named_modules())
    if isinstance(block, str):
        if block not in named:
            near = difflib.get_close_matches(block, named, n=1) or [name for name, _ in model.named_children()][:8]
            raise ValueError(
                f"blocks={block!r}: the model has no module of this name. Similar names, or its first level: "
                f"{', '.join(near)}."
            )
        module = named[block]
        return (
            list(module.children()) if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) else [module]
        )
    if not isinstance(block, type):
        raise TypeError(f"blocks: {block!r} is {type(block).__name__}, expected a class or a module's name.")
    modules = [module for module in named.values() if isinstance(module, block)]
    if not modules:
        kinds = sorted(
            {type(module).__name__ for module in named.values() if next(module.parameters(), None) is not None}
        )
        raise ValueError(
            f"blocks={block.__name__}: the model has no such module. Its modules with weights are "
            f"{', '.join(kinds[:12])}."
        )
    return modules


def prefetch(blocks: list[nn.Module]) -> None:
    """Gather each block's weights while the block before it (in the backward pass, after it) is computed."""
    chain: list[Any] = [block for block in blocks if is_fully_sharded(block)]
    for block, following in pairwise(chain):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


# --- weights -----------------------------------------------------------------
def materialize(
    module: nn.Module,
    device: torch.device,
    blocks: Iterable[int] = (),
    shard: Callable[[nn.Module], None] | None = None,
    made: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Initialize weights on the meta device, children first, and shard each block as soon as it is complete.

    So parameters are drawn in the order in which most models draw them when they are built. Parameters that modules
    share stay shared. Raises ValueError for a module that has weights and no `reset_parameters`.
    """
    made = {} if made is None else made
    for child in module.children():
        materialize(child, device, blocks, shard, made)
    kinds: tuple[dict[str, Any], ...] = module._parameters, module._buffers
    missing = [(kept, name, t) for kept in kinds for name, t in kept.items() if t is not None and t.is_meta]
    reset = reset_of(module) if any(id(t) not in made for _, _, t in missing) else None
    for kept, name, t in missing:
        if id(t) not in made:
            made[id(t)] = (t, empty_like(t, device))
        kept[name] = made[id(t)][1]  # type: ignore[index]
    if reset is not None:
        reset()
    if shard is not None and id(module) in blocks:
        shard(module)


def empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def reset_of(module: nn.Module) -> Callable[[], None]:
    for name in ("reset_parameters", "_reset_parameters"):  # the second: nn.MultiheadAttention's
        reset = getattr(module, name, None)
        if callable(reset):
            return reset  # type: ignore[return-value]
    names = [name for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None]
    raise ValueError(
        f"{type(module).__name__} has {', '.join(names)} on the meta device, and no reset_parameters() to initialize "
        f"them: write one, or build the model on the CPU."
    )


@contextmanager
def shared_random_state(device: torch.device) -> Iterator[None]:
    """Put rank 0's random state on every rank; it is not restored."""
    torch.random.set_rng_state(broadcast_from_main(torch.random.get_rng_state()).cpu())
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.set_rng_state(broadcast_from_main(module.get_rng_state(device).cpu()), device)
    yield


# --- passes ------------------------------------------------------------------
def reshard(model: nn.Module) -> None:
    """Free what a forward pass has left gathered: the model's parameters are the sharded ones again. Sends nothing."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def storages(model: nn.Module) -> list[tuple[str, Tensor, int]]:
    """Each sharded parameter with its name and its storage, which an assignment to its `data` replaces."""
    return [(name, p, p.untyped_storage()._cdata) for name, p in model.named_parameters() if is_shard(p)]


class AsManyForwards(EpochOrder):
    """A rank's batches of an evaluation; if other ranks have more, its last one goes through the model again, and the
    result is ignored.

    A forward pass gathers weights from all ranks, so all must do the same number of forward passes. `forward` takes a
    batch. Ranks without any batch use rank 0's first one. Loaders without a length cost one small collective for each
    batch.
    """

    def __init__(self, loader: Iterable[Any], n_own: int | None, forward: Callable[[Any], object]) -> None:
        super().__init__(None)
        self.loader, self.forward = loader, forward
        lengths = gather_objects(n_own)
        self.n: int | None = None if None in lengths else max(lengths)  # forward passes of all
        self.lacking: bool | None = None if None in lengths else 0 in lengths  # whether a rank has no batch at all

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        super().set_epoch(epoch, seed)
        set_seed_and_epoch(self.loader, seed, epoch)

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self.loader), object()
        batch = spare = next(batches, end)
        lacking = agree(batch is end) if self.lacking is None else self.lacking
        if lacking:
            spare = broadcast_from_main(None if batch is end else batch)
        for k in count():
            if not self.goes_on(k, has_batch=batch is not end):
                return
            if batch is end:
                self.forward(spare)
            else:
                yield batch
                spare = batch
            batch = next(batches, end)

    def goes_on(self, k: int, *, has_batch: bool) -> bool:
        if self.n is None:
            return bool(agree(has_batch))
        if has_batch and k >= self.n:
            raise ValueError(
                f"a loader gives more batches than its len(), {self.n}, which the ranks have relied on: correct its "
                f"__len__."
            )
        return k < self.n
