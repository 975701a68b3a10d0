"""Batches that do not fit into memory, split until they fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from learnkit.callbacks.compiled import Compiled
from learnkit.callbacks.distributed import Distributed
from learnkit.devices.nested import describe, map_tensors, tensors_in
from learnkit.hooks import Callback, Deferred, Run, add_note
from learnkit.learner import Learner
from learnkit.loop.loss import not_zero, weighted
from learnkit.loop.memory import forget_tensors, free_cached, is_out_of_memory, stage_of

Shapes = list[tuple[int, ...]]


class AutoMicrobatch(Callback):
    """Split training batches that do not fit into memory in halves until they fit; continue with parts of that size.

    The gradient is that of the whole batch: each part is weighted by its number of samples. `learn.loss` is the loss of
    the whole batch. Batch norm normalizes each part separately. Evaluation batches are not split.

    A batch is a trial until a part that is as large in every dimension has fitted after the first step of this fit,
    when the optimizer has its state. So longer sequences and larger pictures are trials too. A trial costs a copy of
    the model's buffers; a failed trial changes neither buffers nor random numbers. When memory runs out later, at a
    size that had fitted, that batch is split with a warning, and batch norm's statistics have then seen it twice.
    Within a window of Accumulate this is an error, and so it is in the optimizer's step, because the memory that the
    step needs does not depend on the batch.

    On several ranks each rank has its own size and does not communicate it. A rank runs a trial alone, while the others
    wait in DDP's reduction as they do for any slow rank. Then it joins them with a pass of two samples that adds
    nothing to the gradients. When memory runs out at a size that had fitted and the reduction may have begun, this is
    an error that ends all ranks: after the last part's forward pass, and at any time in a model with buffers. The
    model's forward must not communicate, because the ranks may call it a different number of times.

    Args:
        size: the largest number of samples of a part at the start. None: whole batches.

    Raises:
        ValueError: when `size` is not a whole number of 1 or more, or, at the start of the fit, when it is combined
            with sync_bn=True.

    Example:
        >>> learn.fit(5, callbacks=[AutoMicrobatch()])  # doctest: +SKIP
    """

    order = Compiled.order - 10  # all other callbacks see the batch once, not its parts
    unique = True
    per_rank = True

    def __init__(self, size: int | None = None) -> None:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"size={size!r}: expected a whole number of samples, 1 or more.")
        self.initial_size = self.size = size  # samples of a part; None: a whole batch
        self.first_step = -1  # the number of this fit's first step; -1: no pass has begun
        self.proven: list[Shapes] = []  # parts that have fitted, each larger than the others in some dimension
        self.trusted: Any = (
            None  # the last batch that was no trial: (shapes, samples of a part, whether gradients are held)
        )
        self.shapes: list[torch.Size] = []  # shapes of the last batch's tensors
        self.n = 0  # its number of samples
        self.in_last_part = False  # whether ranks reduce gradients in the current pass

    def before_fit(self, learn: Learner) -> None:
        self.size, self.first_step = self.initial_size, -1
        self.forget()
        replicas = next((callback.replicas for callback in learn.running if isinstance(callback, Distributed)), None)
        if replicas is not None and replicas.sync_bn:
            raise ValueError(
                "AutoMicrobatch cannot be combined with sync_bn=True: a rank whose memory runs out would leave the "
                "others waiting in a batch norm layer. Use one of them; batch_size_find() finds the size that fits."
            )

    def before_train(self, learn: Learner) -> None:
        if self.first_step < 0:
            self.first_step = learn.step

    def around_batch(self, learn: Learner, run: Run) -> None:
        if not learn.training:
            return run()
        shapes = shapes_in(learn.inputs, learn.target)
        if shapes != self.shapes:
            self.shapes, self.n = shapes, n_samples_here(learn)
        n = self.n
        part = n if self.size is None else min(self.size, n)
        batch = (shapes, part, learn.n_held > 0)
        if batch == self.trusted or self.has_fitted(batch):
            place = learn.step, learn.n_held
            self.in_last_part = part == n
            try:
                if part == n:
                    return run()
                self.passes(learn, n, part)
                return learn.stages.step()  # type: ignore[return-value]
            except BaseException as error:
                reason = self.why_not_split(learn, error, part, place)
                if reason:
                    add_note(error, reason)
                if reason is not None:
                    raise
                forget_tensors(error)
            part = self.split_what_had_fitted(learn, part)
        self.probe(learn, n, part)
        learn.stages.step()

    # --- what has fitted -----------------------------------------------------
    def has_fitted(self, batch: Any) -> bool:
        """Whether parts that are as large in every dimension have fitted."""
        need = needed(*batch, n=self.n)
        if not any(covers(other, need) for other in self.proven):
            return False
        self.trusted = batch
        return True

    def remember(self, learn: Learner, part: int) -> None:
        """Record that this part fits, except before the end of the first step, which creates the optimizer's state."""
        if learn.step == self.first_step:
            return
        need = needed(self.shapes, part, learn.n_held > 0, n=self.n)
        self.proven = [need, *(other for other in self.proven if not covers(need, other))]

    def forget(self) -> None:
        self.proven, self.trusted = [], None

    def why_not_split(self, learn: Learner, error: BaseException, part: int, place: tuple[int, int]) -> str | None:
        """Return why this batch, of a size that had fitted, cannot be split now; "" for an error that splitting does
        not concern; None when it can be split.
        """
        if not is_out_of_memory(error) or stage_of(error) == "step" or (learn.step, learn.n_held) != place or part == 1:
            return ""
        ddp = ddp_of(learn)
        if ddp is not None and self.may_be_shared(learn, ddp, error):
            return (
                "learnkit: AutoMicrobatch could not split this batch, whose size had fitted: the other ranks may have "
                "begun to reduce gradients, or share buffers, with this one."
            )
        if learn.n_held:
            return (
                "learnkit: AutoMicrobatch could not split this batch, whose size had fitted: its gradients are mixed "
                "with those that Accumulate holds."
            )
        return None

    def may_be_shared(self, learn: Learner, ddp: DistributedDataParallel, error: BaseException) -> bool:
        """Whether DDP may have begun to communicate in this batch: buffers before the forward pass, gradients after
        it.
        """
        if ddp.will_sync_module_buffers():
            return True
        if not self.in_last_part or not ddp.require_backward_grad_sync:
            return False
        through = stage_of(error) != "forward" or learn.pred is not None or learn.training_model is not ddp
        return through or ddp.find_unused_parameters  # with it, DDP copies the outputs

    def split_what_had_fitted(self, learn: Learner, part: int) -> int:
        """Halve the size from now on, because there is less memory than before; return the new size."""
        learn.failure = learn.pred = learn.loss = None
        for p in learn.model.parameters():
            p.grad = None
        free_cached(learn.device)
        self.forget()
        self.size = max(1, part // 2)
        warnings.warn(
            f"memory ran out at {part} samples, which had fitted before, {learn.where()}: another process may have "
            f"taken it. AutoMicrobatch continues with parts of {self.size}.",
            stacklevel=2,
        )
        return self.size

    # --- the passes of a batch -----------------------------------------------
    def probe(self, learn: Learner, n: int, part: int) -> None:
        """Find the size of the parts that fits; afterwards the gradients of the batch are complete."""
        ddp = ddp_of(learn)
        with by_itself(learn, ddp):
            start = State(learn)
            with Deferred() as deferred:
                while (error := self.attempt(learn, n, part)) is not None:
                    start.put_back(learn)
                    if part == 1:
                        raise error
                    self.size = part = part // 2
        if deferred.signal is None:
            self.remember(learn, part)
        start.add_gradients()
        if ddp is not None and any(p.grad is not None for p in start.parameters):
            self.join(learn, ddp, n, part)
        deferred.release()

    def attempt(self, learn: Learner, n: int, part: int) -> BaseException | None:
        """Run the forward and backward passes of all parts; return the error when memory runs out."""
        try:
            self.passes(learn, n, part)
        except BaseException as error:
            if not is_out_of_memory(error, perhaps=True):
                raise
            learn.failure = learn.pred = learn.loss = None
            forget_tensors(error)
            return error
        return None

    def passes(self, learn: Learner, n: int, part: int) -> None:
        """Run the passes of a batch of n samples, part by part; gradients are reduced in the last one."""
        inputs, target, whole = learn.inputs, learn.target, learn.whole
        count, loss, split = learn.count(inputs, target), 0.0, part < n
        part = -(-n // -(-n // part))  # equal parts: batch norm cannot use a last part of one sample
        if whole is None and split:
            learn.whole = count
        try:
            for first in range(0, n, part):
                self.in_last_part = first + part >= n
                learn.inputs, learn.target = cut((inputs, target), first, part, n)
                learn.pred = learn.loss = None
                with nullcontext() if self.in_last_part else learn.no_sync():
                    if not learn.stages.forward() or learn.pred is None:
                        continue
                    loss = loss + weighted(learn.loss, learn.count(learn.inputs, learn.target))
                    learn.stages.backward()
        finally:
            learn.inputs, learn.target, learn.whole = inputs, target, whole
        if split and isinstance(loss, Tensor):
            learn.loss = loss / not_zero(count)

    def join(self, learn: Learner, ddp: DistributedDataParallel, n: int, part: int) -> None:
        """Join the other ranks' reduction of this batch's gradients after a trial, when this rank's are complete.

        This takes a pass of two samples whose loss is multiplied by zero. It fits, because the trial's parts did.
        """
        if not ddp.require_backward_grad_sync:
            return  # the other ranks do not reduce either, for example within a window of Accumulate
        done, kept = State(learn, gradients=False), (learn.inputs, learn.target, learn.pred, learn.loss)
        try:
            learn.inputs, learn.target = cut((learn.inputs, learn.target), 0, min(part, 2), n)
            learn.pred = learn.loss = None
            if learn.stages.forward() and learn.pred is not None:
                learn.loss = learn.loss * 0.0
                learn.stages.backward()
        finally:
            learn.inputs, learn.target, learn.pred, learn.loss = kept
        done.put_back_buffers()
        done.put_back_random(learn)

    # --- checkpoints ---------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        return {"size": min((state["size"] for state in states if state["size"] is not None), default=None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.size = state["size"]


class State:
    """What a failed attempt may change: buffers and random numbers, and the gradients of earlier batches, which are
    kept apart meanwhile.
    """

    def __init__(self, learn: Learner, *, gradients: bool = True) -> None:
        from learnkit.checkpoint.resume import random_state

        self.random, self.parameters = random_state(learn.device), list(learn.model.parameters())
        self.buffers = [
            (module._buffers, name, b, b.clone())
            for module in learn.model.modules()
            for name, b in module._buffers.items()
            if b is not None
        ]
        self.gradients = [p.grad for p in self.parameters] if gradients else []
        if gradients:
            self.drop_gradients()

    def put_back(self, learn: Learner) -> None:
        self.put_back_random(learn)
        self.put_back_buffers()
        self.drop_gradients()
        free_cached(learn.device)

    def put_back_random(self, learn: Learner) -> None:
        from learnkit.checkpoint.resume import put_random_state

        put_random_state(self.random, learn.device)

    @torch.no_grad()
    def put_back_buffers(self) -> None:
        for buffers, name, buffer, value in self.buffers:
            buffers[name] = buffer.copy_(value)  # also when a forward pass has replaced it

    def drop_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def add_gradients(self) -> None:
        for p, earlier in zip(self.parameters, self.gradients, strict=True):
            if earlier is not None:
                p.grad = earlier if p.grad is None else p.grad.add_(earlier)


def ddp_of(learn: Learner) -> DistributedDataParallel | None:
    """Return the DDP module of the training model on several ranks, also where another callback has wrapped it."""
    if learn.world_size == 1:
        return None
    return next(
        (module for module in learn.training_model.modules() if isinstance(module, DistributedDataParallel)), None
    )


@contextmanager
def by_itself(learn: Learner, ddp: DistributedDataParallel | None) -> Iterator[None]:
    """Run passes without the other ranks: DDP communicates only what the others' forward passes begin with."""
    if ddp is None:
        yield
        return
    with learn.no_sync():
        ddp._pre_forward(torch.empty(0))  # rank 0's buffers, and after the first step the layout of the buckets
        ddp.require_forward_param_sync = False  # only once: a failed attempt would leave it to the next one
        yield


def shapes_in(inputs: Any, target: Any) -> list[torch.Size]:
    """Return the shapes of all tensors; one loop without further calls, because it runs for each batch."""
    shapes, rest = [], [inputs, target]
    while rest:
        value = rest.pop()
        if isinstance(value, Tensor):
            shapes.append(value.shape)
        elif isinstance(value, (tuple, list)):
            rest.extend(value)
        elif isinstance(value, (dict, Mapping)):
            rest.extend(value.values())
    return shapes


def needed(shapes: list[torch.Size], part: int, held: bool, *, n: int) -> Shapes:
    """Return what the largest part of a batch of n samples needs: whether gradients exist before its backward pass, and
    its shapes.
    """
    largest = -(-n // -(-n // part))
    return [
        (held or largest < n,),
        *((largest, *shape[1:]) if shape and shape[0] == n else tuple(shape) for shape in shapes),
    ]


def covers(large: Shapes, small: Shapes) -> bool:
    """Whether each tensor of `large` is at least as large as that of `small`, in every dimension."""
    return len(large) == len(small) and all(
        len(a) == len(b) and all(i >= j for i, j in zip(a, b, strict=True)) for a, b in zip(large, small, strict=True)
    )


def n_samples_here(learn: Learner) -> int:
    sizes = {len(t) for t in tensors_in(learn.inputs) if t.ndim}
    if len(sizes) != 1:
        raise ValueError(
            f"AutoMicrobatch splits inputs along their first dimension, which must be the same for all; got "
            f"{describe(learn.inputs)}."
        )
    return sizes.pop()


def cut(batch: Any, first: int, size: int, n: int) -> Any:
    """Return the part of a batch of n samples that begins at `first`; a tensor that has not n rows stays whole."""
    return map_tensors(lambda t: t[first : first + size] if t.ndim and len(t) == n else t, batch)
