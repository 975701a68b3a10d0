"""One model spread over many processes: each has its part of the weights, the gradients and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnkit.callbacks.auto_microbatch import AutoMicrobatch
from learnkit.callbacks.distributed import Distributed, OneModel, install, join_ranks, listed_names
from learnkit.callbacks.mixed_precision import MixedPrecision
from learnkit.data.batch import split_batch
from learnkit.data.loaders import n_batches
from learnkit.devices.dtensor import is_shard, like
from learnkit.devices.nested import to_device
from learnkit.distributed.fully_shard import (
    AsManyForwards,
    as_policy,
    check_shardable,
    find_blocks,
    reshard,
    shard_model,
)
from learnkit.distributed.guard import guard
from learnkit.hooks import Callback, Run, run_then
from learnkit.learner import Learner
from learnkit.loop.fit import optimizer_of
from learnkit.optim.combined import Together
from learnkit.optim.groups import can_fuse_shards
from learnkit.optim.state import load_optimizer

REFUSED: dict[type[Callback], str] = {
    AutoMicrobatch: "where memory runs out on one rank, the others wait for its part of the weights. Take a smaller "
    "batch size and "
    "Accumulate, activation_checkpointing=True or cpu_offload=True",
}

OF_WHOLE = tuple(getattr(torch.optim, name) for name in ("Adafactor", "LBFGS", "Muon") if hasattr(torch.optim, name))


class FullyShard(Callback):
    """What `learn.to_fsdp()` adds beside Distributed, where there is more than one process.

    The model is spread already; this sees to its passes. In training, what the last block's forward has gathered stays
    for the backward, and batches that wait for a later step (Accumulate) reduce no gradients. In evaluations a rank
    with fewer batches sends its last one through the model again, as a forward pass needs all ranks; callbacks that
    call the model more than once a batch must do so on all ranks alike. Afterwards every rank has its part only. The
    options are those of `Learner.to_fsdp`.

    >>> learn.to_fsdp(blocks=nn.TransformerEncoderLayer, activation_checkpointing=True)  # doctest: +SKIP
    """

    order = Distributed.order + 5
    unique = True

    def __init__(
        self,
        *,
        blocks: Any = (),
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        mixed_precision: Any = None,
    ) -> None:
        self.options = {
            "blocks": blocks,
            "activation_checkpointing": activation_checkpointing,
            "cpu_offload": cpu_offload,
            "mixed_precision": mixed_precision,
        }
        as_policy(mixed_precision)  # its errors, before anything else
        self.keeps = False  # whether what the root's forward has gathered stays
        self.has_run = False  # whether the model has, since it was spread
        self.storages: list[tuple[str, Tensor, int]] = []  # of its parameters, at the start of the pass under way

    def around_fit(self, learn: Learner, run: Run) -> None:
        check_beside(learn)
        self.forget(learn)  # what an error has left
        before = learn.no_sync, learn.reduce_gradients
        learn.no_sync, learn.reduce_gradients = lambda: unreduced(learn), lambda: check_reduced(learn)
        try:
            run()
        finally:
            learn.no_sync, learn.reduce_gradients = before

    def around_train(self, learn: Learner, run: Run) -> None:
        def run_kept() -> None:
            with self.kept(learn):
                run()

        run_then(run_kept, lambda: self.forget(learn))

    def around_validate(self, learn: Learner, run: Run) -> None:
        if not learn.meter.everywhere:
            learn.dl = AsManyForwards(learn.dl, n_batches(learn.dl), lambda batch: forward(learn, batch))
        with self.kept(learn):
            run()

    @contextmanager
    def kept(self, learn: Learner) -> Iterator[None]:
        """For a pass, the root's weights stay gathered from one forward to its backward, or to the next forward."""
        root: Any = learn.model
        before, self.keeps = self.keeps, True
        storages_before, self.storages = self.storages, storages(root)
        root.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            self.keeps, self.storages = before, storages_before
            root.set_reshard_after_forward(not before, recurse=False)
            reshard(root)

    def forget(self, learn: Learner) -> None:
        """Gradients that wait for a step that will not come."""
        root: Any = learn.model
        if self.has_run:
            root.reset_iter_state()

    def watch(self, root: nn.Module) -> None:
        """Its state can be reset from the first forward on."""

        def note(module: nn.Module, args: Any) -> None:
            self.has_run = True
            handle.remove()

        handle = root.register_forward_pre_hook(note)


