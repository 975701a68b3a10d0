"""Where gradients lie in DDP's buckets decides how three or more ranks round: a resumed fit has the buckets of the one
that never stopped.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
from torch import Tensor, nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Accumulate, Checkpoint
from learnkit.distributed import get_rank, gradient_order_of, is_main, prepare_model

STEPS = (1, 2, 3, 7)  # of four an epoch
SMALL: dict[str, Any] = {"bucket_cap_mb": 0.002}  # several buckets


class Net(nn.Module):
    """Sixteen parameters, in another order than they are used in."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.blocks, self.first = (
            nn.Linear(16, 3),
            nn.ModuleList(nn.Linear(16, 16) for _ in range(6)),
            nn.Linear(8, 16),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x)


class Keep(Callback):
    """Copies the folder of checkpoints away after some steps of a fit."""

    order = Checkpoint.order - 10

    def __init__(self, folder: Path, fit: int) -> None:
        self.folder, self.fit = folder, fit

    def after_batch(self, learn: Learner) -> None:
        copy = self.folder.with_name(f"{learn.step}")
        if learn.training and learn.step in STEPS and learn.n_fits == self.fit and is_main() and not copy.exists():
            shutil.copytree(self.folder, copy)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fitted(folder: Path, options: dict[str, Any], n_fits: int, *callbacks: Callback, resume: bool) -> Tensor:
    g = torch.Generator().manual_seed(1)
    data = DataBunch.from_tensors((torch.randn(96, 8, generator=g), torch.randint(3, (96,), generator=g)), bs=6, seed=3)
    torch.manual_seed(0)
    options, window = {**options}, options.get("window", 1)
    options.pop("window", None)
    learn = Learner(
        data, Net(), callbacks=[Checkpoint(folder, every_n_steps=1), Accumulate(window), *callbacks]
    ).to_distributed(**options)
    with learn.no_logging():
        for _ in range(n_fits):
            learn.fit_one_cycle(2, 1e-2, resume=resume)
    return weights(learn.model)


def differing(root: Path, options: dict[str, Any], n_fits: int) -> list[str]:
    """The steps from which what is resumed is not what never stopped."""
    whole = fitted(root / "kept", options, n_fits, Keep(root / "kept", n_fits), resume=False)
    found = [folder for step in STEPS if (folder := root / str(step)).exists()]
    return (
        [folder.name for folder in found if not torch.equal(whole, fitted(folder, options, n_fits, resume=True))]
        if found
        else ["none"]
    )


WAYS: dict[str, dict[str, Any]] = {
    "several buckets": SMALL,
    "one bucket": {},
    "copied": {**SMALL, "gradient_as_bucket_view": False},
    "windows": {**SMALL, "window": 2},
    "find_unused": {**SMALL, "find_unused_parameters": True},
    "one reduction": {"delay_allreduce": True},
    "powersgd": {**SMALL, "algorithm": "powersgd", "warmup_steps": 2},
    "fp16": {**SMALL, "algorithm": "fp16"},
}


@pytest.mark.parametrize(
    ("n", "way", "n_fits"), [(3, way, 1) for way in WAYS] + [(4, "several buckets", 1), (3, "several buckets", 2)]
)
def test_resumed_equals_never_stopped_to_the_last_bit(ranks: Any, tmp_path: Path, n: int, way: str, n_fits: int):
    assert ranks(n, differing, tmp_path, WAYS[way], n_fits, timeout=60) == [[]] * n


def steps(model: nn.Module, first: int, last: int) -> tuple[list[Tensor], list[str]]:
    """The gradients of steps of a loop of one's own, and the order afterwards."""
    found = []
    for step in range(first, last):
        g = torch.Generator().manual_seed(10 * step + get_rank())
        F.cross_entropy(model(torch.randn(5, 8, generator=g)), torch.randint(3, (5,), generator=g)).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    return found, gradient_order_of(model)


def own_loop() -> Any:
    torch.manual_seed(0)
    model = prepare_model(Net(), **SMALL)
    assert gradient_order_of(model) == []
    _, order = steps(model, 0, 1)
    later, same = steps(model, 1, 3)
    torch.manual_seed(0)
    resumed = prepare_model(Net(), gradient_order=order, **SMALL)
    again, kept = steps(resumed, 1, 3)
    both: list[Any] = [model, resumed]
    buckets = [ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"] for ddp in both]
    torch.manual_seed(0)
    plain, _ = steps(prepare_model(Net(), **SMALL), 1, 3)
    return order, same, kept, buckets, [list(map(torch.equal, later, other)) for other in (again, plain)]


def test_a_loop_of_ones_own_takes_the_order_up_and_has_the_buckets_that_torch_learns(ranks: Any):
    for order, same, kept, (learned, taken_up), (again, plain) in ranks(3, own_loop):
        assert order[:2] == ["last.bias", "last.weight"] and order[-1] == "first.weight" and order == same == kept
        assert learned == taken_up and "," in learned
        assert again == [True, True] and plain == [False, True]  # a control that must differ in its first step
