"""Other ways than an all-reduce of every gradient for ranks to come to the same weights."""
from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from learnkit.callbacks.distributed import Distributed
from learnkit.callbacks.reduce_afterwards import nothing
from learnkit.distributed.algorithms import Algorithm, Communication
from learnkit.hooks import Callback, ControlFlow, Run
from learnkit.learner import Learner


class Communicate(Callback):
    """What `learn.to_distributed(algorithm=…)` adds, where it is another one than "allreduce".

    Gradients go through a communication hook of DDP. Algorithms that average weights do so every `period` steps, and before each
    validation. What ranks keep for themselves, PowerSGD's errors or their own weights between two averages, is in checkpoints, of
    which each rank takes back its own.
    """
    order = Distributed.order + 5
    unique = True
    per_rank = True

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.communication: Communication | None = None     # in a fit
        self.learn: Learner | None = None

    def around_fit(self, learn: Learner, run: Run) -> None:
        ddp, reduce = learn.training_model, learn.reduce_gradients
        if not isinstance(ddp, DistributedDataParallel): return run()      # no parameter is trained
        self.learn, self.communication = learn, Communication(self.algorithm, ddp)
        leave = self.communication.follow(learn.opt)
        if self.algorithm.averages: learn.reduce_gradients = nothing
        try: run()
        finally:
            self.learn, self.communication, learn.reduce_gradients = None, None, reduce
            leave()

    def around_train(self, learn: Learner, run: Run) -> None:
        """All ranks end an epoch with one model, also where they have agreed to end it early."""
        signal: ControlFlow | None = None
        try: run()
        except ControlFlow as raised: signal = raised
        if self.communication is not None: self.communication.average_now()
        if signal is not None: raise signal

    def state_dict(self) -> dict[str, Any]:
        return {} if self.learn is None or self.communication is None else self.communication.state_dict(self.learn.opt)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.learn is not None and self.communication is not None: self.communication.load_state_dict(state, self.learn.opt)
