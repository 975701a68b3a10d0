"""Metrics: functions that give a batch's mean, objects with reset, update and compute, and one face for both."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial, wraps
from inspect import signature
from itertools import count
from typing import Any, final
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from learnkit.devices.accelerator import widest_float
from learnkit.devices.nested import describe
from learnkit.devices.transfer import sent
from learnkit.hooks import add_note

MetricFunction = Callable[[Any, Any], Any]


def _mean_of(each: MetricFunction) -> MetricFunction:
    """The metric that is the mean of what `each(pred, target)` gives for each element. A FunctionMetric takes the mean
    in float64: one in float32, weighted by its samples, is 1e-8 off, and differs with the batch size and the number of
    ranks.
    """

    @wraps(each)
    def metric(pred: Tensor, target: Tensor) -> Tensor:
        values = each(pred, target)
        return (values if values.is_floating_point() else values.float()).mean()

    metric.each = each  # type: ignore[attr-defined]
    return metric


@_mean_of
def accuracy(pred: Tensor, target: Tensor) -> Tensor:
    """The share of right answers: `pred` (batch, classes, *) scores, `target` (batch, *) class numbers."""
    _check_classes("accuracy", pred, target)
    return pred.argmax(1) == target


@_mean_of
def error_rate(pred: Tensor, target: Tensor) -> Tensor:
    """The share of wrong answers: `1 - accuracy`."""
    _check_classes("error_rate", pred, target)
    return pred.argmax(1) != target


def top_k_accuracy(k: int = 5) -> MetricFunction:
    """Makes the metric `top_{k}_accuracy`: the share of targets among the `k` highest scores; shapes as `accuracy`."""
    if k < 1:
        raise ValueError(f"top_k_accuracy needs k of 1 or more, got {k}.")
    name = f"top_{k}_accuracy"

    def metric(pred: Tensor, target: Tensor) -> Tensor:
        _check_classes(name, pred, target)
        if pred.shape[1] < k:
            raise ValueError(f"{name} needs {k} classes or more, got pred of {describe(pred)}: choose a smaller k.")
        return (pred.topk(k, dim=1).indices == target.unsqueeze(1)).any(1)

    metric.__name__ = name
    return _mean_of(metric)


@_mean_of
def mean_squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """The mean of squared differences; the shapes must be equal, nothing is broadcast."""
    return _difference("mean_squared_error", pred, target).square()


@_mean_of
def mean_absolute_error(pred: Tensor, target: Tensor) -> Tensor:
    """The mean of absolute differences; the shapes must be equal, nothing is broadcast."""
    return _difference("mean_absolute_error", pred, target).abs()


@final
class Mean:
    """A mean over samples, kept on the device as sum and count: sums and counts travel between ranks, never means.

    >>> mean = Mean()
    >>> mean.add(torch.tensor(1.0), n=3)
    >>> mean.add(torch.tensor(5.0), n=1)
    >>> mean.compute().item()
    2.0
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._count: int | Tensor = 0

    def reset(self) -> None:
        self._sums, self._count = [], 0

    def add(self, value: Tensor, n: int) -> None:
        """Counts `value`, one number that is a mean over `n` samples, `n` times. Does not wait for the device."""
        if n == 0:  # the mean of an empty batch is nan, and would stay
            return
        value = value.detach()
        # The product is a new tensor: what happens to `value` later does not matter, and a view keeps no batch alive.
        self._sums.append(value.to(widest_float(value.device)) * n)
        self._count += n
        if len(self._sums) == 256:  # bounds the memory of a long epoch
            self._sums = [_stacked(self._sums).sum()]

    def compute(self) -> Tensor:
        """The mean of what was added, 0-d float64 on its device (float32 where it has no float64); nan where nothing
        was.
        """
        total, n_samples = self.state()
        return total / n_samples

    def state(self) -> Tensor:
        """(sum, count), a new tensor to be added up over ranks; on the CPU where nothing was added."""
        total = _stacked(self._sums).sum() if self._sums else torch.zeros((), dtype=torch.float64, device="cpu")
        return torch.stack([total, torch.zeros_like(total) + self._count])

    def load_state(self, state: Tensor) -> None:
        """Puts (sum, count) in the place of what was added: all ranks', after their sums were added up."""
        total, self._count = state.detach().clone()
        self._sums = [total]


