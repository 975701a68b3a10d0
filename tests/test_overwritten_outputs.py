"""What is kept of a model's output is a copy: a captured CUDA graph writes its next output over its last one, as this
model does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnkit import DataBunch, Learner, accuracy
from learnkit.callbacks import SAM, Accumulate, ActivationStats, ClipGradients, CSVLogger
from learnkit.devices.ranks import Alone
from learnkit.loop.evaluate import Measure
from learnkit.metrics import as_metrics

N_CLASSES = 3


class Overwrite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, memory: Tensor) -> Tensor:
        return memory.copy_(x).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Static(nn.Module):
    """Returns the same memory for every batch of one shape. `overwrites=False`: the same numbers, in memory of their
    own.
    """

    def __init__(self, *, overwrites: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, N_CLASSES)
        self.overwrites = overwrites
        self.memory: dict[Any, Tensor] = {}

    def put(self, x: Tensor) -> Tensor:
        if not self.overwrites:
            return x
        return Overwrite.apply(x, self.memory.setdefault(x.shape, torch.empty_like(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Any:
        return self.put(self.head(self.body(x).relu()))


class Pair(Static):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return {"scores": scores, "parts": (scores[:, :1], [scores[:, 1:]])}


class WithLoss(Static):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)
        assert labels is not None
        return SimpleNamespace(logits=logits, loss=self.put(F.cross_entropy(logits, labels)))


class Kept:
    """A metric that keeps what it sees."""

    def reset(self) -> None:
        self.seen: list[Any] = []

    def update(self, pred: Any, target: Any) -> None:
        self.seen.append((pred, target))

    def compute(self) -> float:
        return sum(float((pred.argmax(1) == target).float().sum()) for pred, target in self.seen)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 4, generator=generator), torch.randint(N_CLASSES, (8,), generator=generator)) for _ in range(5)
    ]


def learner(model: nn.Module, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(
        DataBunch(batches(), batches()), model, opt_func=torch.optim.SGD, lr=0.5, seed=0, device="cpu", **options
    )


def both(kind: type[Static], work: Callable[[Learner], Any], **options: Callable[[], Any]) -> tuple[Any, Any]:
    """What `work` finds with the model that overwrites its outputs, and with the one that does not."""
    found = []
    for overwrites in (True, False):
        learn = learner(kind(overwrites=overwrites), **{name: make() for name, make in options.items()})
        with learn.no_logging():
            found.append(work(learn))
    return found[0], found[1]


def test_the_model_of_these_tests_overwrites():
    model = Static(overwrites=True)
    first, second = model(batches()[0][0]), model(batches()[1][0])
    assert torch.equal(first, second) and first.data_ptr() == second.data_ptr()


def test_get_preds():
    ours, plain = both(Static, lambda learn: learn.get_preds(with_loss=True), loss_func=lambda: F.cross_entropy)
    assert all(map(torch.equal, ours, plain)) and len(ours[0].unique()) > 100


def test_get_preds_of_nested_outputs():
    ours, plain = both(
        Pair,
        lambda learn: learn.get_preds()[0],
        loss_func=lambda: lambda pred, target: F.cross_entropy(pred["scores"], target),
    )
    assert torch.equal(ours["scores"], plain["scores"]) and torch.equal(ours["parts"][0], plain["parts"][0])


def test_interpret_and_predict():
    ours, plain = both(Static, lambda learn: (learn.interpret().confusion_matrix(), learn.predict(batches()[0][0])))
    assert all(map(torch.equal, ours, plain)) and ours[0].sum() == 40


def test_a_prediction_stays_as_it_was():
    learn = learner(Static(overwrites=True))
    first, before = learn.predict(batches()[0][0]), Static(overwrites=False)(batches()[0][0])
    learn.predict(batches()[1][0])
    assert torch.equal(first, before)


def torchmetric(name: str) -> Any:
    return getattr(pytest.importorskip("torchmetrics"), name)("multiclass", num_classes=N_CLASSES)


@pytest.mark.parametrize(
    "metric", [Kept, lambda: accuracy, lambda: torchmetric("AUROC"), lambda: torchmetric("Accuracy")]
)
def test_metrics(metric: Callable[[], Any]):
    ours, plain = both(Static, lambda learn: learn.validate(), metrics=metric)
    assert ours == plain


def test_metrics_that_see_the_batches_of_all_ranks_at_the_end():
    def measured(model: nn.Module) -> dict[str, float]:
        measure = Measure(as_metrics(Kept()), world_size=2)
        with torch.no_grad():
            for x, y in batches():
                measure.update((x,), y, model(x), torch.zeros(()))
        return measure.results(Alone())

    assert measured(Static(overwrites=True)) == measured(Static(overwrites=False))


def test_recorded_losses_that_the_model_computes_itself():
    def fit(learn: Learner) -> tuple[list[float], list[list[float]]]:
        data = [{"x": x, "labels": y} for x, y in batches()]
        learn.data = DataBunch(data, data)
        learn.fit(2)
        return learn.recorder.losses, learn.recorder.values

    ours, plain = both(WithLoss, fit)
    assert ours == plain and len(set(ours[0])) == 10


@pytest.mark.parametrize(
    "make", [lambda: SAM(0.1), lambda: Accumulate(2), ClipGradients], ids=["SAM", "Accumulate", "ClipGradients"]
)
def test_callbacks_that_look_at_a_loss_after_another_pass(make: Callable[[], Any]):
    def fit(learn: Learner) -> list[float]:
        data = [{"x": x, "labels": y} for x, y in batches()]
        learn.data = DataBunch(data)
        learn.fit(2)
        return learn.recorder.losses

    ours, plain = both(WithLoss, fit, callbacks=lambda: [make()])
    assert ours == plain and len(set(ours)) == len(ours)


def test_activation_statistics():
    def fit(learn: Learner) -> Tensor:
        learn.fit(1)
        return learn.callbacks[-1].recorded  # type: ignore[attr-defined]

    ours, plain = both(Static, fit, callbacks=lambda: [ActivationStats(select=lambda name, module: name == "head")])
    assert torch.equal(ours, plain) and len(ours.unique(dim=0)) == 5


def test_logs_of_steps():
    def fit(learn: Learner) -> str:
        data = [{"x": x, "labels": y} for x, y in batches()]
        learn.data = DataBunch(data)
        learn.fit(1)
        return Path("log.csv").read_text()

    ours, plain = both(WithLoss, fit, callbacks=lambda: [CSVLogger("log.csv", every_n_steps=2)])
    assert ours == plain
