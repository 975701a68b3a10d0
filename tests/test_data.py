"""Loaders: the order of samples is a function of (seed, epoch) alone, and nothing that a loader does is seen from
outside.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from learnkit import Callback, DataBunch, Learner, StopTrain, TensorLoader

N, BS = 22, 4
# Two workers on a machine with one core are a warning of torch's.
few_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def numbered(n: int = N) -> tuple[Tensor, Tensor]:
    """x tells which sample it is."""
    return torch.arange(float(n)).unsqueeze(1), torch.arange(n) % 2


class Order(Callback):
    """Which samples each training batch held, one list an epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[list[int]]] = []

    def before_train(self, learn: Learner) -> None:
        self.epochs.append([])

    def before_batch(self, learn: Learner) -> None:
        if learn.training:
            self.epochs[-1].append(learn.inputs[0][:, 0].int().tolist())  # type: ignore


def order_of(
    data: Any, epochs: int = 3, *, seed: int | None = None, callbacks: Iterable[Callback] = ()
) -> list[list[list[int]]]:
    order = Order()
    Learner(data, nn.Linear(1, 2), callbacks=[order, *callbacks], seed=seed).fit(epochs)
    return order.epochs


def ids(batches: Iterable[Any]) -> list[list[int]]:
    return [batch[0][:, 0].int().tolist() for batch in batches]


def flat(batches: Iterable[Iterable[int]]) -> list[int]:
    return list(itertools.chain(*batches))


class Noisy(Callback):
    """Draws from every global source of randomness in the middle of a fit."""

    def before_batch(self, learn: Learner) -> None:
        torch.rand(3)
        random.random()

    def before_epoch(self, learn: Learner) -> None:
        torch.manual_seed(learn.epoch + 77)


# --- (seed, epoch) and nothing else ------------------------------------------
WAYS: dict[str, Callable[[TensorDataset], Any]] = {
    "from_tensors": lambda ds: DataBunch.from_tensors(ds.tensors, bs=BS, seed=5),
    "create": lambda ds: DataBunch.create(ds, bs=BS, seed=5),
    "two workers": lambda ds: DataBunch.create(ds, bs=BS, seed=5, num_workers=2),
    "validation in between": lambda ds: DataBunch.create(ds, ds, bs=BS, seed=5),
    "shuffled validation": lambda ds: DataBunch(
        DataBunch.create(ds, bs=BS, seed=5).train_dl, DataLoader(ds, 3, shuffle=True)
    ),
    "other global seed": lambda ds: (torch.manual_seed(99), DataBunch.create(ds, bs=BS, seed=5))[1],
}


@few_cores
@pytest.mark.parametrize("make_data", WAYS.values(), ids=WAYS)
def test_the_order_depends_on_seed_and_epoch_alone(make_data: Callable[[TensorDataset], Any]):
    dataset = TensorDataset(*numbered())
    expected = order_of(DataBunch.from_tensors(dataset.tensors, bs=BS, seed=5))
    assert order_of(make_data(dataset), callbacks=[Noisy()]) == expected
    assert len({str(epoch) for epoch in expected}) == 3
    for epoch in expected:
        assert len(set(flat(epoch))) == len(flat(epoch)) == N // BS * BS


def test_other_seeds_give_other_orders():
    data = [DataBunch.from_tensors(numbered(), bs=BS, seed=seed) for seed in (1, 2, 3)]
    assert len({str(order_of(d)) for d in data}) == 3


@pytest.mark.parametrize(
    "make_data",
    [
        lambda: DataBunch.from_tensors(numbered(), bs=BS),
        lambda: DataBunch.create(TensorDataset(*numbered()), bs=BS),
        lambda: (DataLoader(TensorDataset(*numbered()), BS, shuffle=True), None),
    ],
    ids=["from_tensors", "create", "DataLoader"],
)
def test_the_learners_seed_decides_the_order_whatever_the_global_one_is(make_data: Callable[[], Any]):
    orders = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        orders.append(order_of(make_data(), seed=7))
    assert orders[0] == orders[1] != order_of(make_data(), seed=8)


