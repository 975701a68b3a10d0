"""Other ways than an all-reduce of every gradient to keep the ranks' weights the same."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from learnkit.callbacks.distributed import Distributed
from learnkit.checkpoint.regroup import mean_state
from learnkit.distributed.algorithms import Algorithm, Communication, put_weights
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.optim.groups import has_modes


class Communicate(Callback):
    """Reduce gradients or average weights by another algorithm than "allreduce"; `to_distributed(algorithm=…)` adds it.

    Gradients go through a communication hook of DDP. Algorithms that average weights do so every `period` steps and at
    the end of an epoch; evaluations, also during an epoch, use the mean (see OneModel). State that each rank has for
    itself (PowerSGD's errors, or the rank's weights and moments between two averages) is saved in checkpoints, and each
    rank loads its own. When a fit is resumed on another number of ranks, each rank loads the mean, also a single rank,
    on which this callback does nothing else: the mean of the errors is what the mean gradient still lacks.

    Args:
        algorithm: an `Algorithm` of learnkit.distributed.algorithms, which `to_distributed` makes from a name.

    Raises:
        ValueError: at the start of the fit, when the algorithm averages weights and the optimizer makes its weights for
            evaluation from its own state.
    """

    order = Distributed.order + 5
    unique = True
    per_rank = True

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.communication: Communication | None = None  # during a fit on several ranks
        self.learn: Learner | None = None  # of the last fit: its state may be loaded after the fit, if it was finished

    def around_fit(self, learn: Learner, run: Run) -> None:
        if self.algorithm.averages and has_modes(learn.opt) and learn.world_size > 1:
            raise ValueError(
                f"algorithm={self.algorithm.name!r} averages the ranks' weights, but {type(learn.opt).__name__} makes "
                f"its weights for evaluation from its state, which is not averaged. Use an algorithm that reduces "
                f'gradients, such as "allreduce", or another optimizer.'
            )
        ddp, reduce, leave = learn.training_model, learn.reduce_gradients, lambda: None
        self.learn = learn
        if isinstance(ddp, DistributedDataParallel):  # not on a single rank, nor where no parameter is trained
            self.communication = Communication(self.algorithm, ddp, step=learn.step)
            leave = self.communication.follow(learn.opt)
            if self.algorithm.averages:
                learn.reduce_gradients = lambda: None
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
        return mean_state(states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.learn is None or not state:  # {}: of a time without a fit, such as a trial's
            return
        if self.communication is not None:
            self.communication.load_state_dict(state, self.learn.opt)
        elif self.algorithm.averages:
            put_weights(list(self.learn.model.parameters()), state, self.learn.opt)
