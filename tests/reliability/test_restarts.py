"""Under `torchrun --max-restarts` a run that crashed resumes by itself, and ends as one that did not crash."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.reliability.conftest import FULL

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from learnkit import Callback
from learnkit.callbacks import Checkpoint
from tests.reliability.conftest import make_learner, outcome

torch.set_num_threads(1)
folder, fault = Path(sys.argv[1]), sys.argv[2]
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

class FailsOnce(Callback):
    def after_backward(self, learn):
        if start > 0 or learn.rank != 1 or learn.step != 9: return
        if fault == "raises": raise RuntimeError("once")
        if fault == "killed": os.kill(os.getpid(), signal.SIGKILL)

learn = make_learner(Checkpoint(folder / "kept", every_n_steps=4))
torch.manual_seed(3 + start)        # a resume must bring its own random states
learn.to_distributed(timeout=30)
with learn.no_logging(): learn.fit_one_cycle(3, 1e-2, resume=True, callbacks=[FailsOnce()])
found = [start, learn.resumed and learn.resumed["step"], outcome(learn)]
if learn.rank == 0: (folder / "outcome.json").write_text(json.dumps(found))
"""


def torchrun(fault: str) -> Any:
    Path("train.py").write_text(SCRIPT)
    folder = Path(fault)
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
        "train.py",
        str(folder),
        fault,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "outcome.json").read_text())


@pytest.mark.skipif(not FULL, reason="three times torchrun: only in `make reliability`")
def test_a_rank_that_fails_once_under_torchrun_costs_only_the_steps_since_the_last_checkpoint():
    expected = torchrun("nothing")
    assert expected[:2] == [0, None]
    assert torchrun("raises") == [1, 8, expected[2]]
