"""The accelerator of this machine and what a device supports: queried here, in the same way for every backend."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import cache

import torch


def accelerator() -> torch.device | None:
    """Return the accelerator of this machine, without an index (`device(type='cuda')`), or None.

    This query must not use the device: a process that has called `torch.cuda.is_available()` cannot fork children that
    use CUDA (torch 2.15), and `launch` and the workers of a DataLoader fork. So this counts the devices that the driver
    lists (NVML, amdsmi, Level Zero Sysman), which does not start CUDA. Whether torch can use them, e.g. whether the
    driver is new enough, shows at the first use. If the driver has no such list (Jetson, CUDA_VISIBLE_DEVICES=MIG-…,
    ROCm without amdsmi, XPU without pyzes), the runtime is queried, and `launch` then starts its ranks with spawn.
    """
    kind = torch.accelerator.current_accelerator()  # the one that torch was built for: this does not use the device
    if kind is None:
        return None
    listed = kind.type == "cuda" and sys.platform != "win32" and not torch.cuda.is_initialized()
    return kind if (_lists_cuda() if listed else torch.accelerator.is_available()) else None


def _lists_cuda() -> bool:
    """Return whether the driver lists a CUDA or ROCm device; CUDA is started only if the driver has no list."""
    if not has_driver():
        return False  # else torch would query the runtime, after which forking is impossible, even without a device
    with warnings.catch_warnings():  # "Can't initialize NVML": then the runtime is queried and decides
        warnings.simplefilter("ignore", UserWarning)
        return torch.cuda.device_count() > 0


def has_driver() -> bool:
    """Return whether a driver for CUDA or ROCm is installed on this Linux; without a driver there is no device."""
    if torch.version.hip:
        return os.path.exists("/dev/kfd") or os.path.exists("/dev/dxg")  # dxg: on Windows (WSL)
    return any(map(_loads, ("libnvidia-ml.so.1", "libcuda.so.1")))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def can_float64(device: torch.device) -> bool:
    """Return whether `device` computes in float64. MPS and some Intel GPUs do not.

    An unknown backend is tested with one addition, once per process, which waits for the device.
    """
    return _computes_float64(device.type)


def widest_float(device: torch.device) -> torch.dtype:
    """Return the dtype for sums that must be exact: float64, or float32 if `device` does not support float64."""
    return torch.float64 if can_float64(device) else torch.float32


def can_pin(device: torch.device) -> bool:
    """Return whether pinned host memory speeds up copies to `device`.

    True for CUDA, ROCm, XPU and backends with an allocator for pinned memory. False for the CPU, for MPS (it shares its
    memory with the CPU; torch warns about pinning) and for any device that is not this process's accelerator.
    """
    kind = torch.accelerator.current_accelerator()
    return kind is not None and device.type == kind.type and _pins(device.type)


def has_streams(device: torch.device) -> bool:
    """Return whether `device` has more than one stream, so that a copy can run while it computes.

    False for the CPU and MPS.
    """
    return _has_second_stream(device.type)


def wait_for_device(device: torch.device) -> None:
    """Wait until `device` has finished its work; returns at once for the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@cache
def _computes_float64(kind: str) -> bool:
    if kind in ("cpu", "cuda", "meta"):
        return True
    if kind == "mps":
        return False
    if kind == "xpu":
        return bool(torch.xpu.get_device_properties().has_fp64)
    try:
        _add(kind, torch.float64)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        _add(kind, torch.float32)  # raises if the device does not work at all
        return False
    return True


def _add(kind: str, dtype: torch.dtype) -> None:
    torch.ones(1, dtype=dtype, device=kind).add(1).cpu()


@cache
def _pins(kind: str) -> bool:
    if kind in ("cuda", "xpu"):
        return True  # known without using the device, see accelerator()
    if kind in ("cpu", "mps", "meta"):
        return False
    try:
        return torch.empty(1).pin_memory().is_pinned()
    except RuntimeError:
        return False  # the backend has no allocator for it


@cache
def _has_second_stream(kind: str) -> bool:
    if kind in ("cuda", "xpu"):
        return True
    if kind in ("cpu", "mps", "meta"):
        return False
    try:
        return torch.Stream(kind) != torch.Stream(kind)
    except RuntimeError:
        return False  # the backend has no streams
