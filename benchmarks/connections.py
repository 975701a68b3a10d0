"""What this process has sent and received over each of its TCP connections, as Linux counts it (TCP_INFO): payloads,
without headers.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from typing import NamedTuple

RECEIVED, SEGMENTS = 128, 156  # where TCP_INFO has tcpi_bytes_received and tcpi_data_segs_out, linux/tcp.h


class Counts(NamedTuple):
    received: int  # bytes
    segments: int  # sent, with a payload: a small request is one


def connections() -> dict[str, Counts]:
    """ "own port peer's port" -> counts."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:
            continue  # the folder's own, which is closed by now
        if not is_socket:
            continue
        with socket.socket(fileno=os.dup(fd)) as one:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                continue
            try:
                ends = f"{one.getsockname()[1]} {one.getpeername()[1]}"
            except OSError:
                continue  # it listens
            info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            found[ends] = Counts(struct.unpack_from("Q", info, RECEIVED)[0], struct.unpack_from("I", info, SEGMENTS)[0])
    return found


def to_ranks() -> dict[str, Counts]:
    """Those to other ranks: all but those of the store."""
    return {ends: counts for ends, counts in connections().items() if os.environ["MASTER_PORT"] not in ends.split()}


def to_store() -> Counts:
    """Those to the store, which several threads have, together."""
    own = [counts for ends, counts in connections().items() if ends.split()[1] == os.environ["MASTER_PORT"]]
    return Counts(sum(c.received for c in own), sum(c.segments for c in own))
