"""Ranks forked from this warm process: about 0.1 s a case, where torchrun takes several seconds."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # optimizers import it; ranks are forked from here, and need not import it each: 2 s

from learnkit.distributed import destroy_process_group, init_process_group, launch

# Every connection to a TCPStore asks the name server for the name of 127.0.0.1. Where one question in a hundred is lost
# (seen in a virtual machine), its test takes 5 s longer: ask again after one second, and as often as before in all.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:10")


def in_group(fn: Callable[..., Any], *args: Any) -> Any:
    init_process_group(timeout=20)
    try:
        return fn(*args)
    finally:
        destroy_process_group()


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """ranks(n, fn, *args): what fn(*args) returns on each of n ranks of one group; a hang ends after `timeout` s."""

    def run(n: int, fn: Callable[..., Any], *args: Any, timeout: float = 30) -> list[Any]:
        return launch(in_group, n, fn, *args, timeout=timeout, every_rank=True)

    return run
