"""Everything together: {1, 2 ranks} × {float32, bfloat16, float16} × {accumulate 1, 3} × {clip, none} × {EMA, none} ×
{compiled, eager} × {resumed in the middle, not}: 192 cells, 144 of them in the quick form, each against one loop by
hand that knows whole batches only.
"""

import math
import os
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import EMA, Accumulate, Checkpoint, ClipGradients, MixedPrecision
from learnkit.data.order import permutation
from learnkit.distributed.request import SAVE

N, BATCH, EPOCHS, SEED, LR, NORM, DECAY = 31, 12, 2, 5, 0.3, 0.1, 0.8  # steps of 12, 12 and 7 samples
FULL = os.environ.get("RELIABILITY") == "full"  # without, half of the compiled cells
TOLERANCE = {"fp32": 2e-6, "bf16": 4e-3, "fp16": 5e-4}  # of weights around 1; bfloat16 has 8 bits, float16 11


class Cell(NamedTuple):
    precision: str
    n: int
    clip: bool
    ema: bool
    compiled: bool
    resumed: bool


CELLS = [
    Cell(*values)
    for values in product(("fp32", "bf16", "fp16"), (1, 3), (False, True), (False, True), (False, True), (False, True))
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def samples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N + 9, 6, generator=generator), torch.randint(3, (N + 9,), generator=generator)


def rate(k: int, n: int) -> float:
    """The documented cycle: cosine from LR / 25 at step 0 to LR at int(n × 0.3), and to LR / 25 / 1e4 at n − 1."""
    top, low, least = int(n * 0.3), LR / 25, LR / (25 * 25e4)
    if k <= top:
        return low + (LR - low) * (1 - math.cos(math.pi * k / top)) / 2
    return least + (LR - least) * (1 + math.cos(math.pi * (k - top) / (n - 1 - top))) / 2


