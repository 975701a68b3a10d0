"""The stand-in accelerator itself: that it computes what the CPU does, and that it shows what a real device would punish."""
import pytest
import torch

from tests.accelerator import twin


def test_results_are_the_cpus_bit_by_bit():
    x = torch.randn(5, 5)
    assert torch.equal((x.to("twin") @ x.to("twin")).cpu(), x @ x)
