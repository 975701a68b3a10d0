"""Definitions shared by the writer and the reader of exported files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from learnkit.data.batch import prediction

EXPORT_FORMAT = 1
ABOUT = "learnkit.json"  # the name of a file's description


class Predicts(nn.Module):
    """The model as a function of tensors by position; it returns what metrics use of the output."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *inputs: Tensor) -> Any:
        return prediction(
            self.model(**dict(zip(self.names, inputs, strict=True))) if self.names else self.model(*inputs)
        )
