"""Scripts as users start them: each with a time limit, all found again by a mark that their descendants inherit, none
left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from learnkit.distributed.process import is_alive

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
TORCHRUN = (PYTHON, "-m", "torch.distributed.run")
LAUNCHERS_OWN = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_",
    "SLURM_",
    "TORCHELASTIC_",
    "GLOO_SOCKET_IFNAME",
    "PYTHONHOME",
)

SCRIPT = """\
import json
import sys

from learnkit import *
from learnkit.distributed import *

local_rank = get_local_rank()
torch.manual_seed(0)
x = torch.randn(72, 4)
data = DataBunch.from_tensors((x, (x[:, 0] > 0).long()), (x[:15], (x[:15, 1] > 0).long()), bs=int(sys.argv[-1]))
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
learn = Learner(data, model, metrics=accuracy).to_distributed(local_rank)
learn.fit_one_cycle(2, 1e-2)
if is_main(): print(json.dumps([*learn.recorder.losses, *learn.recorder.values[-1]]))
"""


def changed(script: str, *changes: tuple[str, str]) -> str:
    """The script with some of its parts replaced, each of which it must have."""
    for old, new in changes:
        assert old in script
        script = script.replace(old, new)
    return script


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    at: float  # time.time()


def losses(*ended: Ended) -> list[float]:
    """What rank 0 printed: one line an epoch, then the losses; the other ranks print nothing."""
    assert [(end.code, end.err) for end in ended if end.code != 0] == []
    lines = "".join(end.out for end in ended).splitlines()
    assert [line[:9] for line in lines[:-1]] == ["epoch 1/2", "epoch 2/2"]
    return json.loads(lines[-1])


class Started:
    """One process that a test started; its output goes to files, as what outlives it would hold a pipe open."""

    def __init__(self, command: tuple[str, ...], output: Path, env: dict[str, str]) -> None:
        self.out, self.err = output.with_suffix(".out"), output.with_suffix(".err")
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    def ended(self, limit: float = 60) -> Ended:
        """Waits for its end, which must come within `limit` seconds."""
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {limit} s:\n{self.out.read_text()}\n{self.err.read_text()}"
            ) from None
        return Ended(code, self.out.read_text(), self.err.read_text(), time.time())


class Processes:
    """All that one test starts: within the block, in `folder`. Afterwards nothing of it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.started = folder, f"LEARNKIT_TEST={uuid.uuid4().hex}", []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for one in self.started:
            one.process.wait()

    def start(self, *command: str, **variables: object) -> Started:
        """Starts a command on the CPU; `variables` are added to its environment, in which no launcher's are."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS_OWN)}
        name, _, value = self.mark.partition("=")
        env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", name: value}
        self.started.append(
            Started(
                command,
                self.folder / f"process{len(self.started)}",
                env | {name: str(value) for name, value in variables.items()},
            )
        )
        return self.started[-1]

    def run(self, *command: str, limit: float = 60, **variables: object) -> Ended:
        return self.start(*command, **variables).ended(limit)

    def alive(self) -> list[int]:
        """The pids of what was started and of all that came of it, whoever its parent is now."""
        return [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self.is_ours(pid) and is_alive(pid)
        ]

    def is_ours(self, pid: int) -> bool:
        with suppress(OSError):
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    def left_after(self, seconds: float) -> list[int]:
        """What still runs after `seconds`, or [] as soon as nothing does."""
        deadline = time.monotonic() + seconds
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return alive
