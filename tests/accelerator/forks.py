"""Each test in a process of its own, in which the device may be used."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
from collections.abc import Callable

import pytest
import torch

from learnkit.distributed.process import die_with_parent


# A process that has used the device cannot fork others that do, and neither can one with autograd's threads, which
# begin with the first backward pass where there is a device. So this process does neither, and every test has a fork of
# its own.
def run_in_a_fork(item: pytest.Item, prepare: Callable[[], object] | None = None) -> bool:
    """What pytest_runtest_protocol of a conftest or plugin does: the whole test, its fixtures included, in a process of
    its own.

    `prepare` is called there first.
    """
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in forked(item, prepare):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def forked(item: pytest.Item, prepare: Callable[[], object] | None) -> list[pytest.TestReport]:
    from _pytest.faulthandler import fault_handler_stderr_fd_key, get_timeout_config_value
    from _pytest.runner import runtestprotocol

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
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
            torch.random._fork_rng_warned_already = (
                True  # tests/conftest.py saves the state of every device, and means it
            )
            # torch makes its thread pool again after a fork when it is next asked, without a lock: two autograd threads
            # (one a device) that begin at once abort the process ("Invalid thread pool", ParallelOpenMP.cpp, torch
            # 2.15).
            torch.set_num_threads(torch.get_num_threads())
            if prepare is not None:
                prepare()
            reports = runtestprotocol(item, nextitem=None, log=False)
            with os.fdopen(sender, "wb") as file:
                pickle.dump([report._to_json() for report in reports], file)
            code = 0
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return [pytest.TestReport._from_json(report) for report in pickle.loads(answer)]
    how = (
        f"signal {signal.Signals(os.WTERMSIG(status)).name}"
        if os.WIFSIGNALED(status)
        else f"exit status {os.WEXITSTATUS(status)}"
    )
    return [pytest.TestReport(item.nodeid, item.location, {}, "failed", f"the test's process ended with {how}", "call")]
