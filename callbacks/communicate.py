"""Other ways than an all-reduce of every gradient for ranks to come to the same weights."""
from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from learnkit.callbacks.distributed import Distributed
from learnkit.callbacks.reduce_afterwards import nothing
from learnkit.checkpoint import load_optimizer
from learnkit.distributed.algorithms import Algorithm, PowerSGD, average_weights, averager_of, hook_of, state_of
from learnkit.hooks import Callback, ControlFlow, Run
from learnkit.learner import Learner


class Communicate(Callback):
    """What `learn.to_distributed(algorithm=…)` adds, where it is another one than "allreduce".

    Gradients go through a communication hook of DDP. Algorithms that average weights do so every `period` steps, and before each
    validation. What ranks keep for themselves, PowerSGD's errors or their own weights and moments between two averages, is in
    checkpoints, of which each rank takes back its own. Of another number of ranks each takes the mean, also one alone, where this
    does nothing else: the mean of the errors is what the mean gradient still lacks.
    """
    order = Distributed.order + 5
    unique = True
    per_rank = True

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.state: Any = None          # the hook's, in a fit
        self.averager: Any = None
        self.learn: Learner | None = None

    def around_fit(self, learn: Learner, run: Run) -> None:
        self.learn = learn
        try: self.communicate(learn, run)
        finally: self.learn, self.state, self.averager = None, None, None

    def communicate(self, learn: Learner, run: Run) -> None:
        ddp, reduce = learn.training_model, learn.reduce_gradients
        if not isinstance(ddp, DistributedDataParallel): return run()      # alone, or no parameter is trained
        self.state = state_of(self.algorithm)
        self.count_from(learn.step)
        hook = hook_of(self.algorithm, self.state)
        if hook is not None: ddp.register_comm_hook(self.state, hook)
        with ExitStack() as undo:
            if self.algorithm.averages:
                self.averager, learn.reduce_gradients = averager_of(self.algorithm), nothing
                self.averager.step = learn.step
                # Not after_step: torch averages what has a gradient, and these are gone by then.
                undo.callback(learn.opt.register_step_post_hook(self.average).remove)
            try: run()
            finally: learn.reduce_gradients = reduce

    def count_from(self, step: int) -> None:
        """Steps that were done before, as by one rank alone, count as its warm-up."""
        if isinstance(self.state, PowerSGD): self.state.state.iter = step
        elif self.algorithm.averages: self.state.iter = step

    def average(self, opt: Optimizer, args: Any, kwargs: Any) -> None:
        self.averager.average_parameters([p for group in opt.param_groups for p in group["params"]])

    def around_train(self, learn: Learner, run: Run) -> None:
        """All ranks end an epoch with one model, also where they have agreed to end it early."""
        signal: ControlFlow | None = None
        try: run()
        except ControlFlow as raised: signal = raised
        if self.averager is not None: average_weights(learn.model.parameters())
        if signal is not None: raise signal

    def state_dict(self) -> dict[str, Any]:
        if self.learn is None: return {}
        parameters = list(self.learn.model.parameters())
        if isinstance(self.state, PowerSGD): return {"powersgd": self.state.state_dict(parameters)}
        if self.averager is None: return {}
        return {"iter": self.state.iter, "step": self.averager.step, "weights": [p.detach() for p in parameters],
                "optimizer": self.learn.opt.state_dict()}

    def regroup(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]: return mean(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.learn is None: return
        parameters = list(self.learn.model.parameters())
        if isinstance(self.state, PowerSGD): self.state.load_state_dict(state["powersgd"], parameters)
        elif self.algorithm.averages:
            if self.averager is not None: self.state.iter, self.averager.step = state["iter"], state["step"]
            for p, value in zip(parameters, state["weights"], strict=True): p.data.copy_(value)
            load_optimizer(self.learn.opt, state["optimizer"])


def mean(states: list[Any]) -> Any:
    """Of equal structures: the mean of each of their tensors of floating point, and whatever else the first one has."""
    first = states[0]
    if isinstance(first, dict): return {name: mean([state[name] for state in states]) for name in first}
    if isinstance(first, (list, tuple)): return type(first)(mean(list(values)) for values in zip(*states, strict=True))
    if not isinstance(first, Tensor) or not first.is_floating_point(): return first
    return torch.stack([state.double() for state in states]).mean(0).to(first.dtype)
