"""What the writer of exported files and their reader agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from learnkit.data.batch import prediction

EXPORT_FORMAT = 1
ABOUT = "learnkit.json"  # the name under which a file says what it is


class Predicts(nn.Module):
    """The model as a function of tensors by position, which gives what metrics see of its output."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *inputs: Tensor) -> Any:
        return prediction(
            self.model(**dict(zip(self.names, inputs, strict=True))) if self.names else self.model(*inputs)
        )
