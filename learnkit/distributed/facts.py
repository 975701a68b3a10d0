"""What must be equal on all ranks of a fit: see learnkit.distributed.compare."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch

from learnkit.devices.staging import packed
from learnkit.distributed.share import batch_size_of, n_samples_of
from learnkit.distributed.weights import model_in_words
from learnkit.optim.groups import as_number

if TYPE_CHECKING:
    from learnkit.learner import Learner


def facts(learn: Learner) -> dict[str, Any]:
    """What must be equal before the first step."""
    return {
        "the Python version": platform.python_version(),
        "the model's parameters": model_in_words(learn.model),
        "the optimizer": type(learn.opt).__name__,
        "the number of epochs": learn.n_epochs,
        "the number of steps": learn.n_steps,
        "the batch size": batch_size_of(learn.data.train_dl),
        "the seed": learn.seed,
        "the number of training samples": n_samples_of(learn.data.train_dl),
        "the epochs trained so far": learn.epochs_trained,
        "validates": learn.data.valid_dl is not None,
        "the metrics": ", ".join(name for metric in learn.metrics for name in metric.names),
        "the callbacks": ", ".join(type(cb).__name__ for cb in learn.callbacks),
    }


def settings(learn: Learner) -> str:
    """Every setting of the optimizer's groups."""
    return "; ".join(
        ", ".join(f"{name}={as_number(value)}" for name, value in group.items() if name != "params")
        for group in learn.opt.param_groups
    )


def checksum(learn: Learner) -> int:
    """A number computed from all weights, which must be the same on all ranks; one read from the device."""
    words = [packed(p) for p in learn.model.parameters()]
    sums = torch.stack([w.sum(dtype=torch.int64) + 31 * w[1::2].sum(dtype=torch.int64) for w in words])
    return int((sums * torch.arange(1, len(words) + 1, device=sums.device)).sum())
