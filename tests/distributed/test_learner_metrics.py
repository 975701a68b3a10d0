"""A Learner on many ranks measures and predicts as alone: each sample once, in order, the same numbers on every
rank.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torchmetrics.classification import MulticlassF1Score

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.data.loaders import TensorLoader
from learnkit.distributed import ShardedStream, get_world_size, guard
from learnkit.metrics import Mean


def tensors(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


class Net(nn.Sequential):
    """Called by position or, where batches are mappings, by keyword."""

    def forward(self, x):
        return super().forward(x)  # type: ignore[override]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def keywords(batch):
    return dict(zip(("x", "labels"), default_collate(batch), strict=True))


# --- evaluati ----------------------------------------------------------------
class Spread:
    """Not a mean of anything: the range of the predictions, and the share of the most frequent target."""

    names = ("spread", "most")

    def reset(self):
        self.preds, self.targets = [], []

    def update(self, pred, target):
        self.preds.append(pred), self.targets.append(target)

    def compute(self):
        pred, target = torch.cat(self.preds), torch.cat(self.targets)
        return {"spread": pred.max() - pred.min(), "most": target.bincount().max() / len(target)}


class Means:
    """Says that it keeps means only."""

    keeps_means_only = True

    def __init__(self):
        self.mean = Mean()

    def reset(self):
        self.mean.reset()

    def update(self, pred, target):
        self.mean.add(pred.square().mean(), len(pred))

    def compute(self):
        return self.mean.compute().sqrt()


def measuring() -> Learner:
    metrics = [accuracy, Spread(), Means(), MulticlassF1Score(3, average="macro"), CatMetric()]
    return Learner(DataBunch([tensors(2)]), net(), metrics=metrics).to_distributed()


class CatMetric(torchmetrics.Metric):
    """Of torchmetrics' kind, with a state that is no sum: the median of the highest scores."""

    def __init__(self):
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, pred, target):
        self.rows.append(pred.amax(1))

    def compute(self):
        return torch.cat(list(self.rows)).median() if isinstance(self.rows, list) else self.rows.median()


def evaluated(cases) -> list[Any]:
    learn, found, (x, y) = measuring(), [], tensors(33)
    with guard():  # one for all of them: each evaluation would have its own
        for n, b in cases:
            dl = TensorLoader((x[:n], y[:n]), bs=b) if (n + b) % 2 else DataLoader(TensorDataset(x[:n], y[:n]), b)
            found.append((learn.validate(dl), *learn.get_preds(dl, with_loss=True), learn.get_preds(dl)[0]))
    return found


ALL = [(n, b) for n in range(1, 34) for b in range(1, 7)]


@cache
def evaluated_alone() -> list[Any]:
    return evaluated(ALL)


@pytest.mark.parametrize("world_size", [2, 3])
def test_metrics_and_predictions_of_any_size_are_exact_and_equal_everywhere(ranks, world_size):
    expected, y = evaluated_alone(), tensors(33)[1]
    by_rank = ranks(world_size, evaluated, ALL, timeout=100)
    for (n, b), (values, preds, targets, losses, _), *shares in zip(ALL, expected, *by_rank, strict=True):
        assert torch.equal(targets, y[:n]) and len(preds) == len(losses) == n
        assert values["valid_loss"] == pytest.approx(losses.mean().item(), abs=1e-6)
        for own in shares:
            assert own[0] == shares[0][0]  # bit for bit on every rank
            assert own[0].keys() == values.keys() and own[0] == pytest.approx(values, abs=1e-6), (n, b)
            assert torch.equal(own[2], targets) and torch.equal(own[1], own[4])
            for one, other in ((own[1], preds), (own[3], losses)):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


EVALUATION = {
    "a sampler": lambda x, y: DataLoader(TensorDataset(x, y), 2, sampler=list(range(9, -1, -1))),
    "a batch sampler": lambda x, y: DataLoader(
        TensorDataset(x, y), batch_sampler=[[0, 1, 2], [3], [4, 5, 6, 7], [8, 9]]
    ),
    "a list of batches": lambda x, y: list(zip(x.split([4, 1, 3, 2]), y.split([4, 1, 3, 2]), strict=True)),
    "one batch": lambda x, y: [(x, y)],
    "a shuffled loader": lambda x, y: DataLoader(TensorDataset(x, y), 3, shuffle=True),
    "a loader that drops the last": lambda x, y: DataLoader(TensorDataset(x, y), 3, drop_last=True),
    "a worker": lambda x, y: DataLoader(TensorDataset(x, y), 3, num_workers=1),
    "a stream": lambda x, y: DataLoader(ShardedStream(Rows(x, y), 3, even=False), 3),
    "mappings": lambda x, y: DataLoader(TensorDataset(x, y), 3, collate_fn=keywords),
    "without targets": lambda x, y: DataLoader(x, 3),
}


class Rows(IterableDataset):
    def __init__(self, *columns):
        self.columns = columns

    def __iter__(self):
        return zip(*self.columns, strict=True)


def evaluate_all() -> dict[str, Any]:
    learn = Learner(DataBunch([tensors(2)]), net()).to_distributed()
    return {
        name: (learn.get_preds(dl := loader(*tensors(10))), learn.validate(dl)) for name, loader in EVALUATION.items()
    }


def test_any_loader_is_evaluated_as_alone(ranks):
    alone = evaluate_all()
    for one in ranks(3, evaluate_all):
        for name, ((preds, targets), values) in one.items():
            torch.testing.assert_close(preds, alone[name][0][0], atol=1e-6, rtol=0, msg=name)
            assert (name == "without targets" and targets is None) or torch.equal(targets, alone[name][0][1]), name
            assert values == pytest.approx(alone[name][1], abs=1e-6, nan_ok=True), name


TRAINING = {
    "tensors": lambda x, y, bs: DataBunch.from_tensors((x, y), bs=bs, drop_last=False).train_dl,
    "in order": lambda x, y, bs: DataLoader(TensorDataset(x, y), bs),
    "shuffled": lambda x, y, bs: DataLoader(TensorDataset(x, y), bs, shuffle=True),
    "a sampler": lambda x, y, bs: DataLoader(
        TensorDataset(x, y), bs, sampler=WeightedRandomSampler([1.0, 3.0] * 20, 41)
    ),
    "a batch sampler": lambda x, y, bs: DataLoader(
        TensorDataset(x, y), batch_sampler=BatchSampler(RandomSampler(range(41)), bs, False)
    ),
}


def test_the_training_data_can_be_evaluated_in_a_fit(ranks):
    """Of each kind of loader, although its place is taken by the rank's share meanwhile."""

    class OnTraining(Callback):
        found: float = 0.0

        def after_epoch(self, learn):
            self.found = learn.validate(learn.data.train_dl)["valid_loss"]

    def fn():
        found = {}
        for name, loader in TRAINING.items():
            torch.manual_seed(0)
            learn = Learner(
                DataBunch(loader(*tensors(41), 12 // get_world_size())), net(), lr=0.02, callbacks=(cb := OnTraining())
            )
            learn.to_distributed().fit(1)
            found[name] = cb.found
        return found

    alone = fn()
    for one in ranks(2, fn):
        assert one == pytest.approx(alone, abs=1e-5)
