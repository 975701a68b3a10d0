"""Tests on the stand-in accelerator: run where LEARNKIT_ACCELERATOR=twin is set, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# optimizers import it; tests and ranks are forked from here, and need not import it each: 2 s
import torch._dynamo  # noqa: F401

from learnkit.distributed import destroy_process_group, init_process_group, launch
from tests.accelerator import twin
from tests.accelerator.forks import run_in_a_fork

HERE = Path(__file__).parent
os.environ.setdefault("TWIN_DEVICES", "3")  # one for each of up to three ranks
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:10")  # see tests/distributed/conftest.py


def why_not() -> str | None:
    if os.environ.get("LEARNKIT_ACCELERATOR") != "twin":
        return "run by make test-accelerator"
    return twin.missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if reason is not None and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    return None if why_not() is not None else run_in_a_fork(item)


if why_not() is None:
    twin.load()


def in_group(fn: Callable[..., Any], *args: Any) -> Any:
    init_process_group(timeout=20)
    try:
        return fn(*args)
    finally:
        destroy_process_group()


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """ranks(n, fn, *args): what fn(*args) returns on each of n ranks of one group; rank r has twin:r, and a hang ends
    after `timeout` s.
    """

    def run(n: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        return launch(in_group, n, fn, *args, timeout=timeout, every_rank=True)

    return run
