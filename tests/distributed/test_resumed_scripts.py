"""A script of several fits that always says resume=True: killed anywhere it is started again, and ends as one that was
never killed.
"""

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
from torch import nn

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import EMA, Checkpoint, EarlyStopping, ReduceLROnPlateau, StopAfter
from learnkit.distributed import get_world_size, is_main


def killed(root: Path, place: Any) -> Path:
    return root.with_name(f"{root.name} killed at {place}")


class Kill(Callback):
    """What a process would leave that is killed at these places, (fit, step) or (fit, "end"): a copy of the folders."""

    order = Checkpoint.order - 10

    def __init__(self, root: Path, places: list[tuple[int, Any]]) -> None:
        self.root, self.places = root, places

    def after_batch(self, learn: Learner) -> None:
        if learn.training:
            self.keep(learn, learn.step)

    def after_fit(self, learn: Learner) -> None:
        self.keep(learn, "end")

    def keep(self, learn: Learner, step: Any) -> None:
        if (place := (learn.n_fits, step)) in self.places and is_main():
            shutil.copytree(self.root, killed(self.root, place))


def learner(*callbacks: Callback) -> Learner:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 4, generator=g), torch.randint(3, (48,), generator=g)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3))
    data = DataBunch.from_tensors((x, y), (x[:9], y[:9]), bs=12 // get_world_size(), seed=2)  # 4 steps an epoch
    return Learner(
        data, model, metrics=accuracy, callbacks=callbacks, splitter=lambda model: list(model.children())
    ).to_distributed()


def seen(learn: Learner) -> tuple[Any, ...]:
    recorder = learn.recorder
    return (
        [p.tolist() for p in learn.model.parameters()],
        recorder.losses,
        recorder.values,
        learn.validate(),
        learn.epochs_trained,
        torch.get_rng_state().tolist(),
        [s.tolist() for kept in learn.opt.state_dict()["state"].values() for s in kept.values()],
    )


def own_callbacks(root: Path, kill: Callback, **options: Any) -> Iterator[Any]:
    """The first fit has a callback of its own, the second one others."""
    learn = learner(Checkpoint(root / "kept", every_n_steps=2), kill)
    with learn.no_logging():
        yield seen(learn.fit(2, 1e-2, callbacks=[ReduceLROnPlateau()], **options))
        yield seen(
            learn.fit_one_cycle(
                3, 1e-2, callbacks=[EarlyStopping(patience=2, min_delta=9.0), EMA(decay=0.5)], **options
            )
        )


def the_same_callback(root: Path, kill: Callback, **options: Any) -> Iterator[Any]:
    learn = learner(Checkpoint(root / "kept", every_n_steps=2), EarlyStopping(patience=9), kill)
    stop = StopAfter(steps=6)
    with learn.no_logging():
        yield seen(learn.fit(2, 1e-2, callbacks=[stop, EarlyStopping(patience=3)], **options))
        yield seen(learn.fit(3, 1e-2, callbacks=[stop], **options))


def thawed(root: Path, kill: Callback, **options: Any) -> Iterator[Any]:
    """Three fits, the callback of the third added for good, and a file of each."""
    learn = learner(Checkpoint(root / "kept", every_n_epochs=None, every_n_steps=3), kill)
    learn.path = root
    with learn.no_logging():
        yield seen(learn.freeze().fit_one_cycle(1, 1e-2, **options))
        learn.save("first")
        yield seen(learn.unfreeze().fit_one_cycle(1, slice(1e-3, 1e-2), **options))
        learn.add_callback(EarlyStopping(patience=2))
        yield seen(learn.fit(2, **options))
        yield [p.tolist() for p in learn.load("first").model.parameters()]


def another_model(root: Path, kill: Callback, **options: Any) -> Iterator[Any]:
    """Between two fits the head is replaced, and with it the optimizer."""
    learn = learner(Checkpoint(root / "kept", every_n_steps=2), kill)
    with learn.no_logging():
        yield seen(learn.fit(1, 1e-2, **options))
        torch.manual_seed(7)
        learn.model[2] = nn.Linear(5, 4)  # type: ignore[index]
        learn.opt, learn.opt_func = None, torch.optim.RMSprop  # type: ignore[assignment]
        yield seen(learn.fit(2, 1e-2, **options))


def two_folders(root: Path, kill: Callback, **options: Any) -> Iterator[Any]:
    learn = learner(kill)
    with learn.no_logging():
        yield seen(learn.fit(2, 1e-2, callbacks=[Checkpoint(root / "one", every_n_steps=2)], **options))
        yield seen(
            learn.fit(
                2, 1e-2, callbacks=[Checkpoint(root / "two", every_n_steps=2), EarlyStopping(patience=5)], **options
            )
        )


def one_folder_two_objects(root: Path, kill: Callback, **options: Any) -> Iterator[Any]:
    learn = learner(kill)
    with learn.no_logging():
        yield seen(learn.fit(2, 1e-2, callbacks=[Checkpoint(root / "one", every_n_steps=2)], **options))
        yield seen(
            learn.fit(
                2, 1e-2, callbacks=[Checkpoint(root / "one", every_n_steps=2), EarlyStopping(patience=5)], **options
            )
        )


SCRIPTS: dict[Callable[..., Iterator[Any]], list[tuple[int, Any]]] = {
    own_callbacks: [(1, 3), (1, 8), (1, "end"), (2, 1), (2, 2), (2, 7), (2, "end")],
    the_same_callback: [(1, 2), (1, 6), (1, "end"), (2, 1), (2, 4), (2, "end")],
    thawed: [(1, 3), (1, "end"), (2, 1), (2, 3), (2, "end"), (3, 1), (3, 6), (3, "end")],
    another_model: [(1, 2), (1, "end"), (2, 1), (2, 5), (2, "end")],
    two_folders: [(1, 2), (1, "end"), (2, 1), (2, 5), (2, "end")],
    one_folder_two_objects: [(1, 2), (1, "end"), (2, 1), (2, 5), (2, "end")],
}


def run_again(root: Path, script: Callable[..., Iterator[Any]]) -> list[Any]:
    """The kills after which what is resumed is not what was never killed; after the first one it is killed again, at
    the next place.
    """
    places, first, wrong = SCRIPTS[script], root / "whole", []
    whole = list(script(first, Kill(first, places), resume=True))
    for place, later in pairwise([*places, None]):
        for folder in (killed(first, place), killed(killed(first, place), later)):
            if later is None and folder != killed(first, place):
                continue
            torch.manual_seed(99)
            found = list(script(folder, Kill(folder, [later] if later else []), resume=True))
            if found != whole:
                wrong.append((folder.name, [a == b for a, b in zip(found, whole, strict=True)]))
    return wrong


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("n", [1, 2])
def test_a_script_started_again_ends_as_one_that_was_not_killed(ranks: Any, tmp_path: Path, n: int, script: Any):
    assert ranks(n, run_again, tmp_path, script, timeout=60) == [[]] * n
