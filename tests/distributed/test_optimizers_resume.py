"""Every optimizer of torch, with all its options: a fit that is resumed ends bit for bit as one that never stopped."""

import inspect
import shutil
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)

from learnkit import Callback, DataBunch, Learner, Together
from learnkit.callbacks import Checkpoint
from learnkit.distributed import is_main

# Not differentiable=True, which is for weights that are no leaves, nor capturable=True, which is for devices.
WAYS: list[dict[str, Any]] = [
    {},
    {"foreach": True},
    {"foreach": False},
    {"foreach": False, "maximize": True},
    {"fused": True},
]
OPTIONS: dict[type[Optimizer], list[dict[str, Any]]] = {  # each with each of WAYS that the optimizer has
    ASGD: [{}, {"t0": 2.0}, {"lambd": 0.1, "alpha": 0.5}],
    Adadelta: [{}],
    Adagrad: [{}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}],
    Adafactor: [{}],
    Adam: [{}, {"amsgrad": True}, {"decoupled_weight_decay": True}, {"betas": (0.5, 0.9)}],
    AdamW: [{}, {"amsgrad": True}],
    Adamax: [{}],
    Muon: [{}, {"nesterov": False}],
    NAdam: [{}, {"decoupled_weight_decay": True}, {"momentum_decay": 0.1}],
    RAdam: [{}, {"decoupled_weight_decay": True}],
    RMSprop: [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}],
    Rprop: [{}],
    SGD: [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}],
}
ELSEWHERE = {LBFGS: "it needs a closure", SparseAdam: "it needs sparse gradients"}
CASES = [
    (cls, {**own, **way})
    for cls, options in OPTIONS.items()
    for own, way in product(options, WAYS)
    if all(name in inspect.signature(cls).parameters for name in way)
]


def test_every_optimizer_of_torch_is_here():
    known = {
        cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    assert known == {*OPTIONS, *ELSEWHERE}


STEP = 4  # of six on two ranks, of twelve alone


class Keep(Callback):
    """Copies the folder of checkpoints away after a step."""

    order = Checkpoint.order - 10

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.step == STEP and is_main():
            shutil.copytree(self.folder, self.folder.with_name("copy"))


def learner(folder: Path, opt_func: Any, dtype: torch.dtype, *callbacks: Callback) -> Learner:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 5, generator=g, dtype=dtype), torch.randint(3, (48,), generator=g)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).to(dtype)
    if opt_func is Together:
        opt_func = Together(NAdam(model[0].parameters(), lr=1e-2), AdamW(model[2].parameters(), lr=1e-2, amsgrad=True))
    learn = Learner(
        DataBunch.from_tensors((x, y), bs=8, seed=2),
        model,
        opt_func=opt_func,
        loss_func=F.cross_entropy,
        callbacks=[Checkpoint(folder, every_n_steps=STEP, every_n_epochs=None), *callbacks],
    )
    return learn.to_distributed()


def state(learn: Learner) -> list[Any]:
    kept = [(name, value) for values in learn.opt.state_dict()["state"].values() for name, value in values.items()]
    return [*learn.model.parameters(), *(value for _, value in kept), learn.recorder.losses, learn.step]


def differs(a: Any, b: Any) -> bool:
    return (a.dtype != b.dtype or not torch.equal(a, b)) if isinstance(a, Tensor) else a != b


def resumed_differently(tmp_path: Path, dtype: torch.dtype, cases: list[Any]) -> list[str]:
    """Those cases in which what is resumed is not what never stopped."""
    found = []
    for number, (cls, options) in enumerate(cases):
        folder, opt_func = tmp_path / str(number), partial(cls, **options) if options else cls
        whole = learner(folder / "kept", opt_func, dtype, Keep(folder / "kept"))
        again = learner(folder / "copy", opt_func, dtype)
        for learn, resume in ((whole, False), (again, True)):
            with learn.no_logging():
                learn.fit_one_cycle(2, 1e-2, resume=resume)
        if any(map(differs, state(whole), state(again))):
            found.append(f"{cls.__name__} {options} {dtype}")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2])
def test_resumed_equals_never_stopped(ranks: Any, tmp_path: Path, n: int, dtype: torch.dtype):
    every_way = n == 1 and dtype == torch.float64
    cases = [*(case for case in CASES if every_way or "foreach" not in case[1]), (Together, {})]
    assert ranks(n, resumed_differently, tmp_path, dtype, cases, timeout=120) == [[]] * n
