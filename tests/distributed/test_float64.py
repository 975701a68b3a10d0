"""Losses of a float64 model are float64 on any number of ranks: of numbers that float64 holds exactly, equal to the
last bit.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from learnkit import DataBunch, Learner
from learnkit.callbacks import Accumulate, Checkpoint, JSONLogger
from learnkit.distributed import get_world_size


def exact() -> tuple[Tensor, Tensor]:
    """Whole numbers so small that two steps at a rate of 1/4 and the losses' sums are exact in float64, and so large
    that in float32 not.
    """
    g = torch.Generator().manual_seed(0)
    return torch.randint(-2, 3, (16, 3), generator=g).double(), torch.randint(
        -4095, 4096, (16, 1), generator=g
    ).double()


def counted(inputs: Any, target: Tensor) -> Tensor:
    return torch.tensor(len(target))


def fitted(folder: Path, *, window: int) -> list[Any]:
    n = get_world_size()
    model = nn.Linear(3, 1).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    callbacks = [
        JSONLogger(folder / f"{n}.jsonl", every_n_steps=1),
        Checkpoint(folder / str(n), every_n_steps=1),
        *([Accumulate(window, count=counted)] if window > 1 else []),
    ]
    learn = Learner(
        DataBunch.from_tensors(exact(), exact(), bs=8 // n // window),
        model,
        loss_func=F.mse_loss,
        opt_func=partial(SGD, fused=False),
        wd=0.0,
        seed=0,
        callbacks=callbacks,
    )
    with learn.to_distributed().no_logging():
        learn.fit(1, 1 / 4)
    rows = [json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()]
    return [
        learn.recorder.losses,
        learn.recorder.values,
        learn.validate(),
        [row["loss"] for row in rows if "loss" in row],
        [p.tolist() for p in model.parameters()],
    ]


@pytest.mark.parametrize("window", [1, 2])
def test_one_two_and_four_ranks_have_equal_losses_and_weights(ranks: Any, tmp_path: Path, window: int):
    alone = fitted(tmp_path, window=window)
    assert alone[0] != torch.tensor(alone[0]).float().tolist()
    for n in (2, 4):
        assert ranks(n, partial(fitted, window=window), tmp_path) == [alone] * n
