"""Samplers that divide their samples among the ranks by themselves: every script that was written for DDP has one."""

import math
import warnings
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, TensorDataset

from learnkit import Callback, Learner
from learnkit.distributed import get_rank, get_world_size


class Numbers(nn.Linear):
    """Predicts 0, so that the loss of sample i is i squared."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        for p in self.parameters():
            nn.init.zeros_(p)


class Seen(Callback):
    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def before_batch(self, learn: Learner) -> None:
        if learn.training:
            self.steps.append(learn.inputs[0].flatten().int().tolist())


class Repeated(Sampler[int]):
    """As torchvision's RASampler or timm's RepeatAugSampler: each rank's own share, with `num_replicas` and `rank`."""

    def __init__(self, dataset: Any, num_replicas: int | None = None, rank: int | None = None) -> None:
        self.n, self.num_replicas = len(dataset), get_world_size() if num_replicas is None else num_replicas
        self.rank = get_rank() if rank is None else rank

    def __len__(self) -> int:
        return self.n // self.num_replicas

    def __iter__(self) -> Any:
        return iter(range(self.rank, len(self) * self.num_replicas, self.num_replicas))


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(n))[:, None], torch.arange(float(n))[:, None])


def learner(train: Any, valid: Any = None) -> tuple[Learner, Seen]:
    learn = Learner((train, valid), Numbers(), opt_func=torch.optim.SGD, callbacks=[seen := Seen()]).to_distributed()
    return learn, seen


def divided(ds: Any, **options: Any) -> DistributedSampler[Any]:
    return DistributedSampler(ds, get_world_size(), get_rank(), **options)


EVALUATED = {
    "as in every script": lambda ds: DataLoader(ds, 2, sampler=divided(ds, shuffle=False)),
    "shuffled": lambda ds: DataLoader(ds, 2, sampler=divided(ds)),
    "drop_last": lambda ds: DataLoader(ds, 1, sampler=divided(ds, drop_last=True), drop_last=True),
    "in a batch sampler": lambda ds: DataLoader(
        ds, batch_sampler=BatchSampler(divided(ds, shuffle=False), 2, drop_last=False)
    ),
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_sees_each_sample_once_in_the_order_of_the_dataset(ranks, name, world_size):
    if world_size == 1 and name == "in a batch sampler":
        pytest.skip("alone, a batch sampler of the user's is taken as it is")

    def fn() -> Any:
        ds = numbers(5)
        learn, _ = learner(DataLoader(ds, 1), EVALUATED[name](ds))
        with learn.no_logging():
            return learn.validate()["valid_loss"], learn.get_preds()[1].flatten().tolist()

    assert ranks(world_size, fn) == [(6.0, [0.0, 1.0, 2.0, 3.0, 4.0])] * world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_sees_the_order_of_one_process_without_the_samples_that_it_repeats(ranks, world_size):
    def fn() -> Any:
        ds = numbers(11)
        learn, seen = learner(DataLoader(ds, 6 // get_world_size(), sampler=divided(ds, seed=4)))
        with learn.no_logging():
            learn.fit(2, 1e-3)
        return seen.steps, learn.recorder.losses

    [[alone, losses]] = ranks(1, fn)
    by_rank = ranks(world_size, fn)
    assert [list(chain(*step)) for step in zip(*(steps for steps, _ in by_rank), strict=True)] == alone
    for _, found in by_rank:
        assert found == pytest.approx(losses, rel=1e-6)
    epochs = [sorted(chain(*alone[:2])), sorted(chain(*alone[2:]))]
    assert epochs == [list(range(11))] * 2 and alone[:2] != alone[2:]


def test_a_sampler_of_the_users_that_divides_is_not_divided_again_which_is_said(ranks):
    def fn() -> Any:
        ds = numbers(8)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            learn, seen = learner(DataLoader(ds, 2, sampler=Repeated(ds)), DataLoader(ds, 2, sampler=Repeated(ds)))
            with learn.no_logging():
                learn.fit(1, 1e-9)
        return seen.steps, [str(w.message) for w in told if "divides" in str(w.message)], learn.values["valid_loss"]

    (first, told, loss), (second, nothing, _) = ranks(2, fn)
    assert first == [[0, 2], [4, 6]] and second == [[1, 3], [5, 7]] and nothing == []
    assert len(told) == 2 and "the Repeated of this DataLoader divides its samples among the ranks by itself" in told[0]
    assert "trained on as they are" in told[0] and "evaluated as they are" in told[1]
    assert math.isclose(loss, sum(i * i for i in range(8)) / 8, rel_tol=1e-6)


@pytest.mark.parametrize("make", [Repeated, DistributedSampler])
def test_one_for_another_number_of_ranks_is_refused_before_the_first_step(ranks, make):
    def fn() -> Any:
        ds = numbers(8)
        learn, seen = learner(DataLoader(ds, 2, sampler=make(ds, num_replicas=4, rank=get_rank())))
        with pytest.raises(
            ValueError,
            match=f"the {make.__name__} of this DataLoader divides its samples among 4 processes, and there are 2",
        ):
            learn.fit(1)
        return seen.steps

    assert ranks(2, fn) == [[], []]


def test_one_for_one_process_is_divided_as_any_other(ranks):
    def fn() -> Any:
        ds = numbers(8)
        learn, seen = learner(DataLoader(ds, 2, sampler=Repeated(ds, 1, 0)))
        with learn.no_logging():
            learn.fit(1)
        return seen.steps

    assert ranks(2, fn) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_a_loader_of_the_users_own_that_shuffles_by_the_global_generator_is_the_same_on_all_ranks(ranks):
    class Zipped:
        def __init__(self) -> None:
            self.loaders = [DataLoader(ds := numbers(8), 2, sampler=RandomSampler(ds)) for _ in range(2)]

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            for (x, _), (y, _) in zip(*self.loaders, strict=True):
                yield x, y

    class Draws(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x + torch.rand(()))

    def fn(model: Any) -> Any:
        torch.manual_seed(get_rank())
        learn = Learner((Zipped(), None), model(1, 1), seed=5, callbacks=[seen := Seen()]).to_distributed()
        state = torch.get_rng_state() if model is nn.Linear else None
        with learn.no_logging():
            learn.fit(2, 1e-3)
        assert state is None or not torch.equal(state, torch.get_rng_state())  # seeded by `seed`, and no more
        return seen.steps

    [alone] = ranks(1, fn, nn.Linear)
    assert ranks(1, fn, Draws) == [alone]  # whatever the model draws in between
    first, second = ranks(2, fn, Draws)
    assert [step for both in zip(first, second, strict=True) for step in both] == alone