@pytest.mark.parametrize(
    "make_data",
    [
        lambda: DataBunch.from_tensors(numbered(), bs=BS),
        lambda: DataBunch.create(TensorDataset(*numbered()), bs=BS),
        lambda: (DataLoader(TensorDataset(*numbered()), BS, shuffle=True), None),
    ],
    ids=["from_tensors", "create", "DataLoader"],
)
def test_without_seeds_torch_manual_seed_at_the_start_of_a_script_decides(make_data: Callable[[], Any]):
    orders = []
    for global_seed, noise in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(global_seed)
        torch.rand(noise)
        orders.append(order_of(make_data()))
    assert orders[0] == orders[1] != orders[2]


def test_epochs_of_two_fits_are_the_epochs_of_one():
    one = order_of(DataBunch.from_tensors(numbered(), bs=BS, seed=5), 4)
    learn = Learner(DataBunch.from_tensors(numbered(), bs=BS, seed=5), nn.Linear(1, 2), callbacks=(order := Order()))
    learn.fit(1).fit(3)
    assert order.epochs == one


class Short(Callback):
    """Three batches an epoch, as somebody does who tries something out."""

    def after_batch(self, learn: Learner) -> None:
        if learn.training and learn.batch_index == 2:
            raise StopTrain


@pytest.mark.parametrize(
    "make_data",
    [
        lambda: DataBunch.from_tensors(numbered(), bs=BS, seed=5),
        lambda: DataBunch.create(TensorDataset(*numbered()), bs=BS, seed=5),
    ],
    ids=["from_tensors", "create"],
)
def test_an_epoch_that_was_stopped_early_is_followed_by_the_next_epochs_order(make_data: Callable[[], DataBunch]):
    assert order_of(make_data(), callbacks=[Short()]) == [epoch[:3] for epoch in order_of(make_data())]


def test_passes_before_a_fit_do_not_change_its_order():
    def fresh() -> DataBunch:
        return DataBunch.create(TensorDataset(*numbered()), TensorDataset(*numbered()), bs=BS, seed=5)

    data, order = fresh(), Order()
    learn = Learner(data, nn.Linear(1, 2), callbacks=order)
    learn.validate()
    learn.validate(data.train_dl)
    learn.get_preds(data.train_dl)
    learn.predict(torch.zeros(1))
    learn.summary()
    order.epochs.clear()
    learn.fit(2)
    assert order.epochs == order_of(fresh(), 2)


def test_a_validation_of_the_training_data_in_the_middle_of_a_fit_leaves_the_order():
    class Peek(Callback):
        def after_batch(self, learn):
            if learn.training and learn.batch_index == 1:
                learn.validate(learn.data.train_dl)

    def fresh() -> DataBunch:
        return DataBunch.create(TensorDataset(*numbered()), bs=BS, seed=5)

    assert order_of(fresh(), callbacks=[Peek()]) == order_of(fresh())


# --- global random state -----------------------------------------------------
@few_cores
@pytest.mark.parametrize(
    "make_data",
    [
        lambda ds: DataBunch.from_tensors(ds.tensors, ds.tensors, bs=BS),
        lambda ds: DataBunch.create(ds, ds, bs=BS),
        lambda ds: DataBunch.create(ds, ds, bs=BS, num_workers=2),
        lambda ds: (DataLoader(ds, BS, shuffle=True), DataLoader(ds, BS)),
        lambda ds: (DataLoader(ds, BS, sampler=WeightedRandomSampler([1.0] * N, N)), None),
        lambda ds: (DataLoader(ds, batch_sampler=BatchSampler(RandomSampler(ds), BS, False)), None),
    ],
    ids=["from_tensors", "create", "two workers", "DataLoader", "WeightedRandomSampler", "BatchSampler"],
)
def test_a_fit_leaves_the_global_random_state_as_it_was(make_data: Callable[[TensorDataset], Any]):
    learn = Learner(make_data(TensorDataset(*numbered())), nn.Linear(1, 2))
    state, python_state = torch.get_rng_state(), random.getstate()
    learn.fit_one_cycle(2)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    if learn.data.valid_dl is not None:
        learn.validate()
    learn.get_preds(learn.data.train_dl)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_users_loader_gets_its_own_generator_back():
    dataset = TensorDataset(*numbered())
    own = torch.Generator().manual_seed(3)
    loaders = [DataLoader(dataset, BS, shuffle=True), DataLoader(dataset, BS, shuffle=True, generator=own)]
    for loader in loaders:
        Learner((loader, loader), nn.Linear(1, 2)).fit(1)
    assert loaders[0].generator is None and getattr(loaders[0].sampler, "generator", 0) is None
    assert loaders[1].generator is own and getattr(loaders[1].sampler, "generator", 0) is own


