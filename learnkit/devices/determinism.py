"""The same numbers in every run, also on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(*, warn_only: bool = False) -> Iterator[None]:
    """Make torch use only deterministic algorithms in a with block; afterwards its settings are restored.

    cuBLAS reads its environment variable when it is first used in a process: if a GPU has computed before the block,
    set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the script starts.

    Args:
        warn_only: an operation without a deterministic algorithm warns, instead of raising RuntimeError
    """
    cudnn: Any = torch.backends.cudnn
    workspace = os.environ.get(WORKSPACE)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    os.environ.setdefault(WORKSPACE, ":4096:8")
    try:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before[2:]
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
