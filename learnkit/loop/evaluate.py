"""A pass without gradients, and what it gathers: the loss and metrics (`Measure`), or the predictions (`Collect`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learnkit.data.batch import count_samples, prediction
from learnkit.data.loaders import check_loader, in_order
from learnkit.data.order import private, private_order
from learnkit.devices.nested import copied, describe
from learnkit.devices.ranks import Ranks
from learnkit.devices.transfer import Reading
from learnkit.loop.session import session
from learnkit.metrics import Mean, Metric, read_values

if TYPE_CHECKING:
    from learnkit.learner import Learner

OF_A_PASS = (
    "dl",
    "batch_index",
    "training",
    "inputs",
    "target",
    "pred",
    "loss",
    "_loss_of",
    "meter",
    "_passes_target",
    "_first_target",
    "_evaluated",
)
PINNED = (
    1 << 26
    # bytes of the largest tensor that is copied through pinned memory, which torch never frees: a larger one takes 3 ms
    # and
)
# more by itself (25 GB/s), compared with which a wait is little


def evaluate(learn: Learner, dl: Any, meter: Measure | Collect) -> None:
    """One pass without gradients over `dl`, also in the middle of a fit, whose place is kept."""
    if not learn.is_running:
        with session(learn, dls=(dl,)):
            return evaluate(learn, dl, meter)
    kept = {name: getattr(learn, name) for name in OF_A_PASS}
    modes = [(module, module.training) for module in learn.model.modules()]
    learn.dl, learn.meter, learn.training, learn.batch_index, learn._evaluated = (
        private(in_order(dl)),
        meter,
        False,
        -1,
        dl,
    )
    learn.model.eval()
    try:
        with private_order(learn.dl):
            learn.stages.validate()
    finally:
        for module, mode in modes:
            module.training = mode
        for name, value in kept.items():
            setattr(learn, name, value)


def evaluation_loader(learn: Learner, dl: Any, caller: str) -> Any:
    if dl is None:
        dl = learn.data.valid_dl
    if dl is None:
        raise ValueError(f"{caller}() has no data: the DataBunch has no valid_dl. Give one, or call {caller}(dl).")
    check_loader(dl, "dl")
    return dl


class Measure:
    """The loss, averaged over samples, and every metric.

    On several ranks sums are added up, in one collective; metrics that keep no sums see all ranks' batches at the end.
    """

    everywhere = False  # each rank sees its share

    def __init__(self, metrics: Sequence[Metric], world_size: int = 1) -> None:
        self.loss, self.metrics = Mean(), metrics
        self.direct = [metric for metric in metrics if metric.summable or world_size == 1]
        self.later = [metric for metric in metrics if metric not in self.direct]
        self.keeps = bool(self.later) or any(metric.keeps for metric in metrics)  # predictions, beyond their batch
        self.rows: list[tuple[Any, ...]] = []  # (pred, target) of each batch, for the later ones
        for metric in metrics:
            metric.reset()

    def update(self, inputs: Any, target: Any, output: Any, loss: Tensor | None) -> None:
        n = count_samples(inputs, target)
        if loss is not None:
            self.loss.add(loss, n)
        if self.metrics:
            pred = prediction(output)
            own = copied(pred) if self.keeps else None
            for metric in self.direct:
                metric.update(own if metric.keeps else pred, target, n)
            if self.later:
                self.rows.append((detached(own), detached(target)))

    def results(self, ranks: Ranks) -> dict[str, float]:
        """{"valid_loss": …, metric: …} over all ranks, by one read from the device."""
        summable = [metric for metric in self.direct if metric.summable]
        loss, *sums = ranks.all_sum([self.loss.state(), *(metric.sums() for metric in summable)])
        self.loss.load_state(loss)
        for metric, total in zip(summable, sums, strict=True):
            metric.load_sums(total)
        if self.later:
            self.see_later(ranks.batches_in_order(self.rows))
        values: dict[str, Any] = {"valid_loss": self.loss.compute()}
        for metric in self.metrics:
            values.update(metric.compute())
        return read_values(values)

    def see_later(self, rows: list[tuple[Any, ...]]) -> None:
        for metric in self.later:
            for pred, target in rows:
                metric.update(pred, target, count_samples(pred, target))


class Collect:
    """Predictions and targets (and each sample's loss), batch by batch on the CPU, joined at the end.

    A batch's are copied there while the device works on the next one. `everywhere`: each rank sees all batches, and
    keeps its own predictions.
    """

    def __init__(self, loss_func: Any = None, *, everywhere: bool = False) -> None:
        self.loss_func, self.everywhere = loss_func, everywhere
        self.rows: list[tuple[Any, ...]] = []  # all batches' but the last one's
        self.last: tuple[Any, ...] | None = None  # which is on its way

    def update(self, inputs: Any, target: Any, output: Any, loss: Tensor | None) -> None:
        pred = prediction(output)
        losses = () if self.loss_func is None else (self.loss_func(pred, target),)
        coming = (to_cpu(pred, copy=True), to_cpu(target), *(to_cpu(value, copy=True) for value in losses))
        self.add_last()
        self.last = coming

    def add_last(self) -> None:
        last, self.last = self.last, None
        if last is None:
            return
        for reading in readings_in(last)[-1:]:
            wait_for_reading(reading)  # the others have come before it
        self.rows.append(arrived(last))

    def results(self, ranks: Ranks) -> dict[str, float]:
        self.add_last()
        if not self.everywhere:
            self.rows = ranks.batches_in_order(self.rows)
        return {}

    def joined(self) -> tuple[Any, ...]:
        """(preds, targets[, losses]), each with one row a sample."""
        return (
            tuple(concatenated([row[i] for row in self.rows]) for i in range(len(self.rows[0])))
            if self.rows
            else (None, None)
        )


def detached(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: detached(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(detached(v) for v in value)
    return value.detach() if isinstance(value, Tensor) else value


def to_cpu(value: Any, *, copy: bool = False) -> Any:
    """A nested structure of tensors on their way to the CPU, for `arrived`: the predictions of a data set may not fit
    on the device. `copy`: in memory of its own, where it is on the CPU already.
    """
    if isinstance(value, Mapping):
        return {k: to_cpu(v, copy=copy) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(to_cpu(v, copy=copy) for v in value)
    if not isinstance(value, Tensor):
        return value
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.is_cpu
    return Reading(value) if is_plain and value.nbytes <= PINNED else value.detach().to("cpu", copy=copy)


def arrived(value: Any) -> Any:
    """What `to_cpu` gave, with tensors in ordinary memory; waits for those that are not there yet."""
    if isinstance(value, Mapping):
        return {k: arrived(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(arrived, value))
    if not isinstance(value, Reading):
        return value
    wait_for_reading(value)
    return (
        value.values if value.event is None else value.values.clone()
    )  # pinned memory is short, and goes back to torch


def readings_in(value: Any) -> list[Reading]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return [reading for part in value for reading in readings_in(part)]
    return [value] if isinstance(value, Reading) else []


def wait_for_reading(reading: Reading) -> None:
    if reading.event is not None and not reading.event.query():
        reading.event.synchronize()


def concatenated(values: list[Any]) -> Any:
    """Batches of tensors, or of tuples or mappings of tensors, concatenated along the first dimension."""
    first = values[0]
    if isinstance(first, Mapping):
        return {k: concatenated([v[k] for v in values]) for k in first}
    if isinstance(first, tuple):
        return tuple(concatenated(list(part)) for part in zip(*values, strict=True))
    if not isinstance(first, Tensor):
        return None if first is None else values
    if len({v.shape[1:] for v in values}) > 1:
        shapes = sorted({describe(v) for v in values})
        raise ValueError(
            f"get_preds cannot join batches of different shapes ({', '.join(shapes[:4])}): only the first "
            "dimension may differ. Pad them to one shape in collate_fn."
        )
    return torch.cat(values) if first.ndim else torch.stack(values)