# --- the user's own loaders --------------------------------------------------
OWN: dict[str, Callable[[TensorDataset], DataLoader[Any]]] = {
    "generator": lambda ds: DataLoader(ds, BS, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "sampler": lambda ds: DataLoader(ds, BS, sampler=[5, 3, 8, 1, 0, 7]),
    "random sampler with a generator": lambda ds: DataLoader(
        ds, BS, sampler=RandomSampler(ds, replacement=True, num_samples=9, generator=torch.Generator().manual_seed(3))
    ),
    "batch_sampler": lambda ds: DataLoader(ds, batch_sampler=[[0, 1], [5, 6, 7], [2]]),
    "torch's batch sampler": lambda ds: DataLoader(
        ds, batch_sampler=BatchSampler(SequentialSampler(ds), 5, drop_last=True)
    ),
    "no shuffling": lambda ds: DataLoader(ds, BS),
}


@pytest.mark.parametrize("make_loader", OWN.values(), ids=OWN)
def test_a_loader_with_an_order_of_its_own_keeps_it(make_loader: Callable[[TensorDataset], DataLoader[Any]]):
    dataset = TensorDataset(*numbered())
    loader = make_loader(dataset)
    assert order_of((make_loader(dataset), None)) == [ids(loader) for _ in range(3)]


def test_a_sampler_with_set_epoch_is_told_the_epoch():
    class Turning(torch.utils.data.Sampler[int]):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[int]:
            return iter([(i + self.epoch) % 4 for i in range(4)])

    dataset = TensorDataset(*numbered(4))
    assert order_of((DataLoader(dataset, 4, sampler=Turning()), None)) == [
        [[0, 1, 2, 3]],
        [[1, 2, 3, 0]],
        [[2, 3, 0, 1]],
    ]


class Endless:
    """A re-iterable without a length."""

    def __init__(self, n_batches: int) -> None:
        self.n_batches = n_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = numbered()
        for i in range(self.n_batches):
            yield x[i * BS : i * BS + BS], y[i * BS : i * BS + BS]


class Stream(IterableDataset[Any]):
    def __init__(self, n: int = N) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        return zip(*(t[: self.n] for t in numbered()), strict=True)


UNSIZED: dict[str, Callable[[], Any]] = {
    "own class": lambda: (Endless(5), Endless(2)),
    "DataLoader": lambda: (DataLoader(Stream(5 * BS), BS), DataLoader(Stream(), BS)),
    "create": lambda: DataBunch.create(Stream(), Stream(), bs=BS, num_workers=0),
}


@pytest.mark.parametrize("make_data", UNSIZED.values(), ids=UNSIZED)
def test_loaders_without_a_length_fit_validate_and_predict(make_data: Callable[[], Any]):
    learn = Learner(make_data(), nn.Linear(1, 2))
    assert learn.fit(2).step == 10 and len(learn.recorder.values) == 2 and learn.n_steps is None
    assert learn.validate().keys() == {"valid_loss"}
    assert len(learn.get_preds()[0]) in (8, N)


@pytest.mark.parametrize("make_data", UNSIZED.values(), ids=UNSIZED)
def test_one_cycle_over_a_loader_without_a_length_needs_max_steps_and_is_as_long(make_data: Callable[[], Any]):
    learn = Learner(make_data(), model := nn.Linear(1, 2))
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"needs the number of steps.*has no length.*max_steps"):
        learn.fit_one_cycle(2)
    assert torch.equal(model.weight, before)
    learn.fit_one_cycle(9, 0.1, max_steps=7)
    assert len(learn.recorder.lrs) == 7 and learn.recorder.lrs[2] == 0.1 and learn.recorder.lrs[-1] == 0.1 / 25e4
    assert learn.n_steps == 7


def test_a_list_of_batches_is_a_loader():
    x, y = numbered()
    batches = [(x[i : i + BS], y[i : i + BS]) for i in range(0, N, BS)]
    assert order_of((batches, batches)) == [ids(batches)] * 3


def test_fit_with_fewer_steps_than_an_epoch_still_validates():
    x, y = numbered()
    learn = Learner(DataBunch.from_tensors((x, y), (x, y), bs=BS), nn.Linear(1, 2)).fit(3, max_steps=2)
    assert learn.step == 2 and len(learn.recorder.values) == 1 and math.isfinite(learn.recorder.values[0][1])


