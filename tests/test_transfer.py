"""Copies between the host and a device, as far as a CPU can show them; tests/accelerator shows the rest."""
import torch

from learnkit.transfer import sent

CPU = torch.device("cpu")


def test_what_is_sent_to_the_cpu_is_the_same_tensor():
    tensor = torch.arange(3)
    assert sent(tensor, CPU) is tensor
