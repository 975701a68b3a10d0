"""Two hosts, really (see hosts.py): torchrun's agent on either."""

import re
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.hosts import Hosts, two_hosts
from tests.distributed.processes import SCRIPT, TORCHRUN, Ended, Processes, Started, changed, losses

HANG_TIMEOUT = 4.0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def processes(hosts: Hosts, tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def start(hosts: Hosts, processes: Processes, master: str, *script: str) -> list[Started]:
    """One agent of torchrun on each host; each is told nothing but its number and where the first one is."""
    agents = [
        (
            *TORCHRUN,
            "--nnodes=2",
            f"--node-rank={i}",
            "--nproc-per-node=1",
            f"--master-addr={master}",
            "--master-port=29500",
            *script,
        )
        for i in range(2)
    ]
    return [processes.start(*hosts.command(i, *agent)) for i, agent in enumerate(agents)]


def alone(monkeypatch, capsys) -> list[float]:
    """Losses, and the last epoch's values, of this process alone with the batch of two."""
    monkeypatch.setattr(sys, "argv", ["train.py", "16"])
    runpy.run_path("train.py", run_name="__main__")
    return losses(Ended(0, capsys.readouterr().out, "", time.time()))


def test_two_hosts_train_like_one_process_with_twice_the_batch(hosts, processes, monkeypatch, capsys):
    """Each knows the first one by its name, which is 127.0.1.1 to that one itself."""
    Path("train.py").write_text(SCRIPT)
    started = start(hosts, processes, "host0", "train.py", "8")
    expected = alone(monkeypatch, capsys)
    assert losses(*[one.ended() for one in started]) == pytest.approx(expected, abs=1e-5)


SLOW = """
import time
from pathlib import Path

class Slow(Callback):
    def before_batch(self, learn):
        time.sleep(0.1)
        if learn.step == 5: Path(f"trains{learn.rank}").touch()

local_rank = """


@pytest.mark.parametrize("what", ["cable", "host"])
def test_a_cut_cable_or_a_dead_host_ends_all_and_is_told(what, hosts, processes):
    """Of a cut cable nobody hears: no connection is closed."""
    Path("train.py").write_text(
        changed(
            SCRIPT,
            ("local_rank = ", SLOW),
            ("metrics=accuracy", "metrics=accuracy, callbacks=Slow()"),
            ("to_distributed(local_rank)", f"to_distributed(local_rank, hang_timeout={HANG_TIMEOUT})"),
            ("fit_one_cycle(2", "fit_one_cycle(100"),
        )
    )
    started = start(hosts, processes, "10.77.0.1", "train.py", "8")
    deadline = time.monotonic() + 60
    while not Path("trains1").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    cut_at = time.time()
    if what == "cable":
        hosts.cut()
    else:
        started[1].process.kill()
    ended = [one.ended(30) for one in started]
    assert [end.code for end in ended] == [1, 1 if what == "cable" else -9] and max(
        end.at for end in ended
    ) - cut_at < HANG_TIMEOUT + 8
    told = (
        r"rank 0 of 2 ends: rank 1 is gone, frozen or out of reach \(epoch \d+.*, rank 1 of 2\): no sign of life for \d"
    )
    assert re.search(told, ended[0].err)
    if what == "cable":
        assert (
            f"rank 1 of 2 ends: the store that the ranks share has not answered for {HANG_TIMEOUT:g} s" in ended[1].err
        )
    assert processes.left_after(1) == []
