"""Batches that do not fit into memory, split until they do."""

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
    """Where a training batch does not fit into memory, split it in halves until it does, and continue with parts of
    that size.

    size    samples of a part, at most, to begin with; None: whole batches

    The gradient is that of the whole batch, each part counting by its samples; `learn.loss` is the batch's. Batch norm
    normalizes each part by itself. Evaluations are not split.

    A batch is a trial until a part that is as large in every dimension has fitted after a step of this fit, when the
    optimizer has its state: longer sequences and larger pictures are trials too. A trial costs a copy of the model's
    buffers; one that fails leaves no trace in them and in random numbers. Memory that runs out later, at a size that
    had fitted, splits that batch with a warning: batch norm's statistics have then seen it twice. It is an error within
    a window of Accumulate, and in the optimizer's step, whose need depends on no batch.

    On several ranks each has its own size, and tells the others nothing. It runs a trial by itself, while they wait in
    DDP's reduction as for any slow rank, and then joins them with a pass of two samples that adds nothing to the
    gradients. Memory that runs out at a size that had fitted is an error, which ends all ranks, once the reduction may
    have begun: after the last part's forward pass, and in a model with buffers. The model's forward must not
    communicate, as ranks may call it differently often.

    >>> learn.fit(5, callbacks=[AutoMicrobatch()])  # doctest: +SKIP
    """

    order = Compiled.order - 10  # everybody else is told of the batch once
    unique = True
    per_rank = True

    def __init__(self, size: int | None = None) -> None:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"size={size!r}: expected a whole number of samples, 1 or more.")
        self.initial_size = self.size = size  # samples of a part; None: a whole batch
        self.first_step = -1  # the number of this fit's first step; -1: no pass has begun
        self.proven: list[Shapes] = []  # parts that have fitted, each larger than the others in some dimension
        self.trusted: Any = (
            None  # the last batch that was no trial: (shapes, samples of a part, whether gradients wait)
        )
        self.shapes: list[torch.Size] = []  # of the last batch's tensors
        self.n = 0  # its samples
        self.in_last_part = False  # whether the pass under way is one in which ranks reduce gradients

    def before_fit(self, learn: Learner) -> None:
        self.size, self.first_step = self.initial_size, -1
        self.forget()
        replicas = next((callback.replicas for callback in learn.running if isinstance(callback, Distributed)), None)
        if replicas is not None and replicas.sync_bn:
            raise ValueError(
                "AutoMicrobatch beside sync_bn=True: a rank whose memory runs out would leave the others waiting in a "
                "layer of batch norm. Take one of them; batch_size_find() tells what fits."
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
        """Whether parts that are as large in every dimension have."""
        need = needed(*batch, n=self.n)
        if not any(covers(other, need) for other in self.proven):
            return False
        self.trusted = batch
        return True

    def remember(self, learn: Learner, part: int) -> None:
        """What has fitted only before the fit's first step says little: the optimizer's state came with it."""
        if learn.step == self.first_step:
            return
        need = needed(self.shapes, part, learn.n_held > 0, n=self.n)
        self.proven = [need, *(other for other in self.proven if not covers(need, other))]

    def forget(self) -> None:
        self.proven, self.trusted = [], None

    def why_not_split(self, learn: Learner, error: BaseException, part: int, place: tuple[int, int]) -> str | None:
        """Why this batch, of a size that had fitted, cannot be split now, empty where that is not the question; None:
        it can be.
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
        """Whether DDP may have begun what ranks share in this batch: buffers before the forward pass, gradients once it
        is through.
        """
        if ddp.will_sync_module_buffers():
            return True
        if not self.in_last_part or not ddp.require_backward_grad_sync:
            return False
        through = stage_of(error) != "forward" or learn.pred is not None or learn.training_model is not ddp
        return through or ddp.find_unused_parameters  # which has DDP copy the outputs

    def split_what_had_fitted(self, learn: Learner, part: int) -> int:
        """Half the size from now on: there is less memory than there was."""
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
        """Find the size of the parts that fit; the batch has its gradients then."""
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
        """Forward and backward passes of all parts; the error, where memory runs out."""
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
        """Of a batch of n samples; gradients are reduced in the last one."""
        inputs, target, whole = learn.inputs, learn.target, learn.whole
        count, loss, split = learn.count(inputs, target), 0.0, part < n
        part = -(-n // -(-n // part))  # alike: a last part of one sample would be nothing for batch norm
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
        """Take part in the other ranks' reduction of this batch's gradients, of which this rank's are complete after a
        trial.

        By a pass of two samples whose loss counts for nothing. It fits, as the trial's parts did.
        """
        if not ddp.require_backward_grad_sync:
            return  # nor do they, within a window of Accumulate, say
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
    """What a failed attempt may have changed: buffers, random numbers, and gradients of earlier batches, which wait
    aside.
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
            buffers[name] = buffer.copy_(value)  # of a forward pass that replaces it

    def drop_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def add_gradients(self) -> None:
        for p, earlier in zip(self.parameters, self.gradients, strict=True):
            if earlier is not None:
                p.grad = earlier if p.grad is None else p.grad.add_(earlier)


def ddp_of(learn: Learner) -> DistributedDataParallel | None:
    """What the training batches go through on several ranks, also where another callback has wrapped it."""
    if learn.world_size == 1:
        return None
    return next(
        (module for module in learn.training_model.modules() if isinstance(module, DistributedDataParallel)), None
    )


@contextmanager
def by_itself(learn: Learner, ddp: DistributedDataParallel | None) -> Iterator[None]:
    """No other rank takes part in the passes within: DDP shares nothing in them, but what the others' forward passes
    begin with.
    """
    if ddp is None:
        yield
        return
    with learn.no_sync():
        ddp._pre_forward(torch.empty(0))  # rank 0's buffers, and after the first step the layout of the buckets
        ddp.require_forward_param_sync = False  # once; an attempt that fails would leave it to the next one
        yield


def shapes_in(inputs: Any, target: Any) -> list[torch.Size]:
    """Of every tensor in them, in one function, as it is called for each batch."""
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
    """What the largest part of a batch of n samples takes: whether gradients are there before its backward pass, and
    its shapes.
    """
    largest = -(-n // -(-n // part))
    return [
        (held or largest < n,),
        *((largest, *shape[1:]) if shape and shape[0] == n else tuple(shape) for shape in shapes),
    ]


def covers(large: Shapes, small: Shapes) -> bool:
    """Whether each tensor of `large` is as large as the one of `small`, in every dimension."""
    return len(large) == len(small) and all(
        len(a) == len(b) and all(i >= j for i, j in zip(a, b, strict=True)) for a, b in zip(large, small, strict=True)
    )


def n_samples_here(learn: Learner) -> int:
    sizes = {len(t) for t in tensors_in(learn.inputs) if t.ndim}
    if len(sizes) != 1:
        raise ValueError(
            f"AutoMicrobatch splits inputs along their first dimension, which they must share; got "
            f"{describe(learn.inputs)}."
        )
    return sizes.pop()


def cut(batch: Any, first: int, size: int, n: int) -> Any:
    """The part of a batch of n samples from `first` on; what has no n rows stays whole."""
    return map_tensors(lambda t: t[first : first + size] if t.ndim and len(t) == n else t, batch)
