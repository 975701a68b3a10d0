"""A Learner on many ranks that fails, or was set up wrongly: what is said, where, and that all is as it was
afterwards.
"""

import multiprocessing
import re
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.distributed import RankFailed, all_sum, gather_objects, get_rank, launch
from learnkit.hooks import HOOKS, StopFit


def tensors(n: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def data(n: int = 20, bs: int = 4, **options) -> DataBunch:
    return DataBunch.from_tensors(tensors(n), tensors(5), bs=bs, seed=0, **options)


def net(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def equal_everywhere(value: Any) -> bool:
    return all(other == value for other in gather_objects(value))


# --- clean-u -----------------------------------------------------------------
def failing(hook: str, on: Callable[[int], bool]) -> Callback:
    """Raises in this hook, on these ranks, in the second epoch where there are several."""

    def fail(self, learn, run=None):
        if on(learn.rank) and (learn.epoch == 1 or hook.endswith("_fit")):
            raise KeyError(f"{hook} of rank {learn.rank}")
        if run is not None:
            run()

    return type(
        "Fails",
        (Callback,),
        {hook: lambda self, learn, run: fail(self, learn, run)}
        if "around" in hook
        else {hook: lambda self, learn: fail(self, learn)},
    )()


def undone(learn: Learner, model: nn.Module, modules: list[nn.Module], whole: DataBunch) -> bool:
    return (
        learn.model is model
        and list(model.modules()) == modules
        and learn.data is whole
        and learn.training_model is model
        and learn.order_seed is None
        and not learn.is_running
        and learn.rank == get_rank()
        and type(whole.train_dl).__name__ == "TensorLoader"
        and len(whole.train_dl) == 5
        and all(
            p.grad is None and not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters()
        )
    )


@pytest.mark.parametrize("sync_bn", [False, True])
def test_after_a_fit_all_is_as_it_was(ranks, sync_bn):
    def fn():
        model, whole = net(), data()
        modules = list(model.modules())
        learn = Learner(whole, model).to_distributed(sync_bn=sync_bn)
        learn.fit(1)
        assert undone(learn, model, modules, whole)
        learn.validate(), learn.get_preds()
        assert undone(learn, model, modules, whole)
        loss = model(tensors()[0]).sum()  # trained alone: no hook of DDP's is left that would wait for others
        if get_rank() == 0:
            loss.backward()
        return True

    assert ranks(2, fn) == [True, True]


def test_after_an_error_of_all_ranks_in_any_hook_all_is_as_it_was_and_a_second_fit_works(ranks):
    def fn():
        for i, hook in enumerate(HOOKS):
            model, whole, fails = net(), data(), failing(hook, lambda rank: True)
            modules = list(model.modules())
            learn = Learner(whole, model, callbacks=fails).to_distributed(sync_bn=i % 2 == 0)
            with pytest.raises(KeyError, match=f"{hook} of rank {get_rank()}"), learn.no_logging():
                learn.fit(2)
            assert undone(learn, model, modules, whole), hook
            with learn.no_logging():
                learn.remove_callback(fails).fit(1)
            assert learn.step == 2 and equal_everywhere(
                [learn.recorder.losses, learn.recorder.values, weights(model)]
            ), hook
        return True

    assert ranks(2, fn, timeout=90) == [True, True]


def train(hook: str, culprit: int) -> None:
    learn = Learner(data(), net(), callbacks=failing(hook, lambda rank: rank == culprit)).to_distributed(timeout=60)
    with learn.no_logging():
        learn.fit(2)


def failed(hook: str) -> tuple[str, int, str, float]:
    """(hook, the rank that is named, the message, seconds) of a training of which one rank fails in this hook."""
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        launch(train, 2, hook, HOOKS.index(hook) % 2, timeout=30)
    return hook, caught.value.rank, str(caught.value), time.monotonic() - start


def test_an_error_of_one_rank_in_any_hook_ends_all_and_is_named():
    """Several at a time: a failing rank waits until the others have heard of it."""
    with warnings.catch_warnings(), ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("fork")) as children:
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking beside other threads
        for hook, rank, message, seconds in children.map(failed, HOOKS):
            culprit = HOOKS.index(hook) % 2
            assert rank == culprit and f"rank {culprit} of 2 failed: KeyError: '{hook} of rank {culprit}'" in message, (
                message
            )
            assert f"raised in Fails.{hook}" in message and "in fail\n" in message and seconds < 10, (hook, seconds)


@pytest.mark.parametrize("seconds", [0.5, 2.5])
def test_the_ranks_may_take_their_time_after_a_stop(ranks, capfd, seconds):
    """A stop is no failure: nobody is told of one, and nobody ends the others."""

    class Slow(Callback):
        def after_epoch(self, learn):
            raise StopFit

        def after_fit(self, learn):
            time.sleep(seconds * learn.rank)

    def fn():
        return Learner(data(), net(), callbacks=Slow()).to_distributed().fit(2).step

    assert ranks(2, fn) == [2, 2]
    assert "[learnkit]" not in capfd.readouterr().err


# --- comparis ----------------------------------------------------------------
def build(n: int = 20, bs: int = 4, width: int = 6, loader: bool = False, **options) -> Learner:
    whole = data(n, bs) if not loader else DataBunch(DataLoader(TensorDataset(*tensors(n)), bs), [tensors(5)])
    return Learner(whole, net(width), **options)


def momentum(value: float) -> Any:
    return partial(SGD, momentum=value)


DIFFERENT = {  # of rank 1, of the others: what is said
    "lr": ({"lr": 0.1}, {"lr": 0.2}, r"optimizer's settings: rank 1 has .*lr=0\.1\b.*; ranks 0, 2 have .*lr=0\.2\b"),
    "wd": (
        {"wd": 0.1},
        {},
        r"optimizer's settings: rank 1 has .*weight_decay=0\.1\b.*; ranks 0, 2 have .*weight_decay=0\.01\b",
    ),
    "bs": ({"bs": 3}, {}, "the batch size: rank 1 has 3; ranks 0, 2 have 4"),
    "bs of a DataLoader": (
        {"bs": 3, "loader": True},
        {"loader": True},
        "the batch size: rank 1 has 3; ranks 0, 2 have 4",
    ),
    "model": (
        {"width": 7},
        {},
        r"the model's parameters: rank 1 has '0.weight \(7, 4\).*; ranks 0, 2 have '0.weight \(6, 4\)",
    ),
    "opt": ({"opt_func": Adam}, {}, "the optimizer: rank 1 has 'Adam'; ranks 0, 2 have 'AdamW'"),
    "momentum": (
        {"opt_func": momentum(0.8)},
        {"opt_func": momentum(0.9)},
        r"rank 1 has .*momentum=0\.8\b.*; ranks 0, 2 have .*momentum=0\.9\b",
    ),
    "steps": ({"n": 40}, {}, "the number of steps: rank 1 has 3; ranks 0, 2 have 1"),
    "samples": ({"n": 22}, {}, "the number of training samples: rank 1 has 22; ranks 0, 2 have 20"),
    "samples of a DataLoader": (
        {"n": 22, "loader": True},
        {"loader": True},
        "the number of training samples: rank 1 has 22; ranks 0, 2 have 20",
    ),
    "seed": ({"seed": 1}, {"seed": 2}, "the seed: rank 1 has 1; ranks 0, 2 have 2"),
    "metrics": ({"metrics": accuracy}, {}, "the metrics: rank 1 has 'accuracy'; ranks 0, 2 have ''"),
    "bn_wd": ({"bn_wd": False}, {}, "optimizer's settings: rank 1 has .*decays=False"),
}
CALLS = {  # of rank 1, of the others: what is said
    "epochs": (("fit", 3), ("fit", 2), "the number of epochs: rank 1 has 3; ranks 0, 2 have 2"),
    "lr": (("fit", 2, 0.1), ("fit", 2, 0.2), r"rank 1 has .*lr=0\.1\b.*; ranks 0, 2 have .*lr=0\.2\b"),
    "max_lr": (
        ("fit_one_cycle", 2, 0.25),
        ("fit_one_cycle", 2, 0.5),
        r"the schedules: rank 1 has .*lr 0\.25, .*; ranks 0, 2 have .*lr 0\.5, ",
    ),
    "the kind of fit": (
        ("fit", 2),
        ("fit_one_cycle", 2),
        r"the schedules: rank 1 has ''; ranks 0, 2 have 'mom .*; lr ",
    ),
}


def told(make: Callable[[], Learner], method: str = "fit", *arguments) -> str:
    """The error of a fit that must not begin; "" where it did."""
    learn, before = make(), None
    try:
        before = weights(learn.to_distributed().model)
        getattr(learn, method)(*(arguments or (1,)))
    except ValueError as error:
        assert learn.step == 0 and before in (None, weights(learn.model))
        return str(error)
    return ""


@pytest.fixture
def messages(ranks):
    """messages(name): what each rank was told; all cases in one launch."""

    def all_of_them():
        odd = get_rank() == 1
        built = {name: told(partial(build, **(own if odd else others))) for name, (own, others, _) in DIFFERENT.items()}
        return built | {
            f"fit: {name}": told(build, *(own if odd else others)) for name, (own, others, _) in CALLS.items()
        }

    def of(name: str) -> list[str]:
        if not TOLD:
            TOLD.extend(ranks(3, all_of_them))
        return [share[name] for share in TOLD]

    return of


TOLD: list[dict[str, str]] = []


@pytest.mark.parametrize("name", [*DIFFERENT, *(f"fit: {n}" for n in CALLS)])
def test_what_differs_is_told_on_all_ranks_before_the_first_step(messages, name):
    *_, expected = DIFFERENT[name] if name in DIFFERENT else CALLS[name.removeprefix("fit: ")]
    for message in messages(name):
        assert re.search(f"the ranks disagree on what must be equal everywhere:\n.*{expected}", message, re.DOTALL), (
            message
        )


# --- wrong set-u -------------------------------------------------------------
class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.spare, self.frozen = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(5, 5).requires_grad_(False)

    def forward(self, x):
        return self.body(x)


def test_parameters_without_a_gradient_are_named_unless_ddp_looks_for_them(ranks):
    def fn():
        with pytest.raises(
            ValueError,
            match=r"2 parameters got no gradient: spare\.weight, spare\.bias\. DDP waits .*find_unused_parameters=True",
        ):
            Learner(data(), Unused()).to_distributed().fit(1)
        torch.manual_seed(0)
        learn = Learner(data(), Unused()).to_distributed(find_unused_parameters=True).fit(2)
        return learn.recorder.losses, weights(learn.model)

    shares = ranks(2, fn)
    torch.manual_seed(0)
    alone = Learner(data(bs=8), Unused()).fit(2)
    assert shares[0] == shares[1]
    assert shares[0][0] == pytest.approx(alone.recorder.losses, abs=1e-5)
    assert shares[0][1] == pytest.approx(weights(alone.model), abs=1e-5)


def test_data_too_small_for_the_ranks_are_refused_with_what_to_do(ranks):
    def refused(loader, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            Learner(DataBunch(loader), net()).to_distributed().fit(1)

    def fn():
        advice = r"samples\. Take a smaller batch size, which is per rank, fewer ranks, or drop_last=False\."
        whole = r"train_dl has no batch for each of the 3 ranks: alone it has 1, of 4 "
        refused(data(8).train_dl, whole.replace("has 1", "has 2") + advice)
        refused(data(2, drop_last=False).train_dl, whole + advice)
        refused(DataLoader(TensorDataset(*tensors(5)), 4, drop_last=True), whole + advice)
        refused(DataLoader(TensorDataset(*tensors(2)), 4), whole + advice)
        refused([tensors(4), tensors(4)], r"train_dl has no batch for each of the 3 ranks: alone it has 2\. Take")
        learn = Learner((data(6, drop_last=False).train_dl, None), net()).to_distributed().fit(1)  # 2 samples for each
        return learn.step

    assert ranks(3, fn) == [1, 1, 1]


def test_an_empty_pass_is_an_error_on_all(ranks):
    class Nothing:
        def __iter__(self):
            return iter(())

    def fn():
        with pytest.raises(ValueError, match="gave no batch: it is empty"):
            Learner((Nothing(), None), net()).to_distributed().fit(1)
        learn = Learner(data(), net()).to_distributed()
        return learn.validate(Nothing())

    assert str(ranks(2, fn)) == str([{"valid_loss": float("nan")}] * 2)


def test_an_error_after_one_that_was_caught_is_the_one_that_is_named(ranks):
    def fn():
        learn = Learner(data(), net(), callbacks=failing("before_step", lambda rank: True)).to_distributed()
        with pytest.raises(KeyError):
            learn.fit(2)
        all_sum(1)
        if get_rank() == 1:
            raise OSError("the disk is full")
        all_sum(1)

    with pytest.raises(RankFailed, match="rank 1 of 2 failed: OSError: the disk is full"):
        ranks(2, fn)
