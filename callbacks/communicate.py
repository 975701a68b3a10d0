"""Other ways than an all-reduce of every gradient for ranks to come to the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from learnkit.callbacks.distributed import Distributed
from learnkit.callbacks.reduce_afterwards import nothing
from learnkit.distributed.algorithms import Algorithm, Communication, put_weights
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.optim.groups import has_modes


class Communicate(Callback):
    """What `learn.to_distributed(algorithm=…)` adds, where it is another one than "allreduce".

    Gradients go through a communication hook of DDP. Algorithms that average weights do so every `period` steps, and at
    an epoch's end; what is evaluated, amid an epoch too, is the mean (see OneModel). What ranks keep for themselves,
    PowerSGD's errors or their own weights and moments between two averages, is in checkpoints, of which each rank takes
    back its own. Of another number of ranks each takes the mean, also one alone, where this does nothing else: the mean
    of the errors is what the mean gradient still lacks.
    """

    order = Distributed.order + 5
    unique = True
    per_rank = True

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.communication: Communication | None = None  # in a fit, where several train
        self.learn: Learner | None = None  # of the last fit, whose state may be put back when it turns out to be over

    def around_fit(self, learn: Learner, run: Run) -> None:
        if self.algorithm.averages and has_modes(learn.opt) and learn.world_size > 1:
            raise ValueError(
                f"algorithm={self.algorithm.name!r} averages the ranks' weights; those of {type(learn.opt).__name__} "
                f"are made from its state, which stays each rank's own, when it changes to evaluation. Take an "
                f"algorithm that reduces "
                'gradients, such as "allreduce", or another optimizer.'
            )
        ddp, reduce, leave = learn.training_model, learn.reduce_gradients, nothing
        self.learn = learn
        if isinstance(ddp, DistributedDataParallel):  # not alone, nor where no parameter is trained
            self.communication = Communication(self.algorithm, ddp, step=learn.step)
            leave = self.communication.follow(learn.opt)
            if self.algorithm.averages:
                learn.reduce_gradients = nothing
        try:
            run()
        finally:
            leave()
            if self.communication is not None:
                self.communication.close()
            self.communication, learn.reduce_gradients = None, reduce

    def state_dict(self) -> dict[str, Any]:
        return {} if self.learn is None or self.communication is None else self.communication.state_dict(self.learn.opt)

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        return mean(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.learn is None or not state:  # {}: of a time without a fit, such as a trial's
            return
        if self.communication is not None:
            self.communication.load_state_dict(state, self.learn.opt)
        elif self.algorithm.averages:
            put_weights(list(self.learn.model.parameters()), state, self.learn.opt)


def mean(states: list[Any]) -> Any:
    """Of equal structures: the mean of each of their tensors of floating point, and whatever else the first one has."""
    first = states[0]
    if isinstance(first, dict):
        return {name: mean([state[name] for state in states]) for name in first}
    if isinstance(first, (list, tuple)):
        return type(first)(mean(list(values)) for values in zip(*states, strict=True))
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return first
    return torch.stack([state.double() for state in states]).mean(0).to(first.dtype)
