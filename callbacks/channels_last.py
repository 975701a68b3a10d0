"""Pictures in the channels_last memory format, which convolutions on GPUs and CPUs prefer."""

from __future__ import annotations

import torch
from torch import Tensor

from learnkit.devices.nested import map_tensors
from learnkit.hooks import Callback
from learnkit.learner import Learner


class ChannelsLast(Callback):
    """Convert the 4-d inputs of every batch to the channels_last memory format; `learn.to_channels_last()` adds it."""

    order = -10
    unique = True

    def before_batch(self, learn: Learner) -> None:
        learn.inputs = map_tensors(channels_last, learn.inputs)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