def by_hand(precision: str, clip: bool, ema: bool):
    """(weights, average, losses, validation loss of what is evaluated) of a plain loop on one process, a batch a
    step.
    """
    model, (x, y), losses = net(), samples(), []
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    autocast = partial(
        torch.autocast, "cpu", {"fp16": torch.float16}.get(precision, torch.bfloat16), enabled=precision != "fp32"
    )
    average, n_steps, k = [p.detach().clone() for p in model.parameters()], EPOCHS * math.ceil(N / BATCH), 0
    for epoch in range(EPOCHS):
        for rows in permutation(N, SEED, epoch).split(BATCH):
            opt.param_groups[0]["lr"] = rate(k, n_steps)
            with autocast():
                loss = F.cross_entropy(model(x[rows]), y[rows])
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), NORM)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            losses.append(loss.item())
            average = [DECAY * a + (1 - DECAY) * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
            k += 1
    weights = [p.detach().clone() for p in model.parameters()]
    if ema:
        nn.utils.vector_to_parameters(torch.cat([a.flatten() for a in average]), model.parameters())
    with torch.no_grad(), autocast():
        valid = F.cross_entropy(model(x[N:]), y[N:]).item()
    return weights, average, losses, valid


class Killed(Exception):
    pass


class Kill(Callback):
    """Asks for a checkpoint after a batch in the second epoch, within a window where there are any, and dies at the
    next.
    """

    order = Accumulate.order - 1
    in_trials = False

    def before_batch(self, learn):
        if learn.training and learn.epoch == 1 and learn.batch_index == self.at + 1:
            raise Killed
        if learn.training and learn.epoch == 1 and learn.batch_index == self.at:
            learn.wanted = SAVE

    at = 1


def learner(cell: Cell, world_size: int, folder: str) -> Learner:
    x, y = samples()
    data = DataBunch.from_tensors(
        (x[:N], y[:N]), (x[N:], y[N:]), bs=BATCH // cell.n // world_size, drop_last=False, seed=SEED
    )
    callbacks = [
        *([Accumulate(cell.n)] if cell.n > 1 else []),
        *([ClipGradients(NORM)] if cell.clip else []),
        *([EMA(DECAY)] if cell.ema else []),
        *([Checkpoint(folder)] if cell.resumed else []),
    ]
    learn = Learner(
        data, net(), opt_func=partial(torch.optim.SGD, momentum=0.9), wd=0.0, metrics=accuracy, callbacks=callbacks
    )
    if cell.precision != "fp32":
        getattr(learn, f"to_{cell.precision}")()
    if cell.compiled:
        learn.compile(backend="eager")  # the whole of Dynamo; what comes after it changes no structure
    return learn.to_distributed() if world_size > 1 else learn


def run(cell: Cell, world_size: int, folder: str):
    learn = learner(cell, world_size, folder)
    fit = dict(epochs=EPOCHS, max_lr=LR, moms=None)
    if cell.resumed:
        with learn.no_logging(), pytest.raises(Killed):
            learn.fit_one_cycle(**fit, callbacks=[Kill()])
        learn = learner(cell, world_size, folder)
    with learn.no_logging():
        learn.fit_one_cycle(**fit, resume=cell.resumed)
    if cell.resumed:
        assert learn.resumed is not None and learn.resumed["n_held"] == (0 if cell.n == 1 else 2)
    average = next(
        (list(cb.average.values.values()) for cb in learn.callbacks if isinstance(cb, EMA) and cb.average), None
    )
    skips = next((cb.skips for cb in learn.callbacks if isinstance(cb, MixedPrecision)), [])
    return (
        [p.detach() for p in learn.model.parameters()],
        average,
        learn.recorder.losses,
        learn.values["valid_loss"],
        learn.step,
        skips,
    )


def check(cell: Cell, expected, result) -> None:
    weights, average, losses, valid = expected
    close = partial(torch.allclose, rtol=0, atol=TOLERANCE[cell.precision])
    assert result[4:] == (EPOCHS * 3, []), f"{cell}: {result[4:]}"
    for own, by_hand in zip(result[0], weights, strict=True):
        assert close(own, by_hand), f"{cell}: {(own - by_hand).abs().max()}"
    if cell.ema:
        for own, by_hand in zip(result[1], average, strict=True):
            assert close(own, by_hand), f"{cell}: the average"
    assert close(torch.tensor(result[2]), torch.tensor(losses)), f"{cell}: losses {result[2]}, expected {losses}"
    assert abs(result[3] - valid) <= TOLERANCE[cell.precision], f"{cell}: valid_loss {result[3]}, expected {valid}"


def run_all(cells: list[Cell], world_size: int, folder: str):
    results = []
    for i, cell in enumerate(cells):
        torch._dynamo.reset()
        results.append(run(cell, world_size, f"{folder}/{i}"))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_every_combination_equals_the_loop_by_hand(world_size, resumed, ranks, tmp_path: Path):
    cells = [cell for cell in CELLS if cell.resumed == resumed and (FULL or not cell.compiled or cell.clip == cell.ema)]
    expected = {key: by_hand(*key) for key in {(cell.precision, cell.clip, cell.ema) for cell in cells}}
    of_ranks = (
        [run_all(cells, 1, str(tmp_path))]
        if world_size == 1
        else ranks(2, run_all, cells, 2, str(tmp_path), timeout=200)
    )
    for results in of_ranks:
        for cell, result in zip(cells, results, strict=True):
            check(cell, expected[cell.precision, cell.clip, cell.ema], result)


def test_the_loops_by_hand_differ_from_one_another_by_more_than_the_tolerances():
    """The control: with what each of them leaves out, the checks would fail."""

    def furthest(a, b):
        return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))

    for precision, tolerance in TOLERANCE.items():
        plain, clipped = by_hand(precision, False, False), by_hand(precision, True, False)
        assert furthest(clipped[0], plain[0]) > 3 * tolerance
        assert furthest(plain[1], plain[0]) > 3 * tolerance
    assert furthest(by_hand("bf16", False, False)[0], by_hand("fp32", False, False)[0]) > 3 * TOLERANCE["fp32"]
