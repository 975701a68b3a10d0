"""bagua.torch_api in plain PyTorch."""

import os

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def init_process_group():
    dist.init_process_group("gloo")


def get_local_rank():
    return int(os.environ["LOCAL_RANK"])


def get_rank():
    return dist.get_rank()


def get_world_size():
    return dist.get_world_size()


def bagua_init(model, optimizer, distributed_algorithm):
    assert distributed_algorithm == "allreduce"
    return DistributedDataParallel(model), optimizer
