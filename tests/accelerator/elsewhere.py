"""The tests of the CPU on the stand-in accelerator: a plugin, `pytest -p tests.accelerator.elsewhere`, which make test-accelerator runs.

Where a test says nothing of a device, its Learner trains on the accelerator then; what it compares with may be on the CPU, so values are
compared, wherever they are. What cannot run there is in `CANNOT`, with the reason.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; tests are forked from here, and need not import it each: 2 s

from tests.accelerator import twin
from tests.accelerator.forks import run_in_a_fork

ROOT = Path(__file__).parents[2]
CANNOT: dict[str, str] = {
}


def why_not(item: pytest.Item) -> str | None:
    """Why a test cannot run here: the reason of the longest name in `CANNOT` with which its own begins."""
    name = item.nodeid.removeprefix("tests/")
    found = [key for key in CANNOT if name.startswith(key)]
    return CANNOT[max(found, key=len)] if found else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = twin.missing() or why_not(item)
        if reason is not None: item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    return None if twin.missing() is not None else run_in_a_fork(item, twin.load)


@pytest.fixture(autouse=True)
def compare_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.equal of tensors on two devices is an error; here a value on the device may equal one on the CPU."""
    equal: Callable[..., bool] = torch.equal
    close: Callable[..., None] = torch.testing.assert_close

    def equal_values(a: Any, b: Any) -> bool: return equal(a.cpu(), b.cpu())
    def close_values(a: Any, b: Any, **options: Any) -> None: close(a, b, **{"check_device": False, **options})
    monkeypatch.setattr(torch, "equal", equal_values)
    monkeypatch.setattr(torch.testing, "assert_close", close_values)


# Only built here: test files that train something when they are imported would begin autograd's threads where there is a device.
if twin.missing() is None: twin.build()
