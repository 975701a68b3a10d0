"""Two hosts, really: network namespaces joined by a cable, each with processes and a name of its own, torchrun's agent on either.

As Debian and Ubuntu lay it out, a host's own name is 127.0.1.1 to itself.
"""
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.processes import SCRIPT, TORCHRUN, Ended, Processes, Started, changed, losses

HANG_TIMEOUT = 4.0
ENTER = """hostname "$0" && mount --bind "$0.hosts" /etc/hosts && mount --bind resolv.conf "$(realpath /etc/resolv.conf)" && exec "$@" """
APART = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", ENTER)


class Hosts:
    """host0 at 10.77.0.1 and host1 at 10.77.0.2, each reached by the other alone."""

    def __init__(self) -> None:
        unique = uuid.uuid4().hex[:8]
        self.namespaces = [f"learnkit-{unique}-{i}" for i in range(2)]

    def make(self) -> None:
        a, b = self.namespaces
        for namespace in self.namespaces: ip("netns", "add", namespace)
        ip("link", "add", "cable0", "netns", a, "type", "veth", "peer", "name", "cable1", "netns", b)
        for i, namespace in enumerate(self.namespaces):
            ip("-n", namespace, "address", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}")
            for interface in ("lo", f"cable{i}"): ip("-n", namespace, "link", "set", interface, "up")
            ip("-n", namespace, "route", "add", "default", "dev", f"cable{i}")
            other = f"10.77.0.{2 - i} host{1 - i}"
            Path(f"host{i}.hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 host{i}\n{other}\n")
        Path("resolv.conf").write_text("nameserver 127.0.0.1\n")    # nobody there, which is known at once
        subprocess.run(self.command(0, "true"), check=True, capture_output=True, text=True)

    def delete(self) -> None:
        for namespace in self.namespaces: subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)

    def command(self, i: int, *command: str) -> tuple[str, ...]:
        """What runs a command on one of the hosts."""
        return ("ip", "netns", "exec", self.namespaces[i], *APART, f"host{i}", *command)

    def cut(self) -> None: ip("-n", self.namespaces[1], "link", "set", "cable1", "down")


def ip(*arguments: str) -> None: subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if sys.platform != "linux": pytest.skip("network namespaces are Linux's")
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing: pytest.skip(f"no command {' or '.join(missing)}: apt-get install iproute2 util-linux")
    if os.geteuid() != 0: pytest.skip("only root may make network namespaces")
    hosts = Hosts()
    try:
        try: hosts.make()
        except subprocess.CalledProcessError as error: pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield hosts
    finally: hosts.delete()


@pytest.fixture
def processes(hosts: Hosts, tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started: yield started


def start(hosts: Hosts, processes: Processes, master: str, *script: str) -> list[Started]:
    """One agent of torchrun on each host; each is told nothing but its number and where the first one is."""
    agents = [(*TORCHRUN, "--nnodes=2", f"--node-rank={i}", "--nproc-per-node=1", f"--master-addr={master}", "--master-port=29500", *script)
              for i in range(2)]
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
    Path("train.py").write_text(changed(SCRIPT, ("local_rank = ", SLOW), ("metrics=accuracy", "metrics=accuracy, callbacks=Slow()"),
                                        ("to_distributed(local_rank)", f"to_distributed(local_rank, hang_timeout={HANG_TIMEOUT})"),
                                        ("fit_one_cycle(2", "fit_one_cycle(100")))
    started = start(hosts, processes, "10.77.0.1", "train.py", "8")
    deadline = time.monotonic() + 60
    while not Path("trains1").exists() and time.monotonic() < deadline: time.sleep(0.05)
    time.sleep(1)
    cut_at = time.time()
    if what == "cable": hosts.cut()
    else: started[1].process.kill()
    ended = [one.ended(30) for one in started]
    assert [end.code for end in ended] == [1, 1 if what == "cable" else -9] and max(end.at for end in ended) - cut_at < HANG_TIMEOUT + 8
    told = r"rank 0 of 2 ends: rank 1 is gone, frozen or out of reach \(epoch \d+.*, rank 1 of 2\): no sign of life for \d"
    assert re.search(told, ended[0].err)
    if what == "cable": assert f"rank 1 of 2 ends: the store that the ranks share has not answered for {HANG_TIMEOUT:g} s" in ended[1].err
    assert processes.left_after(1) == []