class Parts(Callback):
    """Beside FullyShard, but innermost: what others' hooks find before and after a pass is the weights in parts.

    Raises RuntimeError where the `data` of one was replaced within a pass: of a part of a weight PyTorch ignores that,
    or crashes (2.15).
    """

    order = OneModel.order - 1
    unique = True

    def __init__(self, spread: FullyShard) -> None:
        self.spread = spread

    def around_train(self, learn: Learner, run: Run) -> None:
        run_then(run, lambda: self.end(learn))

    def around_validate(self, learn: Learner, run: Run) -> None:
        self.look()
        run_then(run, lambda: reshard(learn.model))

    def before_batch(self, learn: Learner) -> None:
        self.look()

    def end(self, learn: Learner) -> None:
        reshard(learn.model)
        self.look()

    def look(self) -> None:
        replaced = [name for name, p, storage in self.spread.storages if p.untyped_storage()._cdata != storage]
        if replaced:
            raise RuntimeError(
                f"the data of {len(replaced)} parameters was replaced: {listed_names(replaced)}. After to_fsdp each "
                f"rank has a part of each, of which PyTorch ignores that. For p.data = value write p.copy_(value), in "
                f"torch.no_grad()."
            )


def storages(model: nn.Module) -> list[tuple[str, Tensor, int]]:
    """Each parameter that is in parts, with its name and what it lies in, which an assignment to its `data`
    replaces.
    """
    return [(name, p, p.untyped_storage()._cdata) for name, p in model.named_parameters() if is_shard(p)]


@contextmanager
def unreduced(learn: Learner) -> Iterator[None]:
    """Gradients of the batches within stay whole on each rank, until one is reduced with them.

    Of a loader without a length nobody knows which batch is the last: each is reduced.
    """
    root: Any = learn.model
    if n_batches(learn.dl) is None:
        yield
        return
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


def check_reduced(learn: Learner) -> None:
    if n_batches(learn.dl) is None:
        return  # each batch's were, see `unreduced`
    raise RuntimeError(
        "a loader ended before the number of batches that its len() says, with gradients that no rank has reduced: "
        "make its __len__ tell the truth, or give it none."
    )


def forward(learn: Learner, batch: Any) -> None:
    """What the other ranks' forward passes need of this one's, and no more."""
    moved = to_device(batch, learn.device)
    learn._see_first(moved)  # of a rank without a batch of its own, the first that it sees
    inputs, target = split_batch(moved)
    if learn._passes_target:
        inputs = {**inputs, learn._passes_target: target}  # type: ignore[dict-item]
    learn.evaluated_model(**inputs) if isinstance(inputs, dict) else learn.evaluated_model(*inputs)


# --- what does not go together -----------------------------------------------
def check_beside(learn: Learner) -> None:
    for callback in learn.running:
        if type(callback) in REFUSED:
            raise ValueError(f"{type(callback).__name__} beside to_fsdp: {REFUSED[type(callback)]}.")
        if isinstance(callback, MixedPrecision) and callback.pure:
            raise ValueError(
                "pure=True beside to_fsdp: it casts whole weights, of which each rank has a part. Take "
                "to_fsdp(mixed_precision=torch.bfloat16), which does the same as they are gathered, or pure=False."
            )
    check_optimizer(learn.opt)


def check_optimizer(opt: Optimizer) -> None:
    for own in opt.optimizers if isinstance(opt, Together) else (opt,):
        if any(group.get("fused") for group in own.param_groups) and not can_fuse_shards(own):
            raise ValueError(
                f"{type(own).__name__}(fused=True) beside to_fsdp: PyTorch has no fused kernel of it for weights that "
                f"are spread over ranks. Build it with fused=False."
            )
        if isinstance(own, OF_WHOLE):
            raise ValueError(
                f"{type(own).__name__} beside to_fsdp: it computes with whole matrices, of which each rank has some "
                f"rows. Take to_distributed(), or an optimizer that takes each number by itself, such as AdamW."
            )


# --- joining the others ------------------------------------------------------
def attach_fully_sharded(
    learn: Learner, local_rank: int | str | None, *, timeout: float | None, hang_timeout: float | None, **options: Any
) -> Learner:
    """What `learn.to_fsdp` does: join the group, start from rank 0's weights, and keep this rank's part of them."""
    if learn.is_running:
        raise RuntimeError("to_fsdp was called while this Learner runs: call it before.")
    if learn.asked_of_ddp:
        raise ValueError(
            f"to_fsdp after to_distributed({learn.asked_of_ddp}): fully_shard reduces gradients by itself, in one way, "
            f"and has none of these. Take one of the two."
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
    learn.callbacks = [cb for cb in learn.callbacks if not isinstance(cb, (FullyShard, Parts))]
    callback.watch(learn.model)
    return install(learn, Distributed(replicas=False, hang_timeout=hang_timeout), callback, Parts(callback))


def point_to(opt: Optimizer, names: dict[int, str], parameters: dict[str, Any]) -> None:
    """Make an optimizer that the user built one of the spread parameters, with its state in parts."""
    for own in opt.optimizers if isinstance(opt, Together) else (opt,):
        for group in own.param_groups:
            group["params"] = [parameters[names[id(p)]] for p in group["params"]]
        for p in list(own.state):
            spread, values = parameters[names[id(p)]], own.state.pop(p)
            own.state[spread] = {
                name: like(spread, value) if isinstance(value, Tensor) and value.ndim else value
                for name, value in values.items()
            }
