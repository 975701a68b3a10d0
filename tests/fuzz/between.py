"""What may be called before, amid and after a fit, and must leave no trace."""

from __future__ import annotations

from typing import Any

from learnkit import Callback, Learner
from tests.fuzz.part import Part, part

# amid        may be called from a hook of a fit
# valid       needs a valid_dl
# whole       loads and saves: not amid
BETWEEN: dict[str, Part] = {
    "validate": part("learn.validate()", "amid", "valid"),
    "get_preds": part("learn.get_preds(with_loss=True)", "amid", "valid"),
    "get_preds of train_dl": part("learn.get_preds(learn.data.train_dl)", "train"),
    "predict": part("learn.predict(sample(learn))", "amid"),
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


def sample(learn: Learner) -> Any:
    """One sample of the training data's kind."""
    from learnkit.batch import split_batch

    first = split_batch(next(iter(learn.data.train_dl)))[0]
    if isinstance(first, dict):
        return {name: value[:1] for name, value in first.items()}
    return tuple(value[:1] for value in first) if len(first) > 1 else first[0][:1]
