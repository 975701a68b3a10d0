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
    "no_bar": part("learn.no_bar()", "amid"),
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


# Of a Learner's public methods, what no table has, and why.
NOT_DRAWN = {
    "add_callback": "takes a callback, as Learner(callbacks=…) does",
    "remove_callback": "takes one away: no trace to be seen",
    "on": "makes a function a callback: tests/test_on.py",
    "interpret": "of pictures' folders: tests/vision/test_interpretation.py, and get_preds, of which it is made, is "
    "drawn",
    "tta": "of pictures' transforms: tests/vision/test_transform.py",
    "no_logging": "every fit of a draw is in one",
    "plan_steps": "called by every fit",
    "where": "a text",
    "to_fp32": "takes a precision away again",
    "deterministic": "torch's switch: tests/test_learner.py",
    "batch_size_find": "minutes of doubling batches: tests/test_batch_size.py; its trial is the one of fast_run",
    "unfreeze": "drawn as fine_tune",
    "freeze": "drawn as fine_tune",
    "freeze_to": "drawn as fine_tune and GradualUnfreezing",
    "export": "a file of the model: tests/test_export.py",
}
