"""What may be called before, amid and after a fit, and must leave no trace."""

from __future__ import annotations

from typing import Any

import torch

from learnkit import Callback, Learner
from tests.fuzz.part import Part, part
from tests.fuzz.sources import samples

# amid        may be called from a hook of a fit
# valid       needs a valid_dl
# whole       loads and saves: not amid
BETWEEN: dict[str, Part] = {
    "validate": part("learn.validate()", "amid", "valid"),
    "get_preds": part("learn.get_preds(with_loss=True)", "amid", "valid"),
    "get_preds of train_dl": part("learn.get_preds(learn.data.train_dl)", "train"),
    "predict": part("learn.predict(sample)", "amid"),
    "lr_find": part("learn.lr_find(num_it=3)", "optimizes"),
    "fast_run": part("learn.fast_run()", "optimizes"),
    "overfit_batches": part("learn.overfit_batches(1, steps=2)", "optimizes"),
    "save": part("learn.save('kept')", "amid"),
    "save and load": part("learn.load(learn.save('again').stem)"),
    "summary": part("learn.summary()"),
    "one_batch": part("learn.data.one_batch()"),
    "hooks": part("learn.hooks()", "amid"),
    "no_logging": part("learn.no_bar()", "amid"),
    "freeze and unfreeze": part("learn.unfreeze()", "freezes"),
}


class Amid(Callback):
    """Calls something at a hook when `step` steps are done."""

    order = 120
    in_trials = False

    def __init__(self, name: str, call: Any, step: int) -> None:
        self.name, self.call, self.step = name, call, step

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step == self.step:
            self.call(learn)


def one_sample(form: str, dtype: torch.dtype, names: tuple[str, ...]) -> Any:
    """Inputs of a batch of one, as the training data's."""
    *inputs, _ = samples(1, form, dtype)
    if names:
        return dict(zip(names, inputs, strict=False))
    return tuple(inputs) if len(inputs) > 1 else inputs[0]
