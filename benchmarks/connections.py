"""Counts of what this process has sent and received over each of its TCP connections, from Linux (TCP_INFO): payloads,
without headers.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from typing import NamedTuple

RECEIVED, SEGMENTS = 128, 156  # offsets of tcpi_bytes_received and tcpi_data_segs_out in TCP_INFO, linux/tcp.h


class Counts(NamedTuple):
    received: int  # bytes
    segments: int  # segments sent with a payload; a small request is one segment


def connections() -> dict[str, Counts]:
    """Return {"own port peer's port": counts}."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:
            continue  # the descriptor of the folder itself, which is closed by now
        if not is_socket:
            continue
        with socket.socket(fileno=os.dup(fd)) as one:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                continue
            try:
                ends = f"{one.getsockname()[1]} {one.getpeername()[1]}"
            except OSError:
                continue  # a listening socket
            info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            found[ends] = Counts(struct.unpack_from("Q", info, RECEIVED)[0], struct.unpack_from("I", info, SEGMENTS)[0])
    return found


def to_ranks() -> dict[str, Counts]:
    """Return the connections to other ranks: all except those of the store."""
    return {ends: counts for ends, counts in connections().items() if os.environ["MASTER_PORT"] not in ends.split()}


def to_store() -> Counts:
    """Return the total of the connections to the store; several threads have one."""
    own = [counts for ends, counts in connections().items() if ends.split()[1] == os.environ["MASTER_PORT"]]
    return Counts(sum(c.received for c in own), sum(c.segments for c in own))
