"""The questions about the accelerator: asked without using it, and answered as the device itself answers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learnkit.devices.accelerator import accelerator, can_float64, can_pin, has_streams, widest_float
from tests.conftest import ROOT

CPU = torch.device("cpu")
NO_GPU = not torch.accelerator.is_available()
FAKE_NVML = (
    "int nvmlInit(){return 0;} int nvmlDeviceGetCount_v2(int* n){*n = 2; return 0;}"  # a driver that lists two GPUs
)
FORKED_CHILD = """
import os, torch, learnkit
from torch import nn
from torch.utils.data import TensorDataset
from learnkit.devices.accelerator import accelerator
from learnkit.data.loaders import default_device
x, y = torch.randn(8, 2), torch.randn(8, 2)
{ask}
if os.fork() == 0: os._exit(torch.cuda._is_in_bad_fork())
print(os.waitstatus_to_exitcode(os.wait()[1]), accelerator())
"""


def child_after(ask: str, **environment: str) -> str:
    """Whether a child forked after `ask` is lost for CUDA (0 or 1), and the accelerator that the parent then finds."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED_CHILD.format(ask=ask)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_accelerator_is_the_one_that_torch_finds():
    assert accelerator() == torch.accelerator.current_accelerator(check_available=True)


@pytest.mark.skipif(
    not NO_GPU or not hasattr(os, "fork"),
    reason="a Learner uses the GPU that is there; it is about machines without one",
)
@pytest.mark.parametrize(
    "ask",
    [
        "accelerator()",
        "default_device()",
        "learnkit.DataBunch.create(TensorDataset(x, y), bs=4)",
        "learnkit.Learner(learnkit.DataBunch.from_tensors((x, y), bs=4), nn.Linear(2, 2))",
    ],
)
def test_asking_on_a_machine_without_a_gpu_leaves_forked_children_as_they_would_be(ask):
    assert child_after(ask) == "0 None"


@pytest.mark.skipif(
    not torch.cuda._is_compiled() or sys.platform != "linux" or not shutil.which("gcc"),
    reason="for builds with CUDA; needs gcc",
)
@pytest.mark.parametrize(
    "ask, lost",
    [
        ("accelerator()", 0),
        ("learnkit.DataBunch.create(TensorDataset(x, y), bs=4)", 0),
        ("torch.cuda.is_available()", 1),
    ],
)
def test_devices_that_the_driver_lists_are_found_without_starting_cuda(ask, lost, tmp_path: Path):
    """The driver's list is made up, torch's handling of it and of forks is torch's."""
    (tmp_path / "nvml.c").write_text(FAKE_NVML)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"], cwd=tmp_path, check=True)
    assert child_after(ask, LD_LIBRARY_PATH=str(tmp_path)) == f"{lost} cuda"


def test_the_cpu_has_float64_and_neither_pinned_memory_nor_streams():
    assert can_float64(CPU) and widest_float(CPU) == torch.float64
    assert not can_pin(CPU) and not has_streams(CPU)


def test_mps_has_none_of_them_and_is_not_touched():
    mps = torch.device("mps")
    assert not can_float64(mps) and widest_float(mps) == torch.float32
    assert not can_pin(mps) and not has_streams(mps)


@pytest.mark.skipif(NO_GPU, reason="needs an accelerator")
def test_what_is_said_of_the_accelerator_is_what_it_does():
    device = torch.device(accelerator().type)
    assert torch.ones(1, dtype=widest_float(device), device=device).add(1).item() == 2
    assert torch.ones(1).pin_memory().is_pinned() == can_pin(device) or device.type == "mps"
    assert (torch.Stream(device) != torch.Stream(device)) == has_streams(device)
