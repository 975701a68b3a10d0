"""Two hosts, really: network namespaces joined by a cable, each with processes and a name of its own.

As Debian and Ubuntu lay it out, a host's own name is 127.0.1.1 to itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ENTER = (
    'hostname "$0" && mount --bind "$0.hosts" /etc/hosts && '
    'mount --bind resolv.conf "$(realpath /etc/resolv.conf)" && exec "$@" '
)
APART = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", ENTER)


class Hosts:
    """host0 at 10.77.0.1 and host1 at 10.77.0.2, each reached by the other alone."""

    def __init__(self) -> None:
        unique = uuid.uuid4().hex[:8]
        self.namespaces = [f"learnkit-{unique}-{i}" for i in range(2)]

    def make(self) -> None:
        a, b = self.namespaces
        for namespace in self.namespaces:
            ip("netns", "add", namespace)
        ip("link", "add", "cable0", "netns", a, "type", "veth", "peer", "name", "cable1", "netns", b)
        for i, namespace in enumerate(self.namespaces):
            ip("-n", namespace, "address", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}")
            for interface in ("lo", f"cable{i}"):
                ip("-n", namespace, "link", "set", interface, "up")
            ip("-n", namespace, "route", "add", "default", "dev", f"cable{i}")
            other = f"10.77.0.{2 - i} host{1 - i}"
            Path(f"host{i}.hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 host{i}\n{other}\n")
        Path("resolv.conf").write_text("nameserver 127.0.0.1\n")  # nobody there, which is known at once
        subprocess.run(self.command(0, "true"), check=True, capture_output=True, text=True)

    def delete(self) -> None:
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)

    def command(self, i: int, *command: str) -> tuple[str, ...]:
        """What runs a command on one of the hosts."""
        return ("ip", "netns", "exec", self.namespaces[i], *APART, f"host{i}", *command)

    def cut(self) -> None:
        ip("-n", self.namespaces[1], "link", "set", "cable1", "down")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Those of one test, gone afterwards; in a folder of its own, as they write a few files. Skips where they cannot
    be.
    """
    if sys.platform != "linux":
        pytest.skip("network namespaces are Linux's")
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no command {' or '.join(missing)}: apt-get install iproute2 util-linux")
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    hosts = Hosts()
    try:
        try:
            hosts.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts.delete()
