"""Metrics, validate, get_preds: right over uneven batches, and without a trace."""

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from learnkit import (
    Callback,
    DataBunch,
    Learner,
    accuracy,
    error_rate,
    mean_absolute_error,
    mean_squared_error,
    top_k_accuracy,
)
from learnkit.metrics import RootMeanSquaredError

N, CLASSES = 23, 4


def make_tensors() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3), torch.randint(CLASSES, (N,))


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def make_learner(model: nn.Module | None = None, bs: int = 5, **options: Any) -> Learner:
    """Validation batches of 5, the last one of 3."""
    x, y = make_tensors()
    return Learner(DataBunch.from_tensors((x, y), (x, y), bs=bs), model or make_model(), **options)


def whole(learn: Learner) -> tuple[Tensor, Tensor]:
    """Prediction and target of the whole validation set at once."""
    x, y = learn.data.valid_dl.tensors  # type: ignore[union-attr]
    modes = [(m, m.training) for m in learn.model.modules()]
    with torch.no_grad():
        pred = learn.model.eval()(x)
    for module, mode in modes:
        module.training = mode
    return pred, y


class ShareOfClass:
    """A metric as a user writes one: no mean over batches gives it."""

    def __init__(self, name: str = "") -> None:
        if name:
            self.name = name

    def reset(self) -> None:
        self.right = self.n = 0

    def update(self, pred: Tensor, target: Tensor) -> None:
        of_class = target == 0
        self.right += (pred.argmax(1) == 0)[of_class].sum().item()
        self.n += of_class.sum().item()

    def compute(self) -> float:
        return self.right / self.n


def share_of_class(pred: Tensor, target: Tensor) -> float:
    return (pred.argmax(1) == 0)[target == 0].float().mean().item()


METRICS: dict[str, tuple[Callable[[], Any], str, Callable[[Tensor, Tensor], float]]] = {
    "accuracy": (lambda: accuracy, "accuracy", lambda p, t: (p.argmax(1) == t).double().mean().item()),
    "error_rate": (lambda: error_rate, "error_rate", lambda p, t: (p.argmax(1) != t).double().mean().item()),
    "top_k_accuracy": (
        lambda: top_k_accuracy(2),
        "top_2_accuracy",
        lambda p, t: (p.topk(2).indices == t[:, None]).any(1).double().mean().item(),
    ),
    "function": (lambda: F.cross_entropy, "cross_entropy", lambda p, t: F.cross_entropy(p.double(), t).item()),
    "lambda": (
        lambda: lambda p, t: p.max(1).values.mean(),
        "metric",
        lambda p, t: p.max(1).values.double().mean().item(),
    ),
    "function that gives a float": (
        lambda: float_accuracy,
        "float_accuracy",
        lambda p, t: (p.argmax(1) == t).double().mean().item(),
    ),
    "torchmetrics": (
        lambda: torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES, average="micro"),
        "multiclass_accuracy",
        lambda p, t: (p.argmax(1) == t).double().mean().item(),
    ),
    "own class": (ShareOfClass, "share_of_class", share_of_class),
    "own class with a name": (lambda: ShareOfClass("recall"), "recall", share_of_class),
}


def float_accuracy(pred: Tensor, target: Tensor) -> float:
    return (pred.argmax(1) == target).float().mean().item()


@pytest.mark.parametrize("make, name, by_hand", METRICS.values(), ids=METRICS)
def test_a_metric_over_uneven_batches_is_its_value_over_the_whole_data(
    make: Callable[[], Any], name: str, by_hand: Callable[[Tensor, Tensor], float]
):
    for bs in (5, 22, N, 100):
        learn = make_learner(bs=min(bs, N), metrics=make())
        values = learn.validate()
        pred, target = whole(learn)
        assert values == {
            "valid_loss": pytest.approx(F.cross_entropy(pred, target).item(), rel=1e-6),
            name: pytest.approx(by_hand(pred, target), abs=1e-6),
        }
        assert all(type(value) is float for value in values.values())


def test_a_metric_collection_gives_a_column_for_each_of_its_metrics():
    collection = torchmetrics.MetricCollection(
        {
            "top1": torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES, average="micro"),
            "f1": torchmetrics.F1Score(task="multiclass", num_classes=CLASSES, average="macro"),
        }
    )
    learn = make_learner(metrics=[collection, error_rate])
    values = learn.validate()
    pred, target = whole(learn)
    f1 = torchmetrics.functional.f1_score(pred, target, task="multiclass", num_classes=CLASSES, average="macro").item()
    assert values.keys() == {"valid_loss", "top1", "f1", "error_rate"}
    assert values["f1"] == pytest.approx(f1, abs=1e-6) and values["top1"] == pytest.approx(
        1 - values["error_rate"], abs=1e-6
    )
    assert learn.fit(1).recorder.metric_names == ("train_loss", "valid_loss", *collection.keys(), "error_rate")


