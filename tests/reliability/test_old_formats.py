"""Checkpoints that former versions wrote keep loading: one of each format lies in tests/fixtures."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from learnkit import DataBunch, Learner
from learnkit.callbacks import Checkpoint
from learnkit.checkpoint import snapshot as snapshots

KEPT = sorted((Path(__file__).parents[1] / "fixtures").glob("checkpoint-format-*"))


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_a_fit_goes_on_from_a_checkpoint_of_a_former_version(kept):
    shutil.copytree(kept, "kept")
    torch.manual_seed(0)
    x = torch.arange(16.0).view(8, 2) / 16
    data = DataBunch.from_tensors((x, x.sum(1, keepdim=True)), bs=2)
    learn = Learner(data, nn.Linear(2, 1), seed=1, callbacks=[Checkpoint("kept")])
    learn.fit_one_cycle(2, 0.1, resume=True)
    assert learn.step == 8 and len(learn.recorder.losses) == 8
    alone = Learner(data, nn.Linear(2, 1), seed=1)
    torch.manual_seed(0)
    alone.model.load_state_dict(nn.Linear(2, 1).state_dict())
    assert learn.recorder.losses == pytest.approx(alone.fit_one_cycle(2, 0.1).recorder.losses, rel=1e-5)


def test_there_is_one_of_each_format():
    assert [path.name for path in KEPT] == [f"checkpoint-format-{i + 1}" for i in range(snapshots.SNAPSHOT_FORMAT)]
