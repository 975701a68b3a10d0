"""Watching one value for its best, for the callbacks that decide by it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learnkit.learner import Learner

# Words of a name whose values are to fall; of all others they are to rise.
SMALLER_IS_BETTER = re.compile(
    r"loss|error|perplexity|divergence|(?<![a-z])(mse|mae|rmse|mape|nll|wer|cer|fid|ece|bpb)(?![a-z])"
)


class Monitor:
    """The best value so far of `name` in learn.values, which may also be called valid_… or val_….

    `mode`: "min", "max", or None, which infers it from the name; `str(monitor)` says which it is.
    """

    def __init__(self, name: str, mode: str | None = None, min_delta: float = 0.0) -> None:
        if mode not in (None, "min", "max"):
            raise ValueError(f"mode={mode!r}: expected 'min', 'max' or None.")
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"min_delta={min_delta}: expected a finite number, 0 or more.")
        self.name, self.min_delta = name, min_delta
        self.mode = mode or ("min" if SMALLER_IS_BETTER.search(name.lower()) else "max")
        self.best: float | None = None

    def start(self, learn: Learner) -> None:
        """Begin anew; refuse a name that this fit will not measure."""
        self.best = None
        found = as_measured(self.name, learn.value_names)
        if found is None:
            near = difflib.get_close_matches(self.name, learn.value_names, n=1)
            raise ValueError(
                f"there is no value {self.name!r} to monitor{f': did you mean {near[0]}?' if near else '.'} "
                f"This fit measures {', '.join(learn.value_names)}"
                f"{'; there is no validation data' if learn.data.valid_dl is None else ''}."
            )
        self.name = found

    def is_measured(self, learn: Learner) -> bool:
        """Whether this epoch has the value: not where StopEpoch left it before it was measured."""
        return self.name in learn.values

    def improved(self, learn: Learner) -> bool:
        """Whether the value just measured is better than the best by more than min_delta; if so, it is the best now."""
        value = learn.values[self.name]
        if math.isnan(value):
            return False
        gain = math.inf if self.best is None else (self.best - value if self.mode == "min" else value - self.best)
        if gain > self.min_delta:
            self.best = value
            return True
        return False

    def __str__(self) -> str:
        return f"{self.name}, which is to {'fall' if self.mode == 'min' else 'rise'}"


def as_measured(name: str, measured: Sequence[str]) -> str | None:
    """What a fit calls `name`: itself, or valid_loss for val_loss, or accuracy for valid_accuracy and val_accuracy."""
    bare = re.sub(r"^val(id)?_", "", name)
    return next((candidate for candidate in (name, f"valid_{bare}", bare) if candidate in measured), None)
