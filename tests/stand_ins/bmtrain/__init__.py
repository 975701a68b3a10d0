"""bmtrain in plain PyTorch: the same numbers without sharing the memory."""

import torch
import torch.distributed as dist
from torch import nn

from . import optim

__all__ = [
    "CheckpointBlock",
    "DistributedModule",
    "DistributedParameter",
    "TransformerBlockList",
    "init_distributed",
    "optim",
    "rank",
    "save",
    "world_size",
]

DistributedModule, DistributedParameter = nn.Module, nn.Parameter


def init_distributed(seed):
    dist.init_process_group("gloo")
    torch.manual_seed(seed)


def rank():
    return dist.get_rank()


def world_size():
    return dist.get_world_size()


def CheckpointBlock(block):
    return block


class TransformerBlockList(nn.ModuleList):
    def forward(self, x, *args):
        for block in self:
            x = block(x, *args)
        return x


def save(model, path):
    if rank() == 0:
        torch.save(model.state_dict(), path)