def test_metrics_begin_anew_at_each_validation():
    learn = make_learner(
        metrics=[accuracy, ShareOfClass(), torchmetrics.Accuracy(task="multiclass", num_classes=CLASSES)]
    )
    assert learn.validate() == learn.validate()


def test_regression_metrics_are_weighted_by_samples():
    x, y = torch.randn(N, 3), torch.randn(N, 1)
    learn = Learner(
        DataBunch.from_tensors((x, y), (x, y), bs=5),
        nn.Linear(3, 1),
        metrics=[mean_squared_error, mean_absolute_error, RootMeanSquaredError()],
    )
    values = learn.validate()
    error = whole(learn)[0] - y
    assert values["mean_squared_error"] == pytest.approx(error.square().double().mean().item(), rel=1e-12)
    assert values["valid_loss"] == pytest.approx(
        values["mean_squared_error"], rel=1e-6
    )  # of float32, as the model's outputs
    assert values["mean_absolute_error"] == pytest.approx(error.abs().mean().item(), rel=1e-6)
    assert values["root_mean_squared_error"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)


def test_the_valid_loss_of_a_whole_data_set_is_the_sample_weighted_one_in_a_fit_too():
    learn = make_learner(metrics=accuracy).fit(2)
    values = learn.validate()
    assert learn.recorder.values[-1][1:] == pytest.approx(list(values.values()), rel=1e-12)


def test_a_metric_with_a_name_that_is_there_twice_gets_a_number():
    learn = make_learner(metrics=[accuracy, accuracy])
    assert list(learn.validate()) == ["valid_loss", "accuracy", "accuracy_2"]


def test_a_metric_that_is_called_like_a_loss_of_ours_does_not_replace_it():
    def valid_loss(pred: Tensor, target: Tensor) -> Tensor:
        return torch.tensor(1e6)

    def train_loss(pred: Tensor, target: Tensor) -> Tensor:
        return torch.tensor(1e6)

    learn = make_learner(metrics=[valid_loss, train_loss]).fit(1)
    assert len(set(learn.recorder.metric_names)) == 4
    row = dict(zip(learn.recorder.metric_names, learn.recorder.values[-1], strict=True))
    assert row["train_loss"] < 1e3 and row["valid_loss"] < 1e3


def test_validate_takes_any_loader_and_the_learners_own_by_default():
    learn = make_learner(metrics=accuracy)
    x, y = make_tensors()
    by_loader, by_list = learn.validate(DataLoader(TensorDataset(x, y), 6)), learn.validate([(x, y)])
    assert by_loader == pytest.approx(by_list, rel=1e-6)
    assert learn.validate()["valid_loss"] == pytest.approx(F.cross_entropy(*whole(learn)).item(), rel=1e-6)


def test_validation_batches_without_a_target_can_be_predicted():
    x, _ = make_tensors()
    learn = make_learner()
    for dl in ([(x,)], [x], [(x[:20],), (x[20:],)]):
        preds, targets = learn.get_preds(dl)
        torch.testing.assert_close(preds, learn.model.eval()(x).detach())
        assert targets is None


def test_get_preds_of_a_loss_without_a_reduction_says_what_is_needed():
    learn = make_learner(loss_func=lambda pred, y: F.cross_entropy(pred, y))
    assert len(learn.get_preds()) == 2
    needs = r"no loss per sample: with_loss=True needs a loss with reduction='none'"
    with pytest.raises(TypeError, match=needs):
        learn.get_preds(with_loss=True)


@pytest.mark.parametrize(
    "loss_func",
    [None, nn.CrossEntropyLoss(label_smoothing=0.1), F.cross_entropy],
    ids=["default", "module", "function"],
)
def test_the_losses_of_samples_average_to_the_validation_loss(loss_func: Any):
    learn = make_learner(loss_func=loss_func)
    losses = learn.get_preds(with_loss=True)[2]
    assert losses.shape == (N,) and losses.mean().item() == pytest.approx(learn.validate()["valid_loss"], rel=1e-6)
    assert getattr(loss_func, "reduction", "mean") == "mean"


# --- without a trace ---------------------------------------------------------
EVALUATIONS: dict[str, Callable[[Learner], Any]] = {
    "validate": lambda learn: learn.validate(),
    "get_preds": lambda learn: learn.get_preds(with_loss=True),
    "validate(dl)": lambda learn: learn.validate(DataLoader(TensorDataset(*make_tensors_aside()), 5, shuffle=True)),
    "predict": lambda learn: learn.predict(torch.zeros(3)),
    "one_batch": lambda learn: learn.data.one_batch(),
    "summary": lambda learn: learn.summary(),
    "hooks": lambda learn: learn.hooks(),
}