@final
class RootMeanSquaredError:
    """The root of the mean squared error: no mean over batches gives it, hence a class of its own.

    An example of one: all that it keeps is in `Mean`s, and it says so, so that on several ranks two numbers travel. Of
    a class that does not, all ranks' predictions and targets do.

    >>> metric = RootMeanSquaredError()
    >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    >>> metric.update(torch.tensor([3.0]), torch.tensor([9.0])); round(metric.compute().item() ** 2, 6)
    12.0
    """

    keeps_means_only = True

    def __init__(self) -> None:
        self.mean = Mean()

    def reset(self) -> None:
        self.mean.reset()

    def update(self, pred: Tensor, target: Tensor) -> None:
        self.mean.add(_difference("RootMeanSquaredError", pred, target).square().mean(), pred.numel())

    def compute(self) -> Tensor:
        return self.mean.compute().sqrt()


class Metric(ABC):
    """What a learner needs of a metric; `as_metric` makes one from whatever the user has.

    `names` are the columns, known before anything is computed. `summable`: what it keeps are sums, so that it becomes
    the whole world's metric when `sums()` are added up over the ranks and given to `load_sums`; of another metric all
    ranks' batches must be brought together. `keeps`: it may hold on to the predictions that it is given, which are then
    copies, as a captured CUDA graph writes its next output over its last one; unless said otherwise, what is not
    summable does.

    >>> metric = as_metric(accuracy)
    >>> metric.update(torch.eye(3), torch.tensor([0, 1, 0]), n=3)
    >>> read_values(metric.compute())
    {'accuracy': 0.6666666666666666}
    """

    name: str
    names: tuple[str, ...]
    summable: bool
    keeps: bool = True

    def __init__(self, name: str, names: tuple[str, ...], *, summable: bool, keeps: bool | None = None) -> None:
        self.name, self.names, self.summable = name, names, summable
        self.keeps = not summable if keeps is None else keeps

    @abstractmethod
    def reset(self) -> None:
        """Forgets all batches."""

    @abstractmethod
    def update(self, pred: Any, target: Any, n: int) -> None:
        """Takes in one batch of `n` samples, without waiting for the device unless the user's code does."""

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """What it keeps, if it is summable."""

    @abstractmethod
    def load_sums(self, sums: list[Tensor]) -> None:
        """Puts `sums` in the place of what it keeps."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor | float]:
        """One number for each of `names`; tensors are 0-d and stay on the device, `read` fetches them."""


@final
class FunctionMetric(Metric):
    """Averages `function(pred, target)`, a mean over the batch, over samples (a short last batch weighs less).

    >>> metric = FunctionMetric(lambda pred, target: pred.mean())
    >>> metric.update(torch.zeros(3), None, n=3); metric.update(torch.ones(1), None, n=1)
    >>> read_values(metric.compute())
    {'metric': 0.25}
    """

    def __init__(self, function: MetricFunction) -> None:
        self.function, self.mean = function, Mean()
        self.each: MetricFunction | None = getattr(function, "each", None)
        name = _name_of(function)
        super().__init__(name, (name,), summable=True)
        _check_arguments(name, function)

    def reset(self) -> None:
        self.mean.reset()

    def update(self, pred: Any, target: Any, n: int) -> None:
        if self.each is None:
            value = _scalar(self.name, _call(self.name, self.function, pred, target))
        else:
            values = _call(self.name, self.each, pred, target)
            value = values.to(widest_float(values.device)).mean()
        self.mean.add(value, n)

    def sums(self) -> list[Tensor]:
        return [self.mean.state()]

    def load_sums(self, sums: list[Tensor]) -> None:
        self.mean.load_state(sums[0])

    def compute(self) -> dict[str, Tensor | float]:
        return {self.names[0]: self.mean.compute()}


@final
class ObjectMetric(Metric):
    """Adapts an object with `reset()`, `update(pred, target)` and `compute()`, such as one of torchmetrics.

    `compute` returns one number, or a mapping with a number for each column: then the object has `keys()`, as
    `torchmetrics.MetricCollection` has, or a tuple `names`. torchmetrics' own communication is left out, and its
    `forward` never called. An object that has `.to` is moved to the first batch's device. Summable are torchmetrics
    whose states are all sums, and objects with `keeps_means_only = True`.

    >>> metric = ObjectMetric(RootMeanSquaredError())
    >>> metric.names
    ('root_mean_squared_error',)
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self._placed = False
        name = _name_of(wrapped)
        self._columns = _columns_of(wrapped) or (name,)
        super().__init__(name, self._columns, summable=_means_of(wrapped) != [] or _sum_states(wrapped) != [])
        _check_arguments(name, wrapped.update)

    def reset(self) -> None:
        self.wrapped.reset()
        self._placed = False

    def update(self, pred: Any, target: Any, n: int) -> None:
        if not self._placed:
            self._place(pred if isinstance(pred, Tensor) else target)
        _call(self.name, self.wrapped.update, pred, target)

    def sums(self) -> list[Tensor]:
        states = [getattr(owner, name) for owner, name in _sum_states(self.wrapped)]
        return states + [mean.state() for mean in _means_of(self.wrapped)]

    def load_sums(self, sums: list[Tensor]) -> None:
        owners, means = _sum_states(self.wrapped), _means_of(self.wrapped)
        for (owner, name), total in zip(owners, sums[: len(owners)], strict=True):
            setattr(owner, name, total)
        for mean, total in zip(means, sums[len(owners) :], strict=True):
            mean.load_state(total)

    def compute(self) -> dict[str, Tensor | float]:
        with _without_own_communication(self.wrapped):
            result = _call(self.name, self.wrapped.compute)
        if not isinstance(result, Mapping):
            result = {self._columns[0]: result}
        if set(result) != set(self._columns):
            raise ValueError(
                f"The metric {self.name} computed {tuple(result)}, expected {self._columns}: "
                "give the object a tuple `names` of the keys that its compute() returns."
            )
        values = [_scalar(self.name, result[column]) for column in self._columns]
        return dict(zip(self.names, values, strict=True))

    def _place(self, like: Any) -> None:
        move = getattr(self.wrapped, "to", None)
        if isinstance(like, Tensor) and isinstance(self.wrapped, nn.Module) and _torchmetrics_in(self.wrapped):
            self.wrapped._apply(
                partial(sent, device=like.device)
            )  # what its `to` does, without waiting for each tensor
        elif isinstance(like, Tensor) and callable(move):
            move(like.device)
        self._placed = True


