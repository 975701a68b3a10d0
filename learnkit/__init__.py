"""learnkit: a Learner that trains PyTorch models with one cycle, through a pipeline of callbacks."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from learnkit.data.loaders import DataBunch as DataBunch
    from learnkit.data.loaders import TensorLoader as TensorLoader
    from learnkit.export.predictor import load_learner as load_learner
    from learnkit.hooks import Callback as Callback
    from learnkit.hooks import SkipBackward as SkipBackward
    from learnkit.hooks import SkipBatch as SkipBatch
    from learnkit.hooks import SkipEpoch as SkipEpoch
    from learnkit.hooks import SkipFit as SkipFit
    from learnkit.hooks import SkipForward as SkipForward
    from learnkit.hooks import SkipStep as SkipStep
    from learnkit.hooks import SkipTrain as SkipTrain
    from learnkit.hooks import SkipValidate as SkipValidate
    from learnkit.hooks import StopBackward as StopBackward
    from learnkit.hooks import StopBatch as StopBatch
    from learnkit.hooks import StopEpoch as StopEpoch
    from learnkit.hooks import StopFit as StopFit
    from learnkit.hooks import StopForward as StopForward
    from learnkit.hooks import StopStep as StopStep
    from learnkit.hooks import StopTrain as StopTrain
    from learnkit.hooks import StopValidate as StopValidate
    from learnkit.learner import Learner as Learner
    from learnkit.metrics import accuracy as accuracy
    from learnkit.metrics import error_rate as error_rate
    from learnkit.metrics import mean_absolute_error as mean_absolute_error
    from learnkit.metrics import mean_squared_error as mean_squared_error
    from learnkit.metrics import top_k_accuracy as top_k_accuracy
    from learnkit.optim.combined import Together as Together

__version__ = "0.1.0.dev0"

# Each is imported when it is first used, so that `import learnkit` costs next to nothing.
HOMES = {
    "DataBunch": "learnkit.data.loaders",
    "TensorLoader": "learnkit.data.loaders",
    "load_learner": "learnkit.export.predictor",
    "Callback": "learnkit.hooks",
    "SkipBackward": "learnkit.hooks",
    "SkipBatch": "learnkit.hooks",
    "SkipEpoch": "learnkit.hooks",
    "SkipFit": "learnkit.hooks",
    "SkipForward": "learnkit.hooks",
    "SkipStep": "learnkit.hooks",
    "SkipTrain": "learnkit.hooks",
    "SkipValidate": "learnkit.hooks",
    "StopBackward": "learnkit.hooks",
    "StopBatch": "learnkit.hooks",
    "StopEpoch": "learnkit.hooks",
    "StopFit": "learnkit.hooks",
    "StopForward": "learnkit.hooks",
    "StopStep": "learnkit.hooks",
    "StopTrain": "learnkit.hooks",
    "StopValidate": "learnkit.hooks",
    "Learner": "learnkit.learner",
    "accuracy": "learnkit.metrics",
    "error_rate": "learnkit.metrics",
    "mean_absolute_error": "learnkit.metrics",
    "mean_squared_error": "learnkit.metrics",
    "top_k_accuracy": "learnkit.metrics",
    "Together": "learnkit.optim.combined",
}
__all__ = [*HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # a type checker knows the names from the imports above

    def __getattr__(name: str) -> Any:
        if name in HOMES:
            value = getattr(importlib.import_module(HOMES[name]), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            value = importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
