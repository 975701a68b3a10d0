"""The global random states, as they were after what was only looked at."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unmoved(*devices: torch.device) -> Iterator[None]:
    """What is drawn in the block from the global generators of Python, numpy and torch, on the CPU and on `devices`, is
    not missed later.

    Only the block's own process: workers have generators of their own.
    """
    places = [device for device in dict.fromkeys(devices) if device.type != "cpu"]
    states = [torch.get_device_module(device).get_rng_state(device) for device in places]
    numpy = sys.modules.get("numpy")
    on_cpu, of_python, of_numpy = (
        torch.get_rng_state(),
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
    )
    try:
        yield
    finally:
        torch.set_rng_state(on_cpu)
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        for device, state in zip(places, states, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