# --- evaluation order --------------------------------------------------------
IN_ORDER: dict[str, Callable[[TensorDataset], Any]] = {
    "from_tensors": lambda ds: DataBunch.from_tensors(ds.tensors, bs=BS).train_dl,
    "create": lambda ds: DataBunch.create(ds, bs=BS).train_dl,
    "create with workers": lambda ds: DataBunch.create(ds, bs=BS, num_workers=2).train_dl,
    "DataLoader": lambda ds: DataLoader(ds, BS, shuffle=True, drop_last=True),
    "DataLoader with a generator": lambda ds: DataLoader(
        ds, BS, shuffle=True, drop_last=True, generator=torch.Generator()
    ),
    "DataLoader in order that drops the last": lambda ds: DataLoader(ds, BS, drop_last=True),
}


@few_cores
@pytest.mark.parametrize("make_loader", IN_ORDER.values(), ids=IN_ORDER)
def test_predictions_come_in_dataset_order_each_sample_once(make_loader: Callable[[TensorDataset], Any]):
    x, y = numbered()
    model = nn.Linear(1, 2)
    learn = Learner(([(x, y)], None), model)
    preds, targets, losses = learn.get_preds(make_loader(TensorDataset(x, y)), with_loss=True)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(preds, expected)
    assert torch.equal(targets, y)
    torch.testing.assert_close(losses, nn.functional.cross_entropy(expected, y, reduction="none"))


