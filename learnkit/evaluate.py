"""What a pass without gradients gathers: the loss and metrics (`Measure`), or the predictions (`Collect`)."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from learnkit.batch import count_samples, describe, prediction
from learnkit.metrics import Mean, Metric, read


class Measure:
    """The loss, averaged over samples, and every metric."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.loss, self.metrics = Mean(), metrics
        for metric in metrics: metric.reset()

    def update(self, inputs: Any, target: Any, output: Any, loss: Tensor | None) -> None:
        n = count_samples(inputs, target)
        if loss is not None: self.loss.add(loss, n)
        if self.metrics:
            pred = prediction(output)
            for metric in self.metrics: metric.update(pred, target, n)

    def results(self) -> dict[str, float]:
        """{"valid_loss": …, metric: …}, by one read from the device."""
        values: dict[str, Any] = {"valid_loss": self.loss.compute()}
        for metric in self.metrics: values.update(metric.compute())
        return read(values)


class Collect:
    """Predictions and targets (and each sample's loss), batch by batch on the CPU, joined at the end."""

    def __init__(self, loss_func: Any = None) -> None:
        self.loss_func = loss_func
        self.rows: list[tuple[Any, ...]] = []

    def update(self, inputs: Any, target: Any, output: Any, loss: Tensor | None) -> None:
        pred = prediction(output)
        row = (pred, target) if self.loss_func is None else (pred, target, self.loss_func(pred, target))
        self.rows.append(tuple(to_cpu(value) for value in row))

    def results(self) -> dict[str, float]: return {}

    def joined(self) -> tuple[Any, ...]:
        """(preds, targets[, losses]), each with one row a sample."""
        return tuple(join([row[i] for row in self.rows]) for i in range(len(self.rows[0]))) if self.rows else (None, None)


def to_cpu(value: Any) -> Any:
    """A nested structure of tensors on the CPU; reads the device: the predictions of a data set may not fit on it."""
    if isinstance(value, Tensor): return value.detach().cpu()
    if isinstance(value, Mapping): return {k: to_cpu(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)): return tuple(to_cpu(v) for v in value)
    return value


def join(values: list[Any]) -> Any:
    """Batches of tensors, or of tuples or mappings of tensors, concatenated along the first dimension."""
    first = values[0]
    if isinstance(first, Mapping): return {k: join([v[k] for v in values]) for k in first}
    if isinstance(first, tuple): return tuple(join(list(part)) for part in zip(*values, strict=True))
    if not isinstance(first, Tensor): return None if first is None else values
    if len({v.shape[1:] for v in values}) > 1:
        shapes = sorted({describe(v) for v in values})
        raise ValueError(f"get_preds cannot join batches of different shapes ({', '.join(shapes[:4])}): only the first "
                         "dimension may differ. Pad them to one shape in collate_fn.")
    return torch.cat(values) if first.ndim else torch.stack(values)
