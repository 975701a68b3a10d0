"""A signal in the very step that ends a fit, a training pass or an epoch: what is resumed ends as what never got the
signal.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
from torch import nn

from learnkit import Callback, DataBunch, Learner, StopEpoch, StopFit, StopTrain
from learnkit.callbacks import Checkpoint, EarlyStopping, StopAfter
from learnkit.distributed import get_rank, get_world_size

PER_EPOCH = 6  # steps, on one rank and on two


class Signal(Callback):
    """Gets a signal on some ranks in a step, or in the validation of the epoch of that number, below 0."""

    def __init__(self, number: int, step: int, *ranks: int) -> None:
        self.number, self.step, self.ranks = number, step, ranks

    def after_step(self, learn: Learner) -> None:
        if learn.step == self.step:
            self.send()

    def before_validate(self, learn: Learner) -> None:
        if learn.epoch + 1 == -self.step:
            self.send()

    def send(self) -> None:
        if get_rank() in self.ranks:
            os.kill(os.getpid(), self.number)


class Raises(Callback):
    """Raises in a hook at a step, or in each epoch at so many steps."""

    def __init__(self, hook: str, error: type[Exception], step: int, *ranks: int) -> None:
        self.hook, self.error, self.step, self.ranks = hook, error, step, ranks or (0, 1)

    def see(self, hook: str, learn: Learner) -> None:
        step = learn.step if self.error is StopFit else learn.step - learn.epoch * self.step
        if learn.training and hook == self.hook and step == self.step and get_rank() in self.ranks:
            raise self.error

    def after_step(self, learn: Learner) -> None:
        self.see("after_step", learn)

    def after_batch(self, learn: Learner) -> None:
        self.see("after_batch", learn)


def learner(folder: Path, *callbacks: Callback) -> Learner:
    n = get_world_size()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12 * PER_EPOCH, 4, generator=g), torch.randint(3, (12 * PER_EPOCH,), generator=g)
    torch.manual_seed(1)
    data = DataBunch.from_tensors((x, y), (x[:10], y[:10]), bs=12 // n, seed=2)
    return Learner(
        data,
        nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3)),
        callbacks=[Checkpoint(folder), *callbacks],
        seed=3,
    ).to_distributed()


def state(learn: Learner) -> tuple[Any, ...]:
    recorder = learn.recorder
    return (
        [p.tolist() for p in learn.model.parameters()],
        recorder.losses,
        repr(recorder.values),
        recorder.ends,
        learn.step,
    )


def outcome(
    folder: Path, make: Callable[[], list[Callback]], limit: int | None, *signals: Signal, resume: bool = False
) -> Any:
    """What a fit ends with; its exit code where a signal ends it."""
    learn = learner(folder, *make(), *signals)
    try:
        with learn.no_logging():
            learn.fit_one_cycle(3, 1e-2, max_steps=limit, resume=resume)
    except SystemExit as ended:
        return ended.code
    return state(learn)


CASES: dict[
    str, tuple[Callable[[], list[Callback]], int | None, int, int]
] = {  # callbacks, max_steps, the signal's step, all steps
    "at the last of max_steps": (list, 8, 8, 8),
    "a step before it": (list, 8, 7, 8),
    "max_steps at an epoch's end": (list, 12, 12, 12),
    "the last step of an epoch": (list, None, 6, 18),
    "the last step of the last epoch": (list, None, 18, 18),
    "in a validation": (list, 6, -1, 6),
    "StopAfter": (lambda: [StopAfter(steps=8)], None, 8, 8),
    "StopFit in after_step": (lambda: [Raises("after_step", StopFit, 8)], None, 8, 8),
    "StopFit in after_batch": (lambda: [Raises("after_batch", StopFit, 8)], None, 8, 8),
    "StopTrain": (lambda: [Raises("after_batch", StopTrain, 4)], None, 8, 12),
    "StopEpoch": (lambda: [Raises("after_batch", StopEpoch, 4)], None, 8, 12),
    "the last StopEpoch": (lambda: [Raises("after_batch", StopEpoch, 4)], None, 12, 12),
    "EarlyStopping": (lambda: [EarlyStopping(patience=1, min_delta=9.0)], None, -2, 12),
}


def run_all(root: Path, names: list[str], number: int, ranks: tuple[int, ...]) -> list[tuple[str, Any]]:
    """The cases that went wrong."""
    wrong: list[tuple[str, Any]] = []
    for name in names:
        make, limit, step, n_steps = CASES[name]
        folder = root / name
        plain = outcome(folder / "plain", make, limit)
        if plain[-1] != n_steps:
            wrong.append((name, plain[-1]))
        first = outcome(folder / "kept", make, limit, Signal(number, step, *ranks))
        if first != (plain if number == signal.SIGUSR1 else 128 + number):
            wrong.append((name, first))
        for _ in range(2):  # resumed, and resumed when it is finished
            again = outcome(folder / "kept", make, limit, Signal(number, 99), resume=True)
            if again != plain:
                wrong.append((name, again))
    return wrong


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("n", "chosen"), [(1, (0,)), (2, (0, 1)), (2, (1,))])
def test_resumed_after_a_signal_at_an_end(ranks: Any, tmp_path: Path, n: int, chosen: tuple[int, ...], number: int):
    assert ranks(n, run_all, tmp_path, list(CASES), number, chosen, timeout=120) == [[]] * n
