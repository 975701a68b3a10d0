"""One model sharded over many processes: each has its part of the weights, the gradients and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from learnkit.callbacks.auto_microbatch import AutoMicrobatch
from learnkit.callbacks.distributed import Distributed
from learnkit.callbacks.mixed_precision import MixedPrecision
from learnkit.data.batch import split_batch
from learnkit.data.loaders import n_batches
from learnkit.devices.nested import to_device
from learnkit.distributed.fully_shard import AsManyForwards, as_policy, reshard, storages
from learnkit.distributed.sharded_optimizer import check_optimizer
from learnkit.hooks import Callback, Run, run_then
from learnkit.learner import Learner

REFUSED: dict[type[Callback], str] = {
    AutoMicrobatch: "where memory runs out on one rank, the others wait for its part of the weights. Use a smaller "
    "batch size and Accumulate, activation_checkpointing=True or cpu_offload=True",
}


class FullyShard(Callback):
    """Run the passes of a sharded model. `learn.to_fsdp()` adds it together with Distributed, if there is more than one
    process.

    In training, the weights that the last block's forward pass has gathered stay for the backward pass, and batches
    that wait for a later step (Accumulate) reduce no gradients. In evaluations a rank with fewer batches sends its last
    one through the model again, because a forward pass needs all ranks; callbacks that call the model more than once in
    a batch must do so on all ranks. After each pass every rank has only its part.

    Args:
        blocks: as in `Learner.to_fsdp`.
        activation_checkpointing: as in `Learner.to_fsdp`.
        cpu_offload: as in `Learner.to_fsdp`.
        mixed_precision: as in `Learner.to_fsdp`.

    Raises:
        ValueError: for mixed_precision=torch.float16.
        TypeError: for another mixed_precision that is neither None, torch.bfloat16 nor a MixedPrecisionPolicy.

    Example:
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
        self.keeps = False  # whether the weights that the root's forward pass has gathered stay
        self.has_run = False  # whether the model has run since it was sharded
        self.storages: list[tuple[str, Tensor, int]] = []  # of its parameters, at the start of the current pass

    def around_fit(self, learn: Learner, run: Run) -> None:
        check_combined(learn)
        self.forget(learn)  # gradients that an error has left
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
        """During a pass, keep the root's weights gathered from a forward pass to its backward pass, or to the next
        forward pass.
        """
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
        """Discard gradients that wait for a step that will not be done."""
        root: Any = learn.model
        if self.has_run:
            root.reset_iter_state()

    def watch(self, root: nn.Module) -> None:
        """Note the first forward pass: from then on, the model's state can be reset."""

        def note(module: nn.Module, args: Any) -> None:
            self.has_run = True
            handle.remove()

        handle = root.register_forward_pre_hook(note)


@contextmanager
def unreduced(learn: Learner) -> Iterator[None]:
    """Keep the gradients of the batches in this block whole on each rank, until a later batch is reduced with them.

    For a loader without a length, the last batch is not known: each batch is reduced.
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
        return  # each batch was reduced, see `unreduced`
    raise RuntimeError(
        "a loader ended earlier than its len(), with gradients that no rank has reduced: correct its __len__, or "
        "remove it."
    )


def forward(learn: Learner, batch: Any) -> None:
    """A forward pass whose result is ignored: the other ranks' forward passes need it."""
    moved = to_device(batch, learn.device)
    learn._see_first(moved)  # on a rank without batches, the first one that it sees
    inputs, target = split_batch(moved)
    if learn._passes_target:
        inputs = {**inputs, learn._passes_target: target}  # type: ignore[dict-item]
    learn.evaluated_model(**inputs) if isinstance(inputs, dict) else learn.evaluated_model(*inputs)


# --- what cannot be combined -------------------------------------------------
def check_combined(learn: Learner) -> None:
    for callback in learn.running:
        if type(callback) in REFUSED:
            raise ValueError(f"{type(callback).__name__} cannot be combined with to_fsdp: {REFUSED[type(callback)]}.")
        if isinstance(callback, MixedPrecision) and callback.pure:
            raise ValueError(
                "pure=True cannot be combined with to_fsdp: it casts whole weights, and each rank has only a part. Use "
                "to_fsdp(mixed_precision=torch.bfloat16), which casts weights when they are gathered, or pure=False."
            )
    check_optimizer(learn.opt)
