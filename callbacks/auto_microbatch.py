"""Batches that do not fit into memory, split until they do."""
from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from learnkit.batch import describe, map_tensors, tensors_in
from learnkit.callbacks.compiled import Compiled
from learnkit.callbacks.distributed import Distributed
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.loss import not_zero, weighted
from learnkit.session import is_out_of_memory


class AutoMicrobatch(Callback):
    """Where a training batch does not fit into memory, split it in halves until it does, and go on with parts of that size.

    size    samples of a part, at most, to begin with; None: whole batches

    The gradient is that of the whole batch, each part counting by its samples; `learn.loss` is the batch's, and random numbers are
    drawn anew from where the batch began. Batch norm normalizes each part by itself. On several ranks the first batch of a fit
    decides for all of them, and memory that runs out later is an error. Evaluations are not split.

    >>> learn.fit(5, callbacks=[AutoMicrobatch()])  # doctest: +SKIP
    """
    order = Compiled.order - 10     # everybody else is told of the batch once
    unique = True

    def __init__(self, size: int | None = None) -> None:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"size={size!r}: expected a whole number of samples, 1 or more.")
        self.initial_size = self.size = size    # samples of a part; None: a whole batch
        self.proven = 0                         # samples of the largest part that has fitted in this fit

    def before_fit(self, learn: Learner) -> None:
        self.size, self.proven = self.initial_size, 0
        replicas = next((callback.replicas for callback in learn.running if isinstance(callback, Distributed)), None)
        if replicas is not None and replicas.sync_bn:
            raise ValueError("AutoMicrobatch beside sync_bn=True: a rank whose memory runs out would leave the others waiting in a layer "
                             "of batch norm. Take one of them; batch_size_find() tells what fits.")

    def around_batch(self, learn: Learner, run: Run) -> None:
        if not learn.training: return run()
        n = n_samples(learn)
        part = n if self.size is None else min(self.size, n)
        if part <= self.proven or (learn.world_size > 1 and self.proven):
            if part == n: return run()
            self.passes(learn, n, part, alone=False)
        else: self.probe(learn, n, part)
        learn.stages.step()

    def probe(self, learn: Learner, n: int, part: int) -> None:
        """Find the size of the parts that fit; the batch has its gradients then."""
        with_others = learn.world_size > 1      # none of them may wait in a reduction for one that failed
        start = State(learn)
        while True:
            error = self.attempt(learn, n, part, alone=with_others)
            if not learn.ranks.agree(error is not None): break
            part = max(1, part // 2) if part > 1 else 0
            start.put_back(learn)
            if not part:
                raise error or RuntimeError("another rank's sample does not fit into its memory.")
            if with_others: part = min(learn.ranks.gather(part))
        if part < n: self.size = part
        self.proven = part
        start.add_gradients(learn)
        if with_others: learn.reduce_gradients()

    def attempt(self, learn: Learner, n: int, part: int, *, alone: bool) -> BaseException | None:
        """Forward and backward passes of all parts; the error, where memory runs out."""
        try: self.passes(learn, n, part, alone=alone)
        except BaseException as error:
            if not is_out_of_memory(error): raise
            learn.failure = learn.pred = learn.loss = None
            return error.with_traceback(None)
        return None

    def passes(self, learn: Learner, n: int, part: int, *, alone: bool) -> None:
        """Of a batch of n samples. `alone`: no gradient is reduced, not even the last part's."""
        inputs, target, whole = learn.inputs, learn.target, learn.whole
        count, loss = learn.count(inputs, target), 0.
        part = -(-n // -(-n // part))           # alike: a last part of one sample would be nothing for batch norm
        if whole is None: learn.whole = count
        try:
            for first in range(0, n, part):
                learn.inputs, learn.target = cut((inputs, target), first, part, n)
                learn.pred = learn.loss = None
                with nullcontext() if first + part >= n and not alone else learn.no_sync():
                    if not learn.stages.forward() or learn.pred is None: continue
                    loss = loss + weighted(learn.loss, learn.count(learn.inputs, learn.target))
                    learn.stages.backward()
        finally: learn.inputs, learn.target, learn.whole = inputs, target, whole
        if isinstance(loss, Tensor): learn.loss = loss / not_zero(count)

    def state_dict(self) -> dict[str, Any]: return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None: self.size = state["size"]


class State:
    """What a failed attempt may have changed: buffers, random numbers, and gradients of earlier batches, which wait aside."""

    def __init__(self, learn: Learner) -> None:
        from learnkit.resume import random_state
        self.random, self.parameters = random_state(learn.device), list(learn.model.parameters())
        self.buffers = [(b, b.clone()) for b in learn.model.buffers()]
        self.gradients = [p.grad for p in self.parameters]
        for p in self.parameters: p.grad = None

    @torch.no_grad()
    def put_back(self, learn: Learner) -> None:
        from learnkit.resume import put_random_state
        put_random_state(self.random, learn.device)
        for buffer, value in self.buffers: buffer.copy_(value)
        for p in self.parameters: p.grad = None
        if learn.device.type != "cpu": torch.accelerator.memory.empty_cache()

    @torch.no_grad()
    def add_gradients(self, learn: Learner) -> None:
        for p, earlier in zip(self.parameters, self.gradients, strict=True):
            if earlier is not None: p.grad = earlier if p.grad is None else p.grad.add_(earlier)


def n_samples(learn: Learner) -> int:
    sizes = {len(t) for t in tensors_in(learn.inputs) if t.ndim}
    if len(sizes) != 1:
        raise ValueError(f"AutoMicrobatch splits inputs along their first dimension, which they must share; got {describe(learn.inputs)}.")
    return sizes.pop()


def cut(batch: Any, first: int, size: int, n: int) -> Any:
    """The part of a batch of n samples from `first` on; what has no n rows stays whole."""
    return map_tensors(lambda t: t[first:first + size] if t.ndim and len(t) == n else t, batch)
