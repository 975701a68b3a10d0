"""Metrics against closed forms, torch and torchmetrics; batches are uneven, so that means of means would be wrong."""

import doctest
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from learnkit import metrics as metrics_module
from learnkit.metrics import (
    FunctionMetric,
    Mean,
    Metric,
    MetricFunction,
    ObjectMetric,
    RootMeanSquaredError,
    accuracy,
    as_metric,
    as_metrics,
    error_rate,
    mean_absolute_error,
    mean_squared_error,
    read_values,
    top_k_accuracy,
)

ROOT = Path(metrics_module.__file__).parents[1]


def scores(n: int = 23, n_classes: int = 6, *rest: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pred = torch.randn(n, n_classes, *rest, generator=generator)
    return pred, torch.randint(0, n_classes, (n, *rest), generator=generator)


def uneven(pred: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    sizes = [7, 1, 11, len(pred) - 19]
    return zip(pred.split(sizes), target.split(sizes), strict=True)


def over_batches(thing: Any, pred: Tensor, target: Tensor) -> dict[str, float]:
    metric = as_metric(thing)
    metric.reset()
    for pred_batch, target_batch in uneven(pred, target):
        metric.update(pred_batch, target_batch, len(pred_batch))
    return read_values(metric.compute())


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


class Counter:
    """An own metric: the number of samples; not a mean, no tensor."""

    def __init__(self) -> None:
        self.n = 0

    def reset(self) -> None:
        self.n = 0

    def update(self, pred: Tensor, target: Tensor) -> None:
        self.n += len(pred)

    def compute(self) -> int:
        return self.n


class Extremes:
    """Two columns."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def reset(self) -> None:
        self.seen.clear()

    def update(self, pred: Tensor, target: Tensor) -> None:
        self.seen.append(pred)

    def compute(self) -> dict[str, Tensor]:
        low, high = torch.cat(self.seen).aminmax()
        return {"low": low, "high": high}


# --- functions ---------------------------------------------------------------


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(metrics_module)
    assert result.attempted >= 15
    assert result.failed == 0


def test_accuracy_counts_the_highest_scores_by_hand():
    pred = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    target = torch.tensor([1, 0, 1, 1])
    assert accuracy(pred, target) == 0.75
    assert error_rate(pred, target) == 0.25


@pytest.mark.parametrize("rest", [(), (5,), (3, 4)])
def test_classification_metrics_equal_torchmetrics_and_numpy(rest: tuple[int, ...]):
    pred, target = scores(23, 6, *rest)
    right = numpy.argmax(pred.numpy(), axis=1) == target.numpy()
    assert accuracy(pred, target).item() == pytest.approx(right.mean())
    assert error_rate(pred, target).item() == pytest.approx(1 - right.mean())
    for k in (1, 2, 5, 6):
        expected = MulticlassAccuracy(6, top_k=k, average="micro")(pred, target)
        torch.testing.assert_close(top_k_accuracy(k)(pred, target), expected)


def test_top_1_is_accuracy_and_top_all_is_one():
    pred, target = scores()
    assert top_k_accuracy(1)(pred, target) == accuracy(pred, target)
    assert top_k_accuracy(6)(pred, target) == 1


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3, 2)])
def test_regression_metrics_equal_torch(shape: tuple[int, ...]):
    pred, target = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(mean_squared_error(pred, target), F.mse_loss(pred, target))
    torch.testing.assert_close(mean_absolute_error(pred, target), F.l1_loss(pred, target))


def test_half_precision_is_summed_in_single_precision():
    pred = torch.full((3000,), 0.1, dtype=torch.bfloat16)
    for metric in (mean_absolute_error, mean_squared_error):
        value = metric(pred, torch.zeros_like(pred))
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(metric(pred.double(), torch.zeros(3000).double()).item(), rel=1e-5)


@pytest.mark.parametrize("metric", [accuracy, error_rate, top_k_accuracy(2), mean_squared_error, mean_absolute_error])
def test_metric_functions_return_one_number_without_reading_the_device(metric: MetricFunction):
    """Tensors on the meta device have no data: whatever reads them raises."""
    pred, classes = torch.empty(4, 3, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
    target = pred if metric in (mean_squared_error, mean_absolute_error) else classes
    assert metric(pred, target).shape == ()


@pytest.mark.parametrize(
    ("pred", "target", "hint"),
    [
        (torch.zeros(4, 1), torch.zeros(4), "One binary score per sample"),
        (torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), "scores of 2 classes or more"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), "One binary score per sample"),
        (torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long), r"Targets \(batch, 1\): target.squeeze\(1\)"),
        (torch.zeros(4, 3), torch.zeros(4, 3), r"One-hot targets: target.argmax\(1\)"),
        (torch.zeros(4, 3), torch.zeros(4), "integer class numbers"),
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), r"target \(batch, \*\)"),
        (torch.zeros(4, 7, 3), torch.zeros(4, 7, dtype=torch.long), r"pred.movedim\(-1, 1\)"),
    ],
)
def test_shapes_that_are_not_classes_are_refused_with_what_was_got(pred: Tensor, target: Tensor, hint: str):
    for name, metric in {"accuracy": accuracy, "error_rate": error_rate, "top_2_accuracy": top_k_accuracy(2)}.items():
        with pytest.raises(ValueError, match=hint) as caught:
            metric(pred, target)
        assert str(caught.value).startswith(f"{name} got pred float32 {tuple(pred.shape)} and target ")
        assert str(tuple(target.shape)) in str(caught.value)


def test_regression_refuses_to_broadcast():
    for metric in (mean_squared_error, mean_absolute_error, RootMeanSquaredError().update):
        with pytest.raises(ValueError, match=r"\(4, 1\) and target float32 \(4,\).*pred\.squeeze\(1\)"):
            metric(torch.zeros(4, 1), torch.zeros(4))


def test_top_k_refuses_a_k_that_cannot_be():
    with pytest.raises(ValueError, match="got k=0, expected 1 or more"):
        top_k_accuracy(0)
    with pytest.raises(ValueError, match=r"top_5_accuracy got pred float32 \(4, 3\), expected 5 classes or more"):
        top_k_accuracy()(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))


# --- Mean --------------------------------------------------------------------


def test_a_mean_weighs_samples_not_batches():
    mean = Mean()
    mean.add(torch.tensor(0.0), 9)
    mean.add(torch.tensor(1.0), 1)
    assert mean.compute().item() == pytest.approx(0.1)  # batches alone would give 0.5


def test_a_mean_over_thousands_of_batches_is_exact_and_keeps_few_tensors():
    mean, values = Mean(), torch.rand(3000)
    counts = torch.randint(1, 9, (3000,)).tolist()
    for value, n in zip(values, counts, strict=True):
        mean.add(value, n)
        assert len(mean._sums) <= 256
    expected = numpy.average(values.double().numpy(), weights=counts)
    assert mean.compute().item() == pytest.approx(expected, rel=1e-14)


def test_adding_never_reads_the_device():
    mean = Mean()
    for _ in range(600):  # folded twice
        mean.add(torch.empty((), device="meta"), 4)
    assert mean.compute().device.type == "meta"
    assert mean.state().shape == (2,)
    mean.load_state(mean.state())
    mean.add(torch.empty((), device="meta"), 4)
    assert mean.compute().dtype == torch.float64


def test_a_mean_does_not_follow_later_changes_and_keeps_no_graph():
    for dtype in (torch.float32, torch.float64):
        mean, value = Mean(), torch.ones((), dtype=dtype, requires_grad=True)
        mean.add(value, 2)
        with torch.no_grad():
            value.mul_(5)
        assert mean.compute() == 1
        assert not mean.compute().requires_grad


def test_a_mean_of_nothing_is_nan():
    mean = Mean()
    assert mean.compute().isnan()
    mean.add(torch.tensor(float("nan")), 0)  # an empty batch has no mean
    assert mean.state().tolist() == [0, 0]
    mean.add(torch.tensor(2.0), 1)
    assert mean.compute() == 2
    mean.reset()
    assert mean.compute().isnan()


def test_nan_in_a_batch_is_not_hidden():
    mean = Mean()
    mean.add(torch.tensor(float("nan")), 2)
    mean.add(torch.tensor(1.0), 2)
    assert mean.compute().isnan()


def test_states_of_two_halves_add_up_to_the_mean_of_the_whole():
    whole, halves = Mean(), [Mean(), Mean()]
    for i, value in enumerate(torch.rand(9)):
        whole.add(value, i + 1)
        halves[i % 2].add(value, i + 1)
    total = halves[0].state() + halves[1].state()
    halves[0].load_state(total)
    assert halves[0].compute().item() == pytest.approx(whole.compute().item(), rel=1e-15)
    for mean in (whole, halves[0]):
        mean.add(torch.tensor(3.0), 5)
    assert halves[0].compute().item() == pytest.approx(whole.compute().item(), rel=1e-15)


def test_a_state_is_a_copy_that_may_be_reduced_in_place():
    mean = Mean()
    mean.add(torch.tensor(3.0), 2)
    mean.state().zero_()
    assert mean.state().tolist() == [6, 2]
    state = torch.tensor([8.0, 4.0], dtype=torch.float64)
    mean.load_state(state)
    state.zero_()
    assert mean.compute() == 2


def test_what_was_added_in_inference_mode_can_be_read_outside():
    mean = Mean()
    with torch.inference_mode():
        for _ in range(300):
            mean.add(torch.tensor(1.5), 2)
    mean.add(torch.tensor(1.5), 2)
    assert mean.compute() == 1.5


# --- Metric ------------------------------------------------------------------


@pytest.mark.parametrize("metric", [accuracy, error_rate, top_k_accuracy(2), lambda pred, target: pred.mean()])
def test_a_function_over_uneven_batches_equals_the_whole(metric: MetricFunction):
    pred, target = scores()
    (value,) = over_batches(metric, pred, target).values()
    assert value == pytest.approx(metric(pred, target).item(), rel=1e-6)


def test_the_mean_over_batches_would_be_another_number():
    """Else the test above could not fail."""
    pred, target = scores()
    batches = [accuracy(*batch).item() for batch in uneven(pred, target)]
    assert abs(sum(batches) / len(batches) - accuracy(pred, target).item()) > 0.01


def test_torchmetrics_over_uneven_batches_equals_the_whole():
    pred, target = scores()
    for metric in (MulticlassF1Score(6), MulticlassAccuracy(6, average="micro")):
        (value,) = over_batches(metric, pred, target).values()
        assert value == pytest.approx(metric.clone()(pred, target).item(), rel=1e-6)


def test_our_accuracy_equals_that_of_torchmetrics_over_uneven_batches():
    pred, target = scores()
    theirs = over_batches(MulticlassAccuracy(6, average="micro"), pred, target)
    assert over_batches(accuracy, pred, target)["accuracy"] == pytest.approx(theirs["multiclass_accuracy"], rel=1e-6)


def test_the_root_is_taken_of_all_samples_not_batch_by_batch():
    pred, target = torch.randn(23, 2), torch.randn(23, 2)
    expected = F.mse_loss(pred, target).sqrt().item()
    assert over_batches(RootMeanSquaredError(), pred, target) == {"root_mean_squared_error": pytest.approx(expected)}
    theirs = over_batches(torchmetrics.MeanSquaredError(squared=False), pred, target)["mean_squared_error"]
    assert theirs == pytest.approx(expected)


def test_the_root_weighs_numbers_where_batches_differ_in_width():
    metric = as_metric(RootMeanSquaredError())
    metric.update(torch.ones(2, 3), torch.zeros(2, 3), 2)
    metric.update(torch.zeros(2, 1), torch.zeros(2, 1), 2)
    assert read_values(metric.compute())["root_mean_squared_error"] == pytest.approx((6 / 8) ** 0.5)


def test_a_collection_gives_a_column_each_known_in_advance():
    pred, target = scores()
    collection = torchmetrics.MetricCollection([MulticlassAccuracy(6), MulticlassF1Score(6)], prefix="val_")
    metric = as_metric(collection)
    assert metric.names == ("val_MulticlassAccuracy", "val_MulticlassF1Score")
    whole = {name: value.item() for name, value in collection.clone()(pred, target).items()}
    assert over_batches(metric, pred, target) == pytest.approx(whole)


def test_an_own_object_that_counts_in_python_works():
    pred, target = scores()
    assert over_batches(Counter(), pred, target) == {"counter": 23.0}


def test_an_own_object_names_its_columns_by_names():
    class Named(Extremes):
        names = ("low", "high")

    pred, target = scores()
    assert over_batches(Named(), pred, target) == {"low": pred.min().item(), "high": pred.max().item()}


def test_columns_that_were_not_announced_are_refused_with_the_cure():
    metric = as_metric(Extremes())
    metric.update(*scores(), 23)
    with pytest.raises(ValueError, match=r"computed \('low', 'high'\), expected \('extremes',\).*tuple `names`"):
        metric.compute()


@pytest.mark.parametrize("metric", [accuracy, MulticlassAccuracy(6), Counter(), RootMeanSquaredError()])
def test_reset_forgets_all_batches(metric: Any):
    pred, target = scores() if not isinstance(metric, RootMeanSquaredError) else (torch.randn(23), torch.randn(23))
    adapted = as_metric(metric)
    adapted.update(pred, target, 23)
    first = read_values(adapted.compute())
    adapted.update(pred.roll(1, 0), target, 23)
    adapted.reset()
    adapted.update(pred, target, 23)
    assert read_values(adapted.compute()) == first


def test_torchmetrics_updated_in_inference_mode_starts_anew_outside():
    pred, target = scores()
    metric = as_metric(MulticlassAccuracy(6))
    with torch.inference_mode():
        metric.update(pred, target, 23)
    first = read_values(metric.compute())
    metric.reset()
    metric.update(pred, target, 23)
    assert read_values(metric.compute()) == first


def test_an_object_is_moved_to_the_device_of_the_first_batch_after_each_reset():
    class Movable(Counter):
        def __init__(self) -> None:
            super().__init__()
            self.moves: list[str] = []

        def to(self, device: torch.device) -> None:
            self.moves.append(device.type)

    movable = Movable()
    metric = as_metric(movable)
    for batch in (torch.empty(3, device="meta"), torch.empty(3, device="meta")):
        metric.update(batch, None, 3)
    metric.reset()
    metric.update([torch.zeros(3)], torch.zeros(3), 3)
    assert movable.moves == ["meta", "cpu"]


def test_torchmetrics_follows_its_batches_to_another_device():
    metric = torchmetrics.MeanSquaredError()
    as_metric(metric).update(torch.empty(4, device="meta"), torch.empty(4, device="meta"), 4)
    assert metric.sum_squared_error.device.type == "meta"


def test_torchmetrics_is_updated_never_called():
    class Strict(torchmetrics.MeanSquaredError):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("forward computes on every batch")

    assert over_batches(Strict(), torch.ones(23), torch.zeros(23)) == {"strict": 1.0}


@pytest.mark.parametrize("value", [0.5, 1, True, numpy.float32(0.5), torch.tensor(0.5), torch.ones(1), torch.tensor(1)])
def test_one_number_of_any_type_is_taken(value: Any):
    metric = as_metric(lambda pred, target: value)
    metric.update(torch.zeros(3), None, 3)
    (result,) = metric.compute().values()
    assert isinstance(result, Tensor)
    assert result.shape == ()
    assert result.item() == float(value)


def test_a_plain_zero_for_some_batches_mixes_with_tensors_of_a_device():
    metric = as_metric(lambda pred, target: 0.0 if pred is None else pred.sum())
    metric.update(None, None, 3)
    metric.update(torch.empty(3, device="meta"), None, 3)
    assert metric.compute()["metric"].device.type == "meta"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("value", "got"),
    [(torch.zeros(3), r"float32 \(3,\)"), (None, "NoneType"), ({"a": 1.0}, r"\{'a': float\}"), ("high", "str")],
)
def test_a_function_that_returns_no_single_number_is_named(value: Any, got: str):
    def per_class(pred: Tensor, target: Tensor) -> Any:
        return value

    with pytest.raises(ValueError, match=rf"^The metric per_class returned {got}, expected one number: average it"):
        as_metric(per_class).update(torch.zeros(3), None, 3)


def test_an_object_that_computes_one_number_per_class_is_named():
    metric = as_metric(MulticlassAccuracy(6, average=None))
    metric.update(*scores(), 23)
    with pytest.raises(ValueError, match=r"multiclass_accuracy returned float32 \(6,\), expected one number.*'macro'"):
        metric.compute()


def test_an_error_inside_a_metric_stays_itself_with_a_note_of_who_and_what():
    def faulty(pred: Tensor, target: Tensor) -> Tensor:
        return pred[99]

    class Faulty(Counter):
        def update(self, pred: Tensor, target: Tensor) -> None:
            raise KeyError(1)

    with pytest.raises(IndexError, match="index 99 is out of bounds") as caught:
        as_metric(faulty).update(torch.zeros(4, 3), torch.zeros(4), 4)
    assert "The metric faulty raised this, given pred float32 (4, 3) and target float32 (4,)." in notes_of(caught.value)
    assert "return pred[99]" in "".join(traceback.format_tb(caught.tb))
    with pytest.raises(KeyError) as caught:
        as_metric(Faulty()).update((torch.zeros(2), {"a": torch.zeros(3)}), None, 4)
    assert "metric faulty raised this, given pred (float32 (2,), {'a': float32 (3,)}) and target NoneType" in notes_of(
        caught.value
    )


def test_an_error_in_compute_names_the_metric():
    class Empty(Counter):
        def compute(self) -> int:
            return 1 // self.n

    with pytest.raises(ZeroDivisionError) as caught:
        as_metric(Empty()).compute()
    assert "The metric empty raised this, in compute()." in notes_of(caught.value)


def test_means_inside_metrics_are_found_and_become_the_whole_worlds():
    """What two ranks do: each sees half of the batches, states are added up, loaded, computed."""
    pred, target = torch.randn(23, 2), torch.randn(23, 2)
    for thing in (mean_squared_error, RootMeanSquaredError):
        make = thing if isinstance(thing, type) else lambda thing=thing: thing
        ranks = [as_metric(make()), as_metric(make())]
        for i, (pred_batch, target_batch) in enumerate(uneven(pred, target)):
            ranks[i % 2].update(pred_batch, target_batch, len(pred_batch))
        ranks[0].load_sums([own + other for own, other in zip(ranks[0].sums(), ranks[1].sums(), strict=True)])
        whole = over_batches(make(), pred, target)
        assert read_values(ranks[0].compute()) == pytest.approx(whole, rel=1e-12)
    assert not as_metric(Counter()).summable


# --- names -------------------------------------------------------------------


def _private(pred: Tensor, target: Tensor) -> Tensor:
    return pred.mean()


class WeightedAUROC:
    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        return pred.mean()

    def score(self, pred: Tensor, target: Tensor) -> Tensor:
        return pred.mean()


class WithName(WeightedAUROC):
    name = "area"


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (accuracy, "accuracy"),
        (top_k_accuracy(3), "top_3_accuracy"),
        (lambda pred, target: pred.mean(), "metric"),
        (_private, "private"),
        (partial(F.smooth_l1_loss, beta=0.5), "smooth_l1_loss"),
        (partial(partial(_private)), "private"),
        (WeightedAUROC(), "weighted_auroc"),
        (WeightedAUROC().score, "score"),
        (WithName(), "area"),
        (nn.L1Loss(), "l1_loss"),
        (MulticlassF1Score(3), "multiclass_f1_score"),
        (RootMeanSquaredError(), "root_mean_squared_error"),
        (torch.dist, "dist"),
    ],
)
def test_a_metric_is_called_what_its_function_or_class_is(thing: Any, name: str):
    metric = as_metric(thing)
    assert metric.name == name
    assert metric.names == (name,)


def test_equal_names_get_the_suffixes_2_and_3():
    metrics = as_metrics([accuracy, MulticlassAccuracy(6), accuracy, MulticlassAccuracy(6, average="micro"), accuracy])
    assert [metric.names[0] for metric in metrics] == [
        "accuracy",
        "multiclass_accuracy",
        "accuracy_2",
        "multiclass_accuracy_2",
        "accuracy_3",
    ]
    pred, target = scores()
    for metric in metrics:
        metric.update(pred, target, 23)
    values = read_values({name: value for metric in metrics for name, value in metric.compute().items()})
    assert len(values) == 5
    assert values["accuracy_3"] == values["accuracy"] == pytest.approx(values["multiclass_accuracy_2"])


def test_suffixes_avoid_names_that_exist():
    def accuracy_2(pred: Tensor, target: Tensor) -> Tensor:
        return pred.mean()

    assert [metric.names for metric in as_metrics([accuracy_2, accuracy, accuracy])] == [
        ("accuracy_2",),
        ("accuracy",),
        ("accuracy_3",),
    ]
    assert as_metrics(accuracy, taken=["accuracy", "valid_loss"])[0].names == ("accuracy_2",)


def test_columns_of_two_collections_do_not_collide():
    collections = [torchmetrics.MetricCollection([MulticlassAccuracy(6)]) for _ in range(2)]
    metrics = as_metrics(collections)
    for metric in metrics:
        metric.update(*scores(), 23)
    assert [list(metric.compute()) for metric in metrics] == [["MulticlassAccuracy"], ["MulticlassAccuracy_2"]]


def test_one_thing_a_list_a_tuple_or_nothing_is_a_list_of_metrics():
    collection = torchmetrics.MetricCollection([MulticlassAccuracy(6)])
    for things, n in ((accuracy, 1), ([accuracy], 1), ((accuracy, error_rate), 2), ((), 0), (collection, 1)):
        metrics = as_metrics(things)
        assert len(metrics) == n
        assert all(isinstance(metric, Metric) for metric in metrics)


def test_the_kinds_are_told_apart():
    assert isinstance(as_metric(nn.L1Loss()), FunctionMetric)
    assert isinstance(as_metric(MulticlassAccuracy(3)), ObjectMetric)
    metric = FunctionMetric(accuracy)
    assert as_metric(metric) is metric


# --- refusals ----------------------------------------------------------------


def test_a_class_is_refused_add_parentheses():
    for cls in (MulticlassAccuracy, RootMeanSquaredError, Counter):
        with pytest.raises(TypeError, match=rf"{cls.__name__} is a class, expected an instance: add parentheses"):
            as_metric(cls)


def test_a_string_is_refused_with_the_near_name():
    with pytest.raises(TypeError, match=r"'acuracy' is a string.*did you mean learnkit\.metrics\.accuracy, without"):
        as_metric("acuracy")
    with pytest.raises(TypeError, match=r"'zzz' is a string.*pass the function itself"):
        as_metrics("zzz")


def test_what_cannot_be_called_is_refused():
    for thing in (None, 3, torch.zeros(2)):
        with pytest.raises(TypeError, match=r"is not a metric: expected a function \(pred, target\)"):
            as_metric(thing)


def test_an_object_with_some_of_the_methods_is_told_which_it_lacks():
    class Half:
        compute = None

        def reset(self) -> None: ...
        def update(self, pred: Tensor, target: Tensor) -> None: ...
        def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
            return pred.mean()

    with pytest.raises(TypeError, match=r"Half object at .* has no compute: expected all of reset, update and compute"):
        as_metric(Half())
    with pytest.raises(TypeError, match="has no reset, compute"):
        as_metric({"accuracy": accuracy})


def test_a_factory_that_was_not_called_is_refused_at_once():
    with pytest.raises(TypeError, match=r"top_k_accuracy\(k: 'int' = 5\)|top_k_accuracy\(k: int = 5\)") as caught:
        as_metric(top_k_accuracy)
    assert "metrics=top_k_accuracy(5)" in str(caught.value)


def test_a_method_with_other_arguments_is_refused_at_once():
    class NeedsMore(Counter):
        def update(self, pred: Tensor, target: Tensor, indexes: Tensor) -> None: ...  # pyright: ignore

    with pytest.raises(TypeError, match=r"needs_more\(.*cannot be called with \(pred, target\).*'indexes'"):
        as_metric(NeedsMore())


def test_one_object_given_twice_is_refused():
    metric = Counter()
    with pytest.raises(ValueError, match=r"The same counter object was given twice.*create two"):
        as_metrics([metric, accuracy, metric])


# --- read --------------------------------------------------------------------


def test_read_keeps_names_order_and_values_of_mixed_types():
    values: dict[str, Tensor | float] = {
        "a": torch.tensor(0.5),
        "b": 2.0,
        "c": torch.tensor(2**40 + 1),
        "d": torch.tensor(0.1, dtype=torch.float64),
        "e": 1,
    }
    floats = read_values(values)
    assert list(floats.items()) == [("a", 0.5), ("b", 2.0), ("c", 2.0**40 + 1), ("d", 0.1), ("e", 1.0)]
    assert all(type(value) is float for value in floats.values())
    assert read_values({}) == {}


class Reads(TorchFunctionMode):
    """Notes the calls that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("tolist", "item", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__"):
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_whole_validation_reads_the_device_once():
    pred, target = scores()
    metrics = as_metrics([accuracy, error_rate, top_k_accuracy(2), lambda pred, target: pred.mean()])
    with Reads() as reads:
        for pred_batch, target_batch in uneven(pred, target):
            for metric in metrics:
                metric.update(pred_batch, target_batch, len(pred_batch))
        values = {name: value for metric in metrics for name, value in metric.compute().items()}
        assert reads.calls == []
        read_values(values)
    assert reads.calls == ["tolist"]


# --- import ------------------------------------------------------------------


def test_importing_schedules_needs_no_torch_and_importing_metrics_only_its_core():
    """In a fresh process, from the files, so that the package's other parts have no say."""
    code = f"""
import importlib.util, sys, types
sys.modules["learnkit"] = package = types.ModuleType("learnkit")
package.__path__ = [{str(ROOT / "learnkit")!r}]
import learnkit.schedule
assert "torch" not in sys.modules, "schedule imports torch"
import learnkit.metrics
heavy = {{"torch._dynamo", "torch._inductor", "torchmetrics", "torchvision", "numpy.testing"}} & set(sys.modules)
assert not heavy, f"metrics imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
