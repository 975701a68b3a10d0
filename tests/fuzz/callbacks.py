"""Callbacks of the library and of its pages, each in some forms."""

from __future__ import annotations

from typing import Any

import torch

from learnkit import Callback, Learner
from learnkit.callbacks import Recorder
from tests.fuzz.part import Part, part


class GradientNoise(Callback):
    """docs/callbacks.md, example 3, with the same noise on all ranks."""

    order = Recorder.order - 120

    def before_step(self, learn: Learner) -> None:
        generator = torch.Generator().manual_seed(learn.step)
        for p in learn.model.parameters():
            if p.grad is not None:
                p.grad.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.01)


class MaxNorm(Callback):
    """docs/callbacks.md, example 4."""

    @torch.no_grad()
    def after_step(self, learn: Learner) -> None:
        for p in learn.model.parameters():
            if p.ndim > 1:
                p.renorm_(2, 0, 0.5)


class AverageWeights(Callback):
    """README.md, "Writing a callback"."""

    def __init__(self, decay: float = 0.7) -> None:
        self.decay = decay
        self.average: list[torch.Tensor] = []

    def before_fit(self, learn: Learner) -> None:
        self.average = [p.detach().clone() for p in learn.model.parameters()]

    def after_step(self, learn: Learner) -> None:
        for p, average in zip(learn.model.parameters(), self.average, strict=True):
            average.lerp_(p.detach(), 1 - self.decay)

    def around_validate(self, learn: Learner, run: Any) -> None:
        self.swap(learn)
        try:
            run()
        finally:
            self.swap(learn)

    def swap(self, learn: Learner) -> None:
        for p, average in zip(learn.model.parameters(), self.average):  # noqa: B905  # as it is written there
            p.data, average.data = average.data, p.data

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, value in zip(self.average, state["average"], strict=True):
            average.copy_(value)


class SecondOptimizer(Callback):
    """Learns a number of its own, by an optimizer of its own, and scales the loss with it."""

    def __init__(self) -> None:
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.opt = torch.optim.Adam([self.scale], lr=0.01)

    def after_forward(self, learn: Learner) -> None:
        if learn.training:
            learn.loss = learn.loss * float(self.scale)

    def after_step(self, learn: Learner) -> None:
        self.scale.grad = torch.full_like(self.scale, 0.1 * (1 + learn.step))
        self.opt.step()

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale.detach(), "opt": self.opt.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.data.copy_(state["scale"])
        self.opt.load_state_dict(state["opt"])


class Smooth(Callback):
    """A user's own, with a state, which is another one on each rank."""

    per_rank = True

    def __init__(self) -> None:
        self.mean: Any = 0.0

    def before_fit(self, learn: Learner) -> None:
        self.mean = 0.0

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.loss is not None:
            self.mean = 0.9 * self.mean + 0.1 * learn.loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


