"""apex.parallel in plain PyTorch."""

import torch
import torch.distributed as dist
from torch import nn

from learnkit.distributed import sync_batchnorm as convert_syncbn_model  # PyTorch has none for CPUs

__all__ = ["DistributedDataParallel", "convert_syncbn_model"]


class DistributedDataParallel(nn.Module):
    """delay_allreduce: when a backward pass is over, the gradients are averaged, one after the other."""

    def __init__(self, module, delay_allreduce=False):
        super().__init__()
        assert delay_allreduce
        self.module = module
        for t in module.state_dict().values():
            dist.broadcast(t, 0)
        self.under_way = False
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(self.note)

    def note(self, p):
        if not self.under_way:
            torch.autograd.Variable._execution_engine.queue_callback(self.reduce)
        self.under_way = True

    def reduce(self):
        self.under_way = False
        for p in self.module.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()

    def forward(self, *args):
        return self.module(*args)
