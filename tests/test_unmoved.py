"""What only looks leaves no trace in the global generators of Python, numpy and torch, whatever the data and the model
draw from them.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.vision import ImageDataBunch, interpret, tta


def draw() -> float:
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


class Drawn(Dataset[Any]):
    """Pictures with noise from all three generators."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        return torch.full((3, 8, 8), i / 24) + draw(), i % 3


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        for i in range(24):
            yield Drawn()[i]


class Model(nn.Module):
    """Draws in evaluation mode too."""

    def __init__(self, *, draws: bool = True) -> None:
        super().__init__()
        self.layer, self.draws = nn.Linear(3 * 8 * 8, 3), draws

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)) + (draw() if self.draws else 0.0)


SOURCES: dict[str, Callable[[], Any]] = {
    "DataBunch.create": lambda: DataBunch.create(Drawn(), Drawn(), bs=8, num_workers=0),
    "DataLoader": lambda: DataBunch(DataLoader(Drawn(), 8, shuffle=True), DataLoader(Drawn(), 8)),
    "own generator": lambda: DataBunch(
        DataLoader(Drawn(), 8, shuffle=True, generator=torch.Generator().manual_seed(1)), DataLoader(Drawn(), 8)
    ),
    "IterableDataset": lambda: DataBunch(DataLoader(Stream(), 8), DataLoader(Stream(), 8)),
    "a transform": lambda: DataBunch.from_tensors(
        (torch.rand(24, 3, 8, 8), torch.arange(24) % 3),
        (torch.rand(24, 3, 8, 8), torch.arange(24) % 3),
        bs=8,
        batch_tfms=lambda x: x + draw(),
    ),
    "pictures": lambda: ImageDataBunch.create(Drawn(), Drawn(), bs=8, num_workers=0),
}


def learner(source: str, *, draws: bool = True) -> Learner:
    return Learner(SOURCES[source](), Model(draws=draws), metrics=accuracy)


LOOKS: dict[str, Callable[[Learner], Any]] = {
    "validate": lambda learn: learn.validate(),
    "validate the training data": lambda learn: learn.validate(learn.data.train_dl),
    "get_preds": lambda learn: learn.get_preds(with_loss=True),
    "predict": lambda learn: learn.predict(torch.rand(3, 8, 8)),
    "one_batch": lambda learn: learn.data.one_batch(),
    "summary": lambda learn: learn.summary(),
    "lr_find": lambda learn: learn.lr_find(num_it=4),
    "fast_run": lambda learn: learn.fast_run(),
    "overfit_batches": lambda learn: learn.overfit_batches(steps=2),
    "batch_size_find": lambda learn: learn.batch_size_find(8),
    "interpret": lambda learn: interpret(learn).plot_top_losses(2),
    "save": lambda learn: learn.save("here"),
    "hooks": lambda learn: str(learn.hooks()),
}


def states(learn: Learner) -> list[Any]:
    own = learn.data.train_dl.generator if isinstance(learn.data.train_dl, DataLoader) else None
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        None if own is None or type(own) is not torch.Generator else own.get_state().tolist(),
    ]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("source", SOURCES)
def test_no_trace(source: str, look: str, tmp_path: Path):
    learn = learner(source)
    learn.path = tmp_path
    given = torch.rand(3, 8, 8)  # before the states are taken
    before = states(learn)
    learn.predict(given) if look == "predict" else LOOKS[look](learn)
    assert states(learn) == before


@pytest.mark.parametrize("suffix", ["safetensors", "pt2"])
def test_no_trace_of_an_export(suffix: str, tmp_path: Path):
    learn = learner("DataBunch.create", draws=False)
    before = states(learn)
    learn.export(tmp_path / f"model.{suffix}")
    assert states(learn) == before


def test_no_trace_of_pictures_that_are_shown():
    learn = learner("pictures")
    before = states(learn)
    learn.data.show_batch()
    assert states(learn) == before
    learn = learner("a transform")
    before = states(learn)
    tta(learn, tfms=[lambda x: x + draw()], n=2)
    assert states(learn) == before


def test_an_evaluation_within_a_fit_does_not_change_it():
    class Looks(Callback):
        def after_step(self, learn: Learner) -> None:
            learn.validate(), learn.predict(torch.ones(3, 8, 8)), learn.get_preds()

    weights = []
    for callbacks in ([], [Looks()]):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        weights.append(learner("DataLoader").fit(2, callbacks=callbacks).model.layer.weight)
    assert torch.equal(*weights)
