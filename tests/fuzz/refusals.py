"""What does not go together, and says so before the first step, on all ranks alike."""

from __future__ import annotations

import re

from tests.fuzz.configuration import Configuration


class Refused(Exception):
    """A configuration that the library refuses, for a reason that is known."""


# a part of the message -> why it is right that this is refused
KNOWN: dict[str, str] = {
    r"SAM beside": "its second pass needs a step's whole batch",
    r"needs the number of steps": "a schedule of a loader without a length",
    r"is an IterableDataset: each rank": "only its author knows whether it divides itself",
    r"batch_size=None, so its dataset makes the batches": "only its author knows a rank's share",
    r"ReduceLROnPlateau has no effect beside a schedule": "the schedule sets the rate anew in each step",
    r"AutoMicrobatch beside to_fsdp": "where memory runs out on one rank, the others wait",
    r"pure=True beside to_fsdp": "whole weights are cast, of which each rank has a part",
    r"fused=True\) beside to_fsdp": "torch has no such kernel",
    r"static_graph=True, with which DDP reduces": "gradients cannot wait",
    r"Parameters? got no gradient|parameters got no gradient": "DDP waits for each parameter",
    r"sharded=True beside async_write": "all ranks would talk while training does",
    r"monitors? .* (is not|which)": "nothing by that name is measured",
}


def known(message: str, c: Configuration) -> str | None:
    """Why this is refused; None: nobody knows."""
    return next((why for pattern, why in KNOWN.items() if re.search(pattern, message)), None)
