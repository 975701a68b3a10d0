"""Hyper-parameters that are tensors, as captured and compiled optimizer steps need them: the same objects throughout,
with the right numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Checkpoint, CSVLogger, JSONLogger, ParamScheduler, ReduceLROnPlateau
from learnkit.optim.combined import Together
from learnkit.schedule import linear

Make = Callable[[nn.Module], Optimizer]


def batches(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(n)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def learner(make: Make, **options: Any) -> Learner:
    net = model()
    return Learner(DataBunch(batches(), batches(2)), net, opt_func=make(net), seed=0, device="cpu", **options)


def weights(learn: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def rate(value: float = 1e-2) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)  # as exact as a float


def of(kind: Any, lr: Any, **options: Any) -> Make:
    return lambda net: kind(net.parameters(), lr=lr(), **options)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fused Adam": (Adam, {"fused": True}),
    "AdamW": (AdamW, {"foreach": False, "weight_decay": 0.1}),
    "fused SGD": (SGD, {"fused": True, "momentum": 0.9, "weight_decay": 0.1}),
}
FITS: dict[str, Callable[[Learner], Any]] = {
    "fit(2)": lambda learn: learn.fit(2),
    "fit(2, lr)": lambda learn: learn.fit(2, 3e-3),
    "one cycle": lambda learn: learn.fit_one_cycle(2, 3e-2),
    "one cycle at its own rate": lambda learn: learn.fit_one_cycle(2),
    "flat": lambda learn: learn.fit_flat_cos(2, 1e-2, wd=0.3),
    "lr_find, then fit": lambda learn: (learn.lr_find(1e-5, 1.0, 10), learn.fit(1)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fit", FITS)
def test_the_tensor_stays_the_same_object_and_trains_as_a_number_does(kind: str, fit: str):
    cls, options = KINDS[kind]
    ours, plain = learner(of(cls, rate, **options)), learner(of(cls, lambda: 1e-2, **options))
    lr = ours.opt.param_groups[0]["lr"]
    for learn in (ours, plain):
        with learn.no_logging():
            FITS[fit](learn)
    assert ours.opt.param_groups[0]["lr"] is lr and isinstance(lr, Tensor)
    assert float(lr) == plain.opt.param_groups[0]["lr"] and torch.equal(weights(ours), weights(plain))
    assert ours.recorder.lrs == plain.recorder.lrs and all(type(value) is float for value in ours.recorder.lrs)
    assert ours.recorder.moms == plain.recorder.moms


def test_betas_weight_decay_and_eps_that_are_tensors_are_scheduled_too():
    schedules = {"mom": linear(0.9, 0.5), "lr": linear(1e-2, 1e-3)}
    betas = (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))
    ours = learner(of(Adam, rate, betas=betas, foreach=False), callbacks=ParamScheduler(schedules))
    plain = learner(of(Adam, lambda: 1e-2, betas=(0.9, 0.99), foreach=False), callbacks=ParamScheduler(schedules))
    for learn in (ours, plain):
        with learn.no_logging():
            learn.fit(2)
    assert ours.opt.param_groups[0]["betas"][0] is betas[0] and float(betas[0]) == 0.5
    assert ours.recorder.moms == plain.recorder.moms and torch.allclose(weights(ours), weights(plain), rtol=1e-6)


def test_decoupled_decay_of_another_algorithm_takes_a_tensor_rate():
    def run(opt_func: Any) -> Tensor:
        learn = Learner(DataBunch(batches()), model(), opt_func=opt_func, seed=0, device="cpu", wd=0.1)
        with learn.no_logging():
            learn.fit_one_cycle(2, 1e-2)
        assert isinstance(learn.opt.param_groups[0]["lr"], Tensor) == (opt_func is tensors)
        return weights(learn)

    tensors = partial(SGD, lr=rate(), momentum=0.9)
    assert torch.equal(run(tensors), run(partial(SGD, momentum=0.9)))


def split(net: Any) -> list[nn.Module]:
    return [net[:2], net[2:]]


def test_groups_that_share_a_tensor_get_rates_of_their_own_where_these_differ():
    def make(lr: Any) -> Make:
        return lambda net: Adam([{"params": part.parameters()} for part in split(net)], lr=lr, fused=True)

    lr = rate()
    ours, plain = learner(make(lr)), learner(make(1e-2))
    assert all(group["lr"] is lr for group in ours.opt.param_groups)  # torch gives both the same one
    for learn in (ours, plain):
        with learn.no_logging():
            learn.fit(1, 1e-2)
            assert learn is plain or all(group["lr"] is lr for group in learn.opt.param_groups)
            learn.fit_one_cycle(1, slice(1e-3, 1e-2))
    assert [float(group["lr"]) for group in ours.opt.param_groups] == [group["lr"] for group in plain.opt.param_groups]
    assert ours.opt.param_groups[0]["lr"] is lr and torch.equal(weights(ours), weights(plain))


def test_two_optimizers_together_keep_their_own_tensors():
    first, second = rate(0.1), rate(0.01)

    def make(net: nn.Module) -> Optimizer:
        big, small = ([p for p in net.parameters() if (p.ndim > 1) == is_big] for is_big in (True, False))
        return Together(SGD(big, lr=first, fused=True), Adam(small, lr=second, fused=True))

    learn = learner(make)
    with learn.no_logging():
        learn.fit_one_cycle(1, slice(1e-3, 1e-2)).fit(1)
    assert [group["lr"] for group in learn.opt.param_groups] == [first, second]
    assert all(group["lr"] is lr for group, lr in zip(learn.opt.param_groups, (first, second), strict=True))


class FailAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_batch(self, learn: Learner) -> None:
        if learn.step == self.step:
            raise InterruptedError


@pytest.mark.parametrize("at", [3, 8])
def test_a_resumed_fit_writes_into_the_tensor_that_is_there(at: int):
    def run(folder: str, *extra: Callback, resume: bool = False) -> tuple[Learner, Any]:
        learn = learner(of(Adam, rate, fused=True), callbacks=[Checkpoint(folder, every_n_steps=1)])
        lr = learn.opt.param_groups[0]["lr"]
        with learn.no_logging():
            learn.fit_one_cycle(2, 1e-2, callbacks=extra, resume=resume)
        assert learn.opt.param_groups[0]["lr"] is lr
        return learn, lr

    whole, _ = run("whole")
    with pytest.raises(InterruptedError):
        run("parts", FailAt(at))
    learn, lr = run("parts", resume=True)
    assert torch.equal(weights(learn), weights(whole)) and learn.recorder.lrs == whole.recorder.lrs
    assert float(lr) == whole.recorder.lrs[-1]


def test_a_file_of_numbers_is_loaded_into_tensors_and_one_of_tensors_into_numbers():
    tensor, plain = learner(of(Adam, rate, fused=True)), learner(of(Adam, lambda: 0.5, fused=True))
    lr = tensor.opt.param_groups[0]["lr"]
    plain.save("numbers")
    tensor.load("numbers")
    assert tensor.opt.param_groups[0]["lr"] is lr and float(lr) == 0.5
    lr.fill_(0.25)
    tensor.save("tensors")
    plain.load("tensors")
    assert plain.opt.param_groups[0]["lr"] == 0.25 and type(plain.opt.param_groups[0]["lr"]) is float


def test_reduce_lr_on_plateau_and_logs_see_numbers():
    logs = []
    for lr in (rate(), 1e-2):
        learn = learner(
            of(Adam, lambda lr=lr: lr, fused=True),
            callbacks=[
                ReduceLROnPlateau(patience=1, min_delta=99.0),
                CSVLogger("log.csv", every_n_steps=4),
                JSONLogger("log.jsonl", every_n_steps=4),
            ],
        )
        with learn.no_logging():
            learn.fit(4)
        now = learn.opt.param_groups[0]["lr"]
        assert float(now) == pytest.approx(1e-5) and (now is lr or type(lr) is float)
        logs.append((Path("log.csv").read_text(), Path("log.jsonl").read_text()))
    assert logs[0] == logs[1] and "0.001" in logs[0][0]


def graphs_of_a_compiled_step(lr: Callable[[], Any]) -> int:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    learn = learner(of(Adam, lr, foreach=False))
    learn.opt.step = torch.compile(learn.opt.step, backend=backend)  # type: ignore[method-assign]
    torch._dynamo.reset()
    try:
        with learn.no_logging():
            learn.fit_one_cycle(1, 1e-2, moms=None)
    finally:
        torch._dynamo.reset()
    return len(graphs)


def test_a_compiled_step_is_compiled_once_for_a_whole_schedule():
    assert graphs_of_a_compiled_step(rate) == 1 < graphs_of_a_compiled_step(lambda: 1e-2)
