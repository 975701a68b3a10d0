"""Try something on a Learner and leave it bit-identical: the basis of range tests and batch-size search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from learnkit.checkpoint.resume import put_random_state, random_state
from learnkit.data.generators import unmoved_loaders
from learnkit.devices.nested import tensors_in
from learnkit.hooks import Callback
from learnkit.optim.state import load_optimizer

if TYPE_CHECKING:
    from learnkit.learner import Learner


@contextmanager
def unchanged(learn: Learner) -> Iterator[None]:
    """Restore the Learner bit for bit after the block, whatever is trained in it and however it ends.

    This covers weights, buffers, gradients, the optimizer, random states, the order of the loaders, callbacks and every
    attribute of the Learner. Callbacks whose class sets `in_trials = False` (those that decide, write or draw) do not
    take part. For the others, these are restored: attributes, the content of their `state_dict`, and the state of
    optimizers, modules and other objects with a `state_dict` among their attributes. This costs a copy of all these in
    memory, including the weights and the optimizer's state.
    """
    if learn.is_running:
        raise RuntimeError("a trial was started while this Learner runs: start it before or after the fit.")
    random = random_state(learn.device)
    attributes = {name: copied_state(value) for name, value in vars(learn).items()}
    callbacks = [
        (callback, {name: copied_state(value) for name, value in vars(callback).items()})
        for callback in learn.callbacks
    ]
    taking_part = [callback for callback in learn.callbacks if callback.in_trials]
    held = [list(vars(callback).values()) for callback in taking_part]
    objects = {id(thing): thing for thing in stateful_in(held)}
    wholes = [whole for whole in (learn.model, learn.loss_func, *objects.values()) if isinstance(whole, nn.Module)]
    modules = {id(module): module for whole in wholes for module in whole.modules()}
    own = {
        id(p): p
        for p in (
            *(p for module in modules.values() for p in module.parameters(recurse=False)),
            *(t for t in tensors_in(held) if t.requires_grad and t.is_leaf),
        )
    }
    buffers = {id(t): t for module in modules.values() for t in module.buffers(recurse=False)}
    tensors = [(t, t.detach().clone()) for t in (*own.values(), *buffers.values())]
    parameters = [(p, p.grad, p.requires_grad) for p in own.values()]
    modes = [(module, module.training) for module in modules.values()]
    opts = [
        (opt, cloned(opt.state_dict()))
        for opt in {id(opt): opt for opt in (learn.opt, *objects.values())}.values()
        if isinstance(opt, Optimizer)
    ]
    others = [
        (thing, cloned(thing.state_dict()))
        for thing in objects.values()
        if not isinstance(thing, (nn.Module, Optimizer))
    ]
    kept = [(callback, state) for callback in taking_part if (state := callback_state(callback)) is not None]
    loaders = [dl for dl in (learn.data.train_dl, learn.data.valid_dl) if dl is not None]
    learn.callbacks = taking_part
    try:
        with unmoved_loaders(*loaders):
            yield
    finally:
        vars(learn).clear()
        vars(learn).update(attributes)
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
        for p, gradient, trained in parameters:
            p.grad, p.requires_grad = gradient, trained
        for module, mode in modes:
            module.training = mode
        for opt, state in opts:
            load_optimizer(opt, state)
        for callback, values in callbacks:
            vars(callback).clear()
            vars(callback).update(values)
        for thing, state in others:
            thing.load_state_dict(state)
        for callback, state in kept:
            callback.load_state_dict(state)
        for callback, values in callbacks:
            vars(callback).update({name: value for name, value in values.items() if is_copy(value)})
        put_random_state(random, learn.device)


def callback_state(callback: Callback) -> dict[str, Any] | None:
    """Return a copy of a callback's `state_dict()`, or None.

    It is None if the callback does not override the method, or if it fails because the first fit creates what it needs;
    before that, the attributes are the whole state.
    """
    if type(callback).state_dict is Callback.state_dict:
        return None
    try:
        return cloned(callback.state_dict())
    except Exception:
        return None


def stateful_in(value: Any) -> list[Any]:
    """Return the objects in a nested structure that save and load their state: optimizers, modules, schedulers."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return [thing for part in value for thing in stateful_in(part)]
    is_one = all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))
    return [value] if is_one and not isinstance(value, (type, Callback)) else []


def cloned(value: Any) -> Any:
    """Return a state whose tensors are copies."""
    if isinstance(value, dict):
        return {key: cloned(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(cloned(v) for v in value)
    return value.detach().clone() if isinstance(value, Tensor) else value


def is_copy(value: Any) -> bool:
    """Return whether `copied_state` made a copy of all of it, or it cannot change."""
    if type(value) is dict:
        value = list(value.values())
    if type(value) in (list, tuple, set):
        return all(is_copy(v) for v in value)
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def copied_state(value: Any) -> Any:
    """Return new containers and tensors; everything else is the same object."""
    if isinstance(value, torch.nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone() if not value.requires_grad else value
    if type(value) is dict:
        return {key: copied_state(v) for key, v in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(copied_state(v) for v in value)
    return value