def _means_of(wrapped: Any) -> list[Mean]:
    if not getattr(wrapped, "keeps_means_only", False):
        return []
    return [value for value in vars(wrapped).values() if isinstance(value, Mean)]


def _torchmetrics_in(wrapped: Any) -> list[Any]:
    """The torchmetrics that an object is or collects, told by what they say of their states."""
    parts = list(wrapped.values()) if callable(getattr(wrapped, "values", None)) else [wrapped]
    return parts if all(isinstance(getattr(part, "_reductions", None), dict) for part in parts) else []


def _sum_states(wrapped: Any) -> list[tuple[Any, str]]:
    """(metric, name of a state) for all states of torchmetrics, if they are all tensors that are added up over
    ranks.
    """
    reductions = [(part, name, how) for part in _torchmetrics_in(wrapped) for name, how in part._reductions.items()]
    sums = all(getattr(how, "__name__", "") == "dim_zero_sum" for _, _, how in reductions)
    return [(part, name) for part, name, _ in reductions] if sums else []


@contextmanager
def _without_own_communication(wrapped: Any) -> Iterator[None]:
    """torchmetrics' compute() without its collectives, and without its warning on a rank whose share was empty."""
    parts = _torchmetrics_in(wrapped)
    kept = [part.distributed_available_fn for part in parts]
    for part in parts:
        part.distributed_available_fn = lambda: False
    try:
        with catch_warnings():
            if parts:
                simplefilter("ignore", UserWarning)
            yield
    finally:
        for part, function in zip(parts, kept, strict=True):
            part.distributed_available_fn = function


def as_metric(thing: Any) -> Metric:
    """A `Metric` from a function, an object with reset, update and compute, or a `Metric`; TypeError for all else.

    >>> as_metric(error_rate).names
    ('error_rate',)
    """
    if isinstance(thing, Metric):
        return thing
    _check_not_a_class_or_name(thing)
    missing = [method for method in ("reset", "update", "compute") if not callable(getattr(thing, method, None))]
    if not missing:
        return ObjectMetric(thing)
    if len(missing) < 3:
        raise TypeError(f"The metric {thing!r} lacks {', '.join(missing)}: expected all of reset, update and compute.")
    if not callable(thing):
        raise TypeError(
            f"{thing!r} is no metric: expected a function (pred, target) -> mean over the batch, "
            "or an object with reset, update and compute."
        )
    return FunctionMetric(thing)


def as_metrics(things: Any, *, taken: Iterable[str] = ()) -> list[Metric]:
    """Metrics from one thing, a list or a tuple; a name that occurs again, or is `taken`, gets the suffix _2, _3, …

    >>> [metric.names for metric in as_metrics([accuracy, accuracy])]
    [('accuracy',), ('accuracy_2',)]
    """
    metrics = [as_metric(thing) for thing in (things if isinstance(things, (list, tuple)) else [things])]
    objects = [id(metric.wrapped) if isinstance(metric, ObjectMetric) else id(metric) for metric in metrics]
    for i, metric in enumerate(metrics):
        if objects[i] in objects[:i]:
            raise ValueError(f"One and the same {metric.name} is given twice and would see each batch twice: make two.")
    seen = set(taken)
    for metric in metrics:
        metric.names = tuple(_unique(name, seen) for name in metric.names)
    return metrics


