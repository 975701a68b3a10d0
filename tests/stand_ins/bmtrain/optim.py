"""bmtrain.optim in plain PyTorch."""

import torch
import torch.distributed as dist

AdamOffloadOptimizer = torch.optim.AdamW


class OptimManager:
    """Gradients are the mean of all ranks'."""

    def __init__(self, loss_scale):
        assert loss_scale is None

    def add_optimizer(self, optimizer):
        self.optimizer = optimizer

    def zero_grad(self):
        self.optimizer.zero_grad()

    def backward(self, loss):
        loss.backward()
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()

    def clip_grad_norm(self, param_groups, max_norm):
        torch.nn.utils.clip_grad_norm_([p for group in param_groups for p in group["params"]], max_norm)

    def step(self):
        self.optimizer.step()
