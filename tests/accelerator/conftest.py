"""Tests on the stand-in accelerator: run where LEARNKIT_ACCELERATOR=twin is set, each in a process of its own."""
from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; tests and ranks are forked from here, and need not import it each: 2 s

from learnkit.distributed import destroy_process_group, init_process_group, launch
from learnkit.distributed.process import die_with_parent
from tests.accelerator import twin

HERE = Path(__file__).parent
os.environ.setdefault("TWIN_DEVICES", "3")  # one for each of up to three ranks
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:10")  # see tests/distributed/conftest.py


def why_not() -> str | None:
    if os.environ.get("LEARNKIT_ACCELERATOR") != "twin": return "run by make test-accelerator"
    return twin.missing()


def is_here(item: pytest.Item) -> bool: return HERE in item.path.parents


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if reason is not None and is_here(item): item.add_marker(pytest.mark.skip(reason=reason))


if why_not() is None: twin.load()


# A process that has used the device cannot fork others that do, and neither can one with autograd's threads, which begin with the first
# backward pass where there is a device. So this process does neither, and every test has a fork of its own.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not is_here(item) or why_not() is not None: return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in forked(item): item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def forked(item: pytest.Item) -> list[pytest.TestReport]:
    from _pytest.faulthandler import fault_handler_stderr_fd_key, get_timeout_config_value
    from _pytest.runner import runtestprotocol

    for stream in (sys.stdout, sys.stderr): stream.flush()
    faulthandler.cancel_dump_traceback_later()  # its thread would be missing in the child, which begins its own
    receiver, sender = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(receiver)
            die_with_parent(parent)
            if limit := get_timeout_config_value(item.config):
                faulthandler.dump_traceback_later(limit, file=item.config.stash[fault_handler_stderr_fd_key], exit=True)
            torch.random._fork_rng_warned_already = True  # tests/conftest.py saves the state of every device, and means it
            reports = runtestprotocol(item, nextitem=None, log=False)
            with os.fdopen(sender, "wb") as file: pickle.dump([report._to_json() for report in reports], file)
            code = 0
        finally:
            for stream in (sys.stdout, sys.stderr): stream.flush()
            os._exit(code)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file: answer = file.read()
    _, status = os.waitpid(pid, 0)
    if status == 0: return [pytest.TestReport._from_json(report) for report in pickle.loads(answer)]
    how = f"signal {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else f"exit status {os.WEXITSTATUS(status)}"
    return [pytest.TestReport(item.nodeid, item.location, {}, "failed", f"the test's process ended with {how}", "call")]


def in_group(fn: Callable[..., Any], *args: Any) -> Any:
    init_process_group(timeout=20)
    try: return fn(*args)
    finally: destroy_process_group()


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """ranks(n, fn, *args): what fn(*args) returns on each of n ranks of one group; rank r has twin:r, and a hang ends after `timeout` s."""

    def run(n: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        return launch(in_group, n, fn, *args, timeout=timeout, every_rank=True)

    return run
