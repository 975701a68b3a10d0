"""How many nodes torchrun allows a job to have, and whether more can join."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence

from learnkit.distributed.process import parent_arguments, parent_is_torchrun

NO_NODE_CAN_JOIN = (
    "torchrun was started with --nnodes={nodes}, but torch (2.15) does not tell a node that joins later where the "
    "job's store is: the whole job would end a minute after. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for each "
    "torchrun."
)


def warn_where_no_node_can_join() -> None:
    """Warn when the number of nodes may change and torchelastic shares its store: only nodes of the first start get to
    know where it is.
    """
    nodes = os.environ.get("PET_NNODES") or (elastic_nodes(parent_arguments()) if parent_is_torchrun() else "")
    if is_range(nodes):
        warnings.warn(NO_NODE_CAN_JOIN.format(nodes=nodes), stacklevel=4)


def elastic_nodes(arguments: Sequence[str]) -> str:
    """Return the value of torchrun's --nnodes, or "".

    >>> elastic_nodes(["torchrun", "--nnodes=1:4", "train.py"])
    '1:4'
    """
    match = re.search(r"\0--nnodes[=\0]([\d:]+)\0", "\0".join(["", *arguments, ""]))
    return match[1] if match else ""


def is_range(nodes: str) -> bool:
    first, colon, last = nodes.partition(":")
    return bool(colon) and first != last
