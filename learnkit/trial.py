"""Trying something out on a Learner and leaving it bit-identical: what range tests and batch size finders stand on."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learnkit import checkpoint
from learnkit.order import EpochOrder, generator_of, parts_of
from learnkit.resume import put_random_state, random_state

if TYPE_CHECKING:
    from learnkit.learner import Learner


@contextmanager
def unchanged(learn: Learner) -> Iterator[None]:
    """Whatever is trained within the block, and however it ends: afterwards weights, buffers, gradients, the optimizer, random
    states, the order of the loaders, callbacks and every attribute of the Learner are what they were, bit for bit.

    Callbacks whose class says `in_trials = False` (those that decide, write or draw) do not take part. Costs a copy of the
    weights and of the optimizer's state in memory.
    """
    if learn.is_running: raise RuntimeError("a trial was begun while this Learner runs: do it before or after the fit.")
    random = random_state(learn.device)
    attributes = {name: copied(value) for name, value in vars(learn).items()}
    tensors = [(t, t.detach().clone()) for t in (*learn.model.parameters(), *learn.model.buffers())]
    parameters = [(p, p.grad, p.requires_grad) for p in learn.model.parameters()]
    modes = [(module, module.training) for module in learn.model.modules()]
    opt = None if learn.opt is None else copied(learn.opt.state_dict())
    callbacks = [(callback, {name: copied(value) for name, value in vars(callback).items()}) for callback in learn.callbacks]
    orders, generators = loader_states(learn)
    learn.callbacks = [callback for callback in learn.callbacks if callback.in_trials]
    try: yield
    finally:
        vars(learn).clear()
        vars(learn).update(attributes)
        with torch.no_grad():
            for tensor, value in tensors: tensor.copy_(value)
        for p, gradient, trained in parameters: p.grad, p.requires_grad = gradient, trained
        for module, mode in modes: module.training = mode
        if opt is not None: checkpoint.load_optimizer(learn.opt, opt)
        for callback, values in callbacks:
            vars(callback).clear()
            vars(callback).update(values)
        for part, epoch in orders: part.epoch = epoch
        for generator, state in generators: generator.set_state(state)
        put_random_state(random, learn.device)


def loader_states(learn: Learner) -> tuple[list[tuple[EpochOrder, int]], list[tuple[torch.Generator, Tensor]]]:
    """The epochs of our loaders, and the states of generators that the user gave."""
    loaders = [dl for dl in (learn.data.train_dl, learn.data.valid_dl) if dl is not None]
    parts = [part for loader in loaders for part in parts_of(loader)]
    generators = {id(g): g for g in map(generator_of, parts) if g is not None}
    return [(part, part.epoch) for part in parts if isinstance(part, EpochOrder)], [(g, g.get_state()) for g in generators.values()]


def copied(value: Any) -> Any:
    """Containers and tensors anew; everything else is the same object."""
    if isinstance(value, torch.nn.Parameter): return value
    if isinstance(value, Tensor): return value.detach().clone() if not value.requires_grad else value
    if type(value) is dict: return {key: copied(v) for key, v in value.items()}
    if type(value) in (list, tuple, set): return type(value)(copied(v) for v in value)
    return value