# order         what it does depends on how a batch lies on ranks, or what it keeps is of a rank
# gradients     it takes part in the step: a loop by hand has no such thing
# monitors      needs validation or train_loss
# no schedule   not with a schedule of the rate
# groups        needs a splitter
# pictures      needs pictures
# file          writes a log, which is compared
# plain weights   not with weights that are in parts
# stops         it ends a fit
CALLBACKS: dict[str, tuple[Part, ...]] = {
    "Accumulate": (
        part("Accumulate(2)", "gradients"),
        part("Accumulate(3)", "gradients"),
        part("Accumulate(2, count=lambda inputs, target: target.sum().double() + 1.0)", "gradients", "counts", "order"),
    ),
    "ActivationStats": (part("ActivationStats()", "order"), part("ActivationStats(every=2)", "order")),
    "AutoMicrobatch": (part("AutoMicrobatch(2)", "gradients"), part("AutoMicrobatch()", "gradients")),
    "BnFreeze": (part("BnFreeze()"), part("BnFreeze(all=True)", "gradients")),
    "CSVLogger": (part("CSVLogger('log.csv')", "file"), part("CSVLogger('log.csv', every_n_steps=2)", "file")),
    "ClipGradients": (
        part("ClipGradients(max_norm=0.1)", "gradients"),
        part("ClipGradients(value=0.01)", "gradients"),
        part("ClipGradients(adaptive=0.01)", "gradients"),
        part("ClipGradients(max_norm=0.1, norm_type=float('inf'))", "gradients"),
        part("ClipGradients(max_norm=0.1, norm_type=1.0)", "gradients"),
    ),
    "CutMix": (part("CutMix()", "pictures", "order", "gradients"),),
    "EMA": (part("EMA(decay=0.8)"), part("EMA(decay=0.8, warmup=True)"), part("EMA(decay=0.8, saves=True)", "saves")),
    "EarlyStopping": (
        part("EarlyStopping('train_loss', patience=1, min_delta=0.05)", "stops"),
        part("EarlyStopping('valid_loss', patience=1)", "monitors", "stops"),
    ),
    "GradientStats": (part("GradientStats()"), part("GradientStats(every=3)")),
    "GradualUnfreezing": (part("GradualUnfreezing()", "groups", "gradients"),),
    "JSONLogger": (part("JSONLogger('log.jsonl')", "file"), part("JSONLogger('log.jsonl', every_n_steps=3)", "file")),
    "LabelSmoothing": (part("LabelSmoothing(0.1)", "gradients"),),
    "Lookahead": (part("Lookahead(k=2)", "gradients"), part("Lookahead(k=3, alpha=0.3)", "gradients")),
    "MixUp": (part("MixUp()", "order", "gradients"),),
    "ParamScheduler": (part("ParamScheduler({'lr': linear(1e-2, 1e-3)})", "own schedule", "gradients"),),
    "Profile": (part("Profile()", "times"),),
    "ReduceLROnPlateau": (
        part("ReduceLROnPlateau('train_loss', patience=1, min_delta=0.05)", "no schedule", "gradients"),
        part("ReduceLROnPlateau('valid_loss', patience=1, factor=0.5)", "monitors", "no schedule", "gradients"),
    ),
    "SAM": (part("SAM(0.05)", "gradients"),),
    "SWA": (
        part("SWA(start=0.3)"),
        part("SWA(start=0.0, update_bn=True)"),
        part("SWA(start=0.5, saves=True)", "saves"),
    ),
    "SaveBest": (part("SaveBest('train_loss')"), part("SaveBest('valid_loss', keep=2)", "monitors")),
    "StopAfter": (part("StopAfter(steps=4)", "stops"), part("StopAfter(seconds=1000.0)")),
    "TensorBoardLogger": (part("TensorBoardLogger('board')"),),
    "TerminateOnNaN": (part("TerminateOnNaN()"),),
    "Timer": (part("Timer()", "times"),),
    "GradientNoise": (part("GradientNoise()", "gradients", "plain weights"),),
    "MaxNorm": (part("MaxNorm()", "gradients", "plain weights"),),
    "AverageWeights": (part("AverageWeights()", "plain weights"),),
    "SecondOptimizer": (part("SecondOptimizer()", "gradients"),),
    "Smooth": (part("Smooth()", "order"),),
}

# Of learnkit.callbacks, what no table entry stands for, and why.
NOT_DRAWN = {
    "ChannelsLast": "drawn as a precision and layout: learn.to_channels_last()",
    "Checkpoint": "in every draw that resumes, with options of its own",
    "Communicate": "what to_distributed(algorithm=…) adds: drawn as a spread",
    "Compiled": "what learn.compile() adds: drawn as such",
    "Distributed": "what to_distributed() adds: drawn as a spread",
    "FullyShard": "what to_fsdp() adds: drawn as a spread",
    "MLflowLogger": "its client takes seconds to start; tests/callbacks/test_loggers.py has it, and the Journal that "
    "it shares with the others is drawn",
    "MixedPrecision": "what to_bf16() and to_fp16() add: drawn as a precision",
    "OptimizerModes": "what a fit with a schedule-free optimizer adds: drawn as an optimizer",
    "Progress": "every Learner has one",
    "Recorder": "every Learner has one",
    "ReduceAfterwards": "what delay_allreduce=True adds: drawn as a spread",
    "WandbLogger": "needs wandb and its service; tests/callbacks/test_loggers.py has it, and the Journal that it "
    "shares with the others is drawn",
}