def make_tensors_aside() -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        return make_tensors()


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
def test_an_evaluation_leaves_modes_weights_gradients_and_random_state(evaluate: Callable[[Learner], Any]):
    learn = make_learner()
    learn.model[1].eval()  # type: ignore[index]
    F.cross_entropy(learn.model(torch.randn(4, 3)), torch.tensor([0, 1, 2, 3])).backward()
    modes = [m.training for m in learn.model.modules()]
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    grads = [p.grad.clone() for p in learn.model.parameters() if p.grad is not None]
    generator, python = torch.get_rng_state(), random.getstate()
    evaluate(learn)
    assert [m.training for m in learn.model.modules()] == modes
    for key, value in learn.model.state_dict().items():
        assert torch.equal(state[key], value)
    assert all(
        torch.equal(p.grad, grad) for p, grad in zip(learn.model.parameters(), grads, strict=True) if p.grad is not None
    )
    assert torch.equal(torch.get_rng_state(), generator) and random.getstate() == python
    assert torch.is_grad_enabled() and learn.values == {} and learn.epochs_trained == 0


class InTheMiddle(Callback):
    """Evaluates after some hook of the second training batch."""

    def __init__(self, hook: str, evaluate: Callable[[Learner], Any]) -> None:
        self.hook, self.evaluate = hook, evaluate

    def look(self, hook: str, learn: Learner) -> None:
        if hook == self.hook and learn.training and learn.batch_index == 1:
            self.evaluate(learn)

    def before_batch(self, learn: Learner) -> None:
        self.look("before_batch", learn)

    def after_forward(self, learn: Learner) -> None:
        self.look("after_forward", learn)

    def after_backward(self, learn: Learner) -> None:
        self.look("after_backward", learn)

    def after_step(self, learn: Learner) -> None:
        self.look("after_step", learn)

    def after_batch(self, learn: Learner) -> None:
        self.look("after_batch", learn)


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
@pytest.mark.parametrize("hook", ["before_batch", "after_forward", "after_backward", "after_step", "after_batch"])
def test_an_evaluation_in_the_middle_of_a_fit_does_not_change_it(hook: str, evaluate: Callable[[Learner], Any]):
    runs = []
    for callbacks in ([], [InTheMiddle(hook, evaluate)]):
        torch.manual_seed(1)
        runs.append(make_learner(metrics=accuracy).fit(2, callbacks=callbacks))
    assert runs[0].recorder.losses == runs[1].recorder.losses and runs[0].recorder.values == runs[1].recorder.values
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_validate_in_the_middle_of_a_fit_gives_the_value_of_that_moment_and_keeps_the_place():
    found: list[Any] = []

    class Look(Callback):
        def after_step(self, learn):
            place = (
                learn.epoch,
                learn.step,
                learn.batch_index,
                learn.training,
                learn.dl,
                learn.target,
                learn.pred,
                learn.loss,
            )
            values = dict(learn.values)
            found.append((learn.validate()["valid_loss"], F.cross_entropy(*whole(learn)).item()))
            now = (
                learn.epoch,
                learn.step,
                learn.batch_index,
                learn.training,
                learn.dl,
                learn.target,
                learn.pred,
                learn.loss,
            )
            assert (
                all(a is b for a, b in zip(place, now, strict=True)) and learn.values == values and learn.model.training
            )

    make_learner(callbacks=Look()).fit(1)
    assert len(found) == 4
    for got, expected in found:
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["validate", "get_preds", "predict"])
def test_an_evaluation_that_fails_leaves_modes_and_the_learner_usable(name: str):
    evaluate = EVALUATIONS[name]

    class Fails(Callback):
        def after_forward(self, learn):
            raise LookupError("lost")

    learn = make_learner(callbacks=Fails())
    learn.model[1].eval()  # type: ignore[index]
    modes = [m.training for m in learn.model.modules()]
    with pytest.raises(LookupError, match="lost"):
        evaluate(learn)
    assert [m.training for m in learn.model.modules()] == modes and torch.is_grad_enabled()
    learn.remove_callback(Fails)
    evaluate(learn)


def test_an_evaluation_that_fails_inside_a_fit_and_is_caught_leaves_the_fit_going():
    class FailsOnce(Callback):
        n = 0

        def before_validate(self, learn):
            self.n += 1
            if self.n == 1:
                raise LookupError("lost")

    class Looks(Callback):
        def after_batch(self, learn):
            if learn.training and learn.step == 2:
                with suppress(LookupError):
                    learn.validate()

    learn = make_learner(callbacks=[FailsOnce(), Looks()]).fit(2)
    assert learn.step == 8 and learn.model.training


def test_validation_runs_in_evaluation_mode_without_gradients_and_training_in_training_mode():
    seen: set[tuple[bool, bool, bool]] = set()

    class Modes(Callback):
        def after_forward(self, learn):
            seen.add((learn.training, learn.model.training, learn.pred.requires_grad))

    make_learner(callbacks=Modes()).fit(1)
    assert seen == {(True, True, True), (False, False, False)}


def test_running_statistics_do_not_move_in_an_evaluation():
    learn = make_learner()
    before = learn.model[1].running_mean.clone()  # type: ignore[index,union-attr,operator]
    learn.validate()
    learn.get_preds()
    assert torch.equal(learn.model[1].running_mean, before)  # type: ignore[index,union-attr,arg-type]
