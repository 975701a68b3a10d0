"""One model spread over many processes: each has its part of the weights, the gradients and the optimizer's state."""

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
    AutoMicrobatch: "where memory runs out on one rank, the others wait for its part of the weights. Take a smaller "
    "batch size and "
    "Accumulate, activation_checkpointing=True or cpu_offload=True",
}


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
