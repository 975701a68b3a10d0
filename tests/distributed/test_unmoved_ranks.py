"""On several ranks too what only looks leaves no trace in the global generators."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
from torch import nn
from torch.utils.data import Dataset

from learnkit import DataBunch, Learner
from learnkit.distributed import get_rank


class Drawn(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Any:
        return torch.rand(4) + random.random() + np.random.rand(), i % 3


def moved() -> list[str]:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(get_rank())
    learn = Learner(DataBunch.create(Drawn(), Drawn(), bs=4, num_workers=0), nn.Linear(4, 3)).to_distributed()
    looks = {
        "validate": learn.validate,
        "get_preds": learn.get_preds,
        "predict": lambda: learn.predict(torch.ones(4)),
        "one_batch": learn.data.one_batch,
        "summary": learn.summary,
        "fast_run": learn.fast_run,
        "lr_find": lambda: learn.lr_find(num_it=3),
        "overfit_batches": lambda: learn.overfit_batches(steps=2),
    }

    def state() -> str:
        return repr(
            (
                torch.get_rng_state().tolist(),
                random.getstate(),
                [np.asarray(part).tolist() for part in np.random.get_state()],
            )
        )

    wrong = []
    for name, look in looks.items():
        before = state()
        look()
        if state() != before:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("n", [2, 3])
def test_no_trace(ranks: Any, n: int):
    assert ranks(n, moved) == [[]] * n
