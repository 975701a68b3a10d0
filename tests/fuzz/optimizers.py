"""Optimizers: all of torch's, those of other packages, several together, built and not."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from learnkit import Callback, Learner, Together
from learnkit.callbacks import Recorder
from tests.fuzz.part import Part, part


class ClosureStep(Callback):
    """docs/callbacks.md, example 6: steps for optimizers whose `step` takes a closure."""

    order = Recorder.order + 10

    def around_step(self, learn: Learner, run: object) -> None:
        def loss() -> torch.Tensor:
            learn.zero_grad()
            learn.stages.forward()
            learn.stages.backward()
            return learn.loss

        learn.opt.step(loss)  # type: ignore[arg-type]
        learn.zero_grad()
        learn.step += 1


def muon_and_adam(model: nn.Module) -> Optimizer:
    """Matrices by Muon, all else by AdamW."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return Together(torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3))


# built       an object, which needs the model
# closure     its step takes a closure: with ClosureStep
# optimizer in whole  not with weights in parts: torch has no such Adafactor
# rounds      to bfloat16 within its step (Muon), or to a sign (Rprop): sums in another order show in the third digit
# one process docs/callbacks.md says so
# float32     it does not take float64
OPTIMIZERS: dict[str, Part] = {
    "AdamW": part("torch.optim.AdamW", weight=4),
    "AdamW, amsgrad": part("partial(torch.optim.AdamW, amsgrad=True)"),
    "AdamW, foreach": part("partial(torch.optim.AdamW, foreach=True)"),
    "AdamW, capturable rate": part("partial(torch.optim.AdamW, lr=torch.tensor(1e-2, dtype=torch.float64))"),
    "Adam": part("torch.optim.Adam", weight=2),
    "SGD": part("torch.optim.SGD", weight=3),
    "SGD, momentum": part("partial(torch.optim.SGD, momentum=0.9)", weight=3),
    "SGD, nesterov": part("partial(torch.optim.SGD, momentum=0.9, nesterov=True)"),
    "Adadelta": part("torch.optim.Adadelta"),
    "Adafactor": part("torch.optim.Adafactor", "optimizer in whole"),
    "Adagrad": part("torch.optim.Adagrad"),
    "Adamax": part("torch.optim.Adamax"),
    "ASGD": part("torch.optim.ASGD"),
    "NAdam": part("torch.optim.NAdam"),
    "RAdam": part("torch.optim.RAdam"),
    "RMSprop": part("torch.optim.RMSprop"),
    "RMSprop, momentum": part("partial(torch.optim.RMSprop, momentum=0.9)"),
    "Rprop": part("torch.optim.Rprop", "rounds"),
    "LBFGS": part("partial(torch.optim.LBFGS, max_iter=3)", "closure", "one process", weight=0.5),
    "SGD, built": part("torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)", "built"),
    "AdamW, built": part("torch.optim.AdamW([{'params': [p]} for p in model.parameters()], lr=1e-2)", "built"),
    "Muon and AdamW": part("muon_and_adam(model)", "built", "matrices", "rounds"),
    "Together": part(
        "Together(torch.optim.SGD(list(model.parameters())[:1], lr=0.05), "
        "torch.optim.AdamW(list(model.parameters())[1:], lr=1e-2))",
        "built",
    ),
    "AdamWScheduleFree": part("schedulefree.AdamWScheduleFree", "schedule-free"),
    "SGDScheduleFree": part("schedulefree.SGDScheduleFree", "schedule-free"),
}

NOT_DRAWN = {
    "SparseAdam": "takes sparse gradients alone, which no drawn model has: tests/test_optim.py",
    "Muon": "takes matrices alone: drawn within Together",
    "Optimizer": "the base class",
}