def test_validation_of_a_shuffled_training_loader_that_drops_counts_every_sample():
    x, y = numbered()
    learn = Learner(DataBunch.create(TensorDataset(x, y), bs=BS), model := nn.Linear(1, 2))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(x), y).item()
    assert learn.validate(learn.data.train_dl)["valid_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_sampler_of_the_users_own_is_kept_in_an_evaluation():
    x, y = numbered()
    loader = DataLoader(TensorDataset(x, y), BS, sampler=[3, 1, 2])
    learn = Learner(([(x, y)], None), model := nn.Linear(1, 2))
    torch.testing.assert_close(learn.get_preds(loader)[0], model(x[[3, 1, 2]]).detach())


# --- from_tensors, create, TensorLoader --------------------------------------
def test_from_tensors_cuts_the_same_batches_as_a_loader_over_the_same_tensors():
    x, y = numbered()
    for drop_last, bs in itertools.product((True, False), (1, 4, 5, 22)):
        tensors = DataBunch.from_tensors((x, y), (x, y), bs=bs, seed=9, drop_last=drop_last)
        loaders = DataBunch.create(TensorDataset(x, y), TensorDataset(x, y), bs=bs, seed=9, drop_last=drop_last)
        for _ in range(2):
            for ours, theirs in ((tensors.train_dl, loaders.train_dl), (tensors.valid_dl, loaders.valid_dl)):
                assert ours is not None and theirs is not None
                assert ids(ours) == ids(theirs)


@pytest.mark.parametrize(
    "make_data",
    [
        lambda x, y, **o: DataBunch.from_tensors((x, y), (x, y), (x, y), **o),
        lambda x, y, **o: DataBunch.create(*[TensorDataset(x, y)] * 3, **o),
    ],
    ids=["from_tensors", "create"],
)
def test_only_training_batches_are_shuffled_and_dropped_and_val_bs_is_for_the_others(make_data: Any):
    data = make_data(*numbered(), bs=BS, val_bs=10)
    for loader in (data.valid_dl, data.test_dl):
        assert ids(loader) == [list(range(10)), list(range(10, 20)), [20, 21]]
    assert [len(batch) for batch in ids(data.train_dl)] == [BS] * 5 and flat(ids(data.train_dl)) != list(range(20))
    assert (len(data.train_dl), len(data.valid_dl)) == (5, 3)
    assert [len(b) for b in ids(make_data(*numbered(), bs=BS, drop_last=False).train_dl)] == [BS] * 5 + [2]


def test_batch_transforms_are_applied_in_order_to_the_first_input_of_each_batch():
    x, y = numbered()
    data = DataBunch.from_tensors((x, x, y), (x, x, y), bs=22, batch_tfms=[lambda x: x + 1, lambda x: x * 2])
    for loader in (data.train_dl, data.valid_dl):
        [(first, second, _)] = list(loader or ())
        assert torch.equal(first, (second + 1) * 2)


def test_a_pair_of_batch_transforms_is_one_for_training_and_one_for_the_rest():
    x, y = numbered()
    data = DataBunch.from_tensors((x, y), (x, y), bs=22, batch_tfms=([lambda x: x * 0 + 3], []))
    [(first, _)] = list(data.train_dl)
    assert (first == 3).all() and data.valid_dl is not None
    assert torch.equal(next(iter(data.valid_dl))[0], x)


def test_tensors_of_any_number_are_cut_alike_and_stay_on_their_device():
    loader = TensorLoader((torch.arange(5), torch.arange(5) * 2, torch.arange(5) * 3), bs=2, shuffle=True, seed=1)
    for a, b, c in loader:
        assert torch.equal(a * 2, b) and torch.equal(a * 3, c) and a.device.type == "cpu"
    assert len(loader) == 3 and sorted(torch.cat([a for a, *_ in loader]).tolist()) == list(range(5))


def test_iterating_by_hand_walks_through_the_epochs_of_a_fit():
    data = DataBunch.from_tensors(numbered(), bs=BS, seed=5)
    by_hand = [ids(data.train_dl) for _ in range(3)]
    assert by_hand == order_of(DataBunch.from_tensors(numbered(), bs=BS, seed=5))


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return i, i * i


def test_create_passes_samples_through_collate_fn():
    def collate(samples: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.tensor([[float(x)] for x, _ in samples]), torch.tensor([[float(y)] for _, y in samples])

    data = DataBunch.create(Squares(), Squares(), bs=2, num_workers=0, collate_fn=collate)
    assert data.valid_dl is not None
    assert [y[:, 0].tolist() for _, y in data.valid_dl] == [[0, 1], [4, 9], [16, 25]]
    assert sorted(flat(ids(data.train_dl))) == list(range(6))


def test_the_classes_of_a_dataset_are_the_datas():
    class Named(Squares):
        classes = ["even", "odd"]

    assert DataBunch.create(Named(), bs=2).classes == ["even", "odd"]
    assert DataBunch.from_tensors(numbered(), bs=2, classes=("a", "b")).classes == ["a", "b"]


def test_the_datas_loss_function_is_the_learners_where_it_is_given_none():
    x = torch.randn(8, 2)
    data = DataBunch([(x, x)], loss_func=nn.functional.l1_loss)
    learn = Learner(data, model := nn.Linear(2, 2))
    expected = nn.functional.l1_loss(model(x), x).item()
    assert learn.fit(1).recorder.losses == [expected]
    own = Learner(data, model, loss_func=nn.MSELoss())
    expected = nn.functional.mse_loss(model(x), x).item()
    assert own.fit(1).recorder.losses == [expected]


# --- one_batch ---------------------------------------------------------------
ONE_BATCH: dict[str, Callable[[TensorDataset], DataBunch]] = {
    "from_tensors": lambda ds: DataBunch.from_tensors(ds.tensors, bs=BS, seed=5),
    "create": lambda ds: DataBunch.create(ds, bs=BS, seed=5),
    "generator": lambda ds: DataBunch(DataLoader(ds, BS, shuffle=True, generator=torch.Generator().manual_seed(3))),
    "list": lambda ds: DataBunch([ds[i : i + BS] for i in range(0, N, BS)]),
}


@pytest.mark.parametrize("make_data", ONE_BATCH.values(), ids=ONE_BATCH)
def test_one_batch_is_the_first_of_the_next_pass_and_moves_nothing(make_data: Callable[[TensorDataset], DataBunch]):
    dataset = TensorDataset(*numbered())
    data, state = make_data(dataset), torch.get_rng_state()
    seen = [ids([data.one_batch()]), ids([data.one_batch()])]
    assert torch.equal(torch.get_rng_state(), state)
    order = order_of(data)
    assert order == order_of(make_data(dataset)) and seen[0] == seen[1] == order[0][:1]


def test_one_batch_of_a_shuffled_loader_leaves_the_global_random_state():
    data = DataBunch(DataLoader(TensorDataset(*numbered()), BS, shuffle=True))
    state = torch.get_rng_state()
    data.one_batch()
    assert torch.equal(torch.get_rng_state(), state)


def test_one_batch_in_the_middle_of_a_fit_leaves_the_order():
    class Peek(Callback):
        def after_batch(self, learn):
            learn.data.one_batch()

    def fresh() -> DataBunch:
        return DataBunch.create(TensorDataset(*numbered()), bs=BS, seed=5)

    assert order_of(fresh(), callbacks=[Peek()]) == order_of(fresh())
