"""apex.amp in plain PyTorch: O1 is autocast, and a scaled loss."""

from contextlib import contextmanager

import torch

_scalers = {}


def initialize(model, optimizer, opt_level="O1"):
    assert opt_level == "O1"
    forward = model.forward

    def cast(*args):
        with torch.autocast("cpu", torch.float16):
            return forward(*args)

    model.forward = cast
    _scalers[optimizer] = torch.amp.GradScaler("cpu")
    return model, optimizer


@contextmanager
def scale_loss(loss, optimizer):
    """The step is taken with unscaled gradients, after the block; without any where they overflow, which of plain SGD
    is a skipped step.
    """
    scaler = _scalers[optimizer]
    yield scaler.scale(loss)
    scaler.unscale_(optimizer)
    overflows = not all(p.grad.isfinite().all() for group in optimizer.param_groups for p in group["params"])
    scaler.update()
    if overflows:
        optimizer.zero_grad()
