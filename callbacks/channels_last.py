"""Pictures with their channels last in memory, as convolutions on GPUs and CPUs want them."""

from __future__ import annotations

import torch
from torch import Tensor

from learnkit.devices.nested import map_tensors
from learnkit.hooks import Callback
from learnkit.learner import Learner


class ChannelsLast(Callback):
    """Lay the 4-d floating inputs of every batch out with their channels last. What `learn.to_channels_last()` adds."""

    order = -10
    unique = True

    def before_batch(self, learn: Learner) -> None:
        learn.inputs = map_tensors(channels_last, learn.inputs)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
