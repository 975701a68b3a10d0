"""SaveBest: the files are those of the best epochs, in their order."""

from pathlib import Path

import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Checkpoint, SaveBest


class Scripted(Callback):
    """Says what an epoch measured, and marks the weights with the epoch's number."""

    order = -50

    def __init__(self, values: list[float]) -> None:
        self.script = values

    def after_validate(self, learn: Learner) -> None:
        learn.values["valid_loss"] = self.script[learn.epoch]
        with torch.no_grad():
            learn.model.bias.fill_(learn.epoch)


def fit(values: list[float], n: int | None = None, *more: Callback, resume: bool = False, **options) -> Learner:
    data = DataBunch.from_tensors((torch.randn(8, 2), torch.randn(8, 2)), (torch.randn(4, 2), torch.randn(4, 2)), bs=4)
    learn = Learner(data, nn.Linear(2, 2), lr=0.0, callbacks=[Scripted(values), SaveBest(**options), *more])
    return learn.fit(n or len(values), resume=resume)


def kept() -> dict[str, int]:
    """{file: the epoch that it is of}"""
    return {p.name: int(torch.load(p, weights_only=True)["model"]["bias"][0]) for p in sorted(Path("models").iterdir())}


@pytest.mark.parametrize(
    "values, options, expected",
    [
        ([3, 1, 2], {}, {"best.pt": 1}),
        ([3, 1, 1], {}, {"best.pt": 1}),
        ([-1, -3, -2], {}, {"best.pt": 1}),
        ([3, 1, 2, 4], {"keep": 3}, {"best.pt": 1, "best-2.pt": 2, "best-3.pt": 0}),
        ([3, 1, 2, 4], {"keep": 2, "mode": "max"}, {"best.pt": 3, "best-2.pt": 0}),
        ([float("nan"), 5, float("nan")], {"keep": 2}, {"best.pt": 1}),
        ([2, 1], {"keep": 9, "name": "top"}, {"top.pt": 1, "top-2.pt": 0}),
    ],
)
def test_the_best_epochs_are_kept(values, options, expected):
    fit(values, **options)
    assert kept() == expected


def test_the_best_can_be_loaded():
    learn = fit([3, 1, 2])
    assert learn.model.bias[0] == 2
    assert learn.load("best").model.bias[0] == 1


def test_a_resumed_fit_knows_what_was_best():
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_epoch(self, learn: Learner) -> None:
            if learn.epoch == 2:
                raise ConnectionAbortedError

    values = [3.0, 1.0, 4.0, 2.0]
    with pytest.raises(ConnectionAbortedError):
        fit(values, 4, Checkpoint("kept"), Die(), keep=2)
    fit(values, 4, Checkpoint("kept"), resume=True, keep=2)
    assert kept() == {"best.pt": 1, "best-2.pt": 3}


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match="no value 'accurracy' to monitor"):
        fit([1], monitor="accurracy")
    with pytest.raises(ValueError, match="expected 1 or more"):
        SaveBest(keep=0)
