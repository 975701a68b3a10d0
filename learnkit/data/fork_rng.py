"""Code that draws random numbers without changing the global random states."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unmoved(*devices: torch.device) -> Iterator[None]:
    """Restore the global generators of Python, numpy and torch, on the CPU and on `devices`, after the block.

    This covers the block's own process only: workers have their own generators.
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