def read_values(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All values as plain floats, with a single read for each device."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: float(value) for name, value in values.items() if not isinstance(value, Tensor)}
    for device in {value.device for value in tensors.values()}:
        names = [name for name, value in tensors.items() if value.device == device]
        # THE device synchronisation: tolist() waits until everything that leads to these numbers has been computed.
        numbers |= zip(names, _stacked([tensors[name].detach() for name in names]).tolist(), strict=True)
    return {name: numbers[name] for name in values}


def _stacked(values: list[Tensor]) -> Tensor:
    # A function may return a plain 0.0 for some batches, so that a few values are on the CPU.
    device = next((value.device for value in values if value.device.type != "cpu"), values[0].device)
    return torch.stack([value.to(device, widest_float(device)) for value in values])


def _check_classes(name: str, pred: Tensor, target: Tensor) -> None:
    several = pred.ndim > 1 and pred.shape[1] > 1
    if several and target.shape == pred.shape[:1] + pred.shape[2:] and not target.is_floating_point():
        return
    raise ValueError(
        f"{name} got pred {describe(pred)} and target {describe(target)}, expected pred (batch, classes, *), scores "
        "of 2 classes or more, and target (batch, *), integer class numbers. Classes in the last dimension: "
        "pred.movedim(-1, 1). One-hot targets: target.argmax(1). Targets (batch, 1): target.squeeze(1). "
        "One binary score per sample: write your own function (pred, target)."
    )


def _difference(name: str, pred: Tensor, target: Tensor) -> Tensor:
    if pred.shape != target.shape:
        raise ValueError(
            f"{name} got pred {describe(pred)} and target {describe(target)}, expected equal shapes (broadcasting "
            "would compare every prediction with every target): use pred.squeeze(1) or target.unsqueeze(1)."
        )
    difference = pred - target
    return difference.to(torch.promote_types(difference.dtype, torch.float32))  # half precision is too coarse to sum in


def _call(name: str, function: Callable[..., Any], *batch: Any) -> Any:
    try:
        return function(*batch)
    except Exception as error:
        where = "given pred {} and target {}".format(*map(describe, batch)) if batch else "in compute()"
        add_note(error, f"The metric {name} raised this, {where}.")
        raise


def _scalar(name: str, value: Any) -> Tensor:
    number = value if isinstance(value, Tensor) else _tensor(value)
    if number is None or number.numel() != 1:
        raise ValueError(
            f"The metric {name} returned {describe(value)}, expected one number: average it (.mean() in a function, "
            "average='macro' in torchmetrics), or make a metric for each part."
        )
    return number.detach().reshape(())


def _tensor(value: Any) -> Tensor | None:
    try:
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        return None


def _name_of(thing: Any) -> str:
    own = getattr(thing, "name", None)
    if isinstance(own, str) and own:
        return own
    if isinstance(thing, partial):
        return _name_of(thing.func)
    name = getattr(thing, "__name__", None) or _snake_case(type(thing).__name__)
    return "metric" if name == "<lambda>" else name.strip("_") or "metric"


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _columns_of(wrapped: Any) -> tuple[str, ...]:
    names, keys = getattr(wrapped, "names", None), getattr(wrapped, "keys", None)
    if isinstance(names, (tuple, list)):
        return tuple(names)
    return tuple(keys()) if callable(keys) else ()  # pyright: ignore[reportArgumentType]


def _unique(name: str, seen: set[str]) -> str:
    candidates = (name if i == 1 else f"{name}_{i}" for i in count(1))
    free = next(candidate for candidate in candidates if candidate not in seen)
    seen.add(free)
    return free


def _check_arguments(name: str, function: Callable[..., Any]) -> None:
    try:
        parameters = signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return
    try:
        parameters.bind("pred", "target")
    except TypeError as error:
        raise TypeError(
            f"The metric {name}{parameters} cannot be called with (pred, target): {error}. Give other arguments by "
            "functools.partial; call a function that makes a metric first, as in metrics=top_k_accuracy(5)."
        ) from error


def _check_not_a_class_or_name(thing: Any) -> None:
    if isinstance(thing, type):
        raise TypeError(f"{thing.__name__} is a class, expected an instance: add parentheses, {thing.__name__}(...).")
    if isinstance(thing, str):
        near = get_close_matches(thing, _OWN, n=1)
        hint = f"did you mean learnkit.metrics.{near[0]}, without quotes?" if near else "pass the function itself."
        raise TypeError(f"The metric {thing!r} is a string, expected a function or an object: {hint}")


_OWN = ("accuracy", "error_rate", "top_k_accuracy", "mean_squared_error", "mean_absolute_error", "RootMeanSquaredError")
