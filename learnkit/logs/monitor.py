"""Monitor the best value of a metric, for callbacks that make decisions based on it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learnkit.learner import Learner

# Values with one of these words in their name are minimized; all others are maximized.
SMALLER_IS_BETTER = re.compile(
    r"loss|error|perplexity|divergence|(?<![a-z])(mse|mae|rmse|mape|nll|wer|cer|fid|ece|bpb)(?![a-z])"
)


class Monitor:
    """The best value so far of `name` in learn.values. The name may also be valid_… or val_….

    Args:
        name: name of the value
        mode: "min", "max", or None to infer it from the name; `str(monitor)` shows the result
        min_delta: smallest change that counts as an improvement
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
        """Start again; raise ValueError for a name that this fit does not measure."""
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
        """Return whether this epoch has the value: not if StopEpoch ended it before it was measured."""
        return self.name in learn.values

    def improved(self, learn: Learner) -> bool:
        """Return whether the last value is better than the best by more than min_delta; if so, it becomes the best."""
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
    """Return the fit's name for `name`.

    This is `name` itself, valid_loss for val_loss, or accuracy for valid_accuracy and val_accuracy.
    """
    bare = re.sub(r"^val(id)?_", "", name)
    return next((candidate for candidate in (name, f"valid_{bare}", bare) if candidate in measured), None)
