"""Sharding: the k-th global batch is the same at every world size; plain functions first, then samplers and loaders."""

import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from learnkit.data.shares import n_rank_batches, rank_batches
from learnkit.distributed import (
    ShardedBatchSampler,
    ShardedLoader,
    ShardedStream,
    dataset_order,
    get_rank,
    get_world_size,
    prepare_data_loader,
    set_epoch,
)

SIZES, BATCH_SIZES, WORLDS = range(1, 34), range(1, 7), range(1, 4)


def all_cases():
    return [(n, b, w) for n in SIZES for b in BATCH_SIZES for w in WORLDS]


def steps(n: int, b: int, w: int, **options) -> list[list[list[int]]]:
    """[rank][step] -> samples, of a shuffled order."""
    order = random.Random(n).sample(range(n), n)
    return [list(map(list, rank_batches(order, b, rank, w, **options))) for rank in range(w)]


# --- plain functions ---------------------------------------------------------
@pytest.mark.parametrize("drop_last", [False, True])
def test_training_shards_have_equal_steps_and_each_sample_at_most_once(drop_last):
    for n, b, w in all_cases():
        shards = steps(n, b, w, drop_last=drop_last)
        assert len({len(shard) for shard in shards}) == 1
        seen = Counter(chain.from_iterable(chain.from_iterable(shards)))
        rest = n % (b * w)
        assert max(seen.values(), default=1) == 1 and len(seen) == n - (rest if drop_last or rest < w else 0)
        assert all(len(batch) == b for shard in shards for batch in shard[: n // (b * w)])
        assert all(max(map(len, last)) - min(map(len, last)) <= 1 for last in zip(*shards, strict=True))


def test_the_kth_global_batch_is_the_same_at_every_world_size_with_the_same_global_batch_size():
    for n in SIZES:
        for global_size in (6, 12):
            whole = {
                w: [list(chain(*parts)) for parts in zip(*steps(n, global_size // w, w), strict=True)]
                for w in (1, 2, 3)
            }
            for w in (2, 3):
                left_out = 0 < n % global_size < w  # fewer samples than ranks
                assert whole[w] == whole[1][: len(whole[1]) - left_out]


def test_evaluation_shards_see_each_sample_exactly_once():
    for n, b, w in all_cases():
        shards = steps(n, b, w, even=False)
        assert sorted(chain.from_iterable(chain.from_iterable(shards))) == list(range(n))
        assert all(0 < len(batch) <= b for shard in shards for batch in shard)


def test_lengths_are_told_without_reading():
    for n, b, w in all_cases():
        for options in ({"even": False}, {"even": True}, {"even": True, "drop_last": True}):
            told = [n_rank_batches(n, b, rank, w, **options) for rank in range(w)]
            assert told == [len(shard) for shard in steps(n, b, w, **options)]


def test_gathered_rows_are_put_into_dataset_order():
    for n, b, w in all_cases():
        gathered = [i for rank in range(w) for batch in rank_batches(range(n), b, rank, w, even=False) for i in batch]
        assert torch.tensor(gathered)[dataset_order(n, b, w)].tolist() == list(range(n))


# --- samplers ----------------------------------------------------------------
class Shuffled(Sampler[int]):
    """As users write them: draws from whichever global generator it likes."""

    def __init__(self, n: int, shuffle):
        self.n, self.shuffle = n, shuffle

    def __len__(self):
        return self.n

    def __iter__(self):
        order = list(range(self.n))
        self.shuffle(order)
        yield from order


def torch_shuffle(order: list[int]) -> None:
    order[:] = [order[i] for i in torch.randperm(len(order))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shuffled(18, random.shuffle),
        lambda: Shuffled(18, np.random.shuffle),
        lambda: Shuffled(18, torch_shuffle),
        lambda: WeightedRandomSampler([1.0] * 18, 18),
        lambda: WeightedRandomSampler([1.0] * 18, 18, generator=torch.Generator().manual_seed(random.getrandbits(30))),
    ],
    ids=["random", "numpy", "torch", "weighted", "weighted, own generator"],
)
def test_ranks_agree_on_a_users_sampler_whatever_their_random_states(make):
    seen = []
    for rank in range(2):
        torch.manual_seed(rank), random.seed(rank), np.random.seed(rank)
        sampler = ShardedBatchSampler(make(), 2, rank=rank, world_size=2, seed=5)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        seen.append([list(sampler), list(sampler)])
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all()
    alone = ShardedBatchSampler(make(), 4, rank=0, world_size=1, seed=5)
    for epoch in range(2):
        joined = [a + b for a, b in zip(seen[0][epoch], seen[1][epoch], strict=True)]
        assert joined == list(alone)
    assert seen[0][0] != seen[0][1]


def test_epochs_count_by_themselves_and_can_be_set():
    sampler = ShardedBatchSampler(Shuffled(9, random.shuffle), 2, rank=0, world_size=1)
    first, second = list(sampler), list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second == list(sampler)


def test_a_batch_sampler_is_dealt_out_in_rounds():
    batches = BatchSampler(SequentialSampler(range(14)), 3, drop_last=False)
    train = [list(ShardedBatchSampler(batches, None, rank=r, world_size=2)) for r in range(2)]
    assert train == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
    evaluated = [list(ShardedBatchSampler(batches, None, rank=r, world_size=2, even=False)) for r in range(2)]
    assert evaluated == [[[0, 1, 2], [6, 7, 8], [12, 13]], [[3, 4, 5], [9, 10, 11]]]
    assert [len(ShardedBatchSampler(batches, None, rank=r, world_size=2, even=False)) for r in range(2)] == [3, 2]


def test_an_endless_sampler_is_read_no_further_than_needed():
    class Endless(Sampler[int]):
        def __iter__(self):
            while True:
                yield random.randrange(100)

    sampler = ShardedBatchSampler(Endless(), 2, rank=1, world_size=2)
    assert len(next(iter(sampler))) == 2
    with pytest.raises(TypeError, match="Endless has no len"):
        len(sampler)


def test_what_cannot_be_read_again_is_refused():
    with pytest.raises(TypeError, match=r"sampler is a \w*iterator, which can be read only once"):
        ShardedBatchSampler(iter([1]), 2)


# --- loaders -----------------------------------------------------------------
def passes(loader, n: int = 2) -> list[list[list[int]]]:
    return [[batch.tolist() for batch in loader] for _ in range(n)]


def joined(by_rank) -> list[list[list[int]]]:
    """[epoch][step] -> the global batch."""
    return [[list(chain(*parts)) for parts in zip(*epoch, strict=True)] for epoch in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_shuffled_loader_gives_the_same_global_batches_at_every_world_size(ranks, n_workers):
    def fn():
        torch.manual_seed(get_rank())  # must not matter
        options = {"num_workers": n_workers, "persistent_workers": n_workers > 0}
        loader = DataLoader(range(23), batch_size=4 // get_world_size(), shuffle=True, **options)
        return passes(prepare_data_loader(loader, seed=7))

    alone = passes(prepare_data_loader(DataLoader(range(23), batch_size=4, shuffle=True), seed=7))
    assert joined(ranks(2, fn)) == alone
    assert alone[0] != alone[1]


def test_without_a_seed_the_ranks_agree_on_rank_0s(ranks):
    def fn():
        torch.manual_seed(get_rank())
        return passes(prepare_data_loader(DataLoader(range(12), batch_size=2, shuffle=True)))

    for epoch in joined(ranks(3, fn)):
        assert sorted(chain(*epoch)) == list(range(12))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_an_unshuffled_loader_is_for_evaluation_and_unpadded(ranks, n):
    def fn():
        return passes(prepare_data_loader(DataLoader(range(n), batch_size=2)), 1)[0]

    assert sorted(chain(*chain(*ranks(3, fn)))) == list(range(n))


def test_an_unshuffled_training_loader_keeps_step(ranks):
    def fn():
        return len(passes(prepare_data_loader(DataLoader(range(9), batch_size=2), training=True), 1)[0])

    assert ranks(2, fn) == [2, 2]


class MyLoader(DataLoader):
    """A subclass with settings of its own."""

    def __init__(self, *args, scale: int, **options):
        super().__init__(*args, **options)
        self.scale = scale

    def __iter__(self):
        return (batch * self.scale for batch in super().__iter__())


def test_every_setting_of_a_loader_is_kept():
    generator = torch.Generator()
    loader = MyLoader(
        range(9),
        batch_size=2,
        shuffle=True,
        scale=10,
        num_workers=1,
        timeout=30,
        prefetch_factor=3,
        collate_fn=torch.tensor,
        worker_init_fn=print,
        generator=generator,
        persistent_workers=True,
        multiprocessing_context="fork",
        in_order=False,
    )
    sharded = prepare_data_loader(loader, seed=1)
    assert type(sharded) is MyLoader and sharded is not loader
    names = [name for name in vars(loader) if name not in ("batch_sampler", "_iterator")]
    assert all(getattr(sharded, name) is getattr(loader, name) for name in names) and len(names) > 15
    assert isinstance(sharded.batch_sampler, ShardedBatchSampler) and isinstance(loader.batch_sampler, BatchSampler)


def test_augmentations_differ_between_ranks(ranks):
    class Noise(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return torch.rand(())

    def fn():
        torch.manual_seed(0)
        loader = prepare_data_loader(DataLoader(Noise(), batch_size=2, shuffle=True, num_workers=1), seed=0)
        return [value for batch in passes(loader) for value in chain(*batch)]

    values = list(chain(*ranks(2, fn)))
    assert len(set(values)) == len(values) == 8


def test_a_distributed_sampler_stays_and_hears_the_epoch(ranks):
    def fn():
        loader = DataLoader(range(8), batch_size=2, sampler=DistributedSampler(range(8)))
        assert prepare_data_loader(loader) is loader
        set_epoch(loader, 3)
        return loader.sampler.epoch

    assert ranks(2, fn) == [3, 3]


def test_a_batch_sampler_and_a_list_of_batches_are_dealt_out(ranks):
    def fn():
        by_length = prepare_data_loader(DataLoader(range(9), batch_sampler=[[0, 1, 2], [3, 4], [5, 6], [7], [8]]))
        plain = prepare_data_loader(["a", "b", "c"], training=False)
        return passes(by_length, 1)[0], list(plain), len(plain)

    assert ranks(2, fn) == [([[0, 1, 2], [5, 6]], ["a", "c"], 2), ([[3, 4], [7]], ["b"], 1)]


def test_torchs_own_batch_sampler_is_sharded_by_sample(ranks):
    def fn():
        batch_sampler = BatchSampler(SequentialSampler(range(10)), 2, drop_last=False)
        return passes(prepare_data_loader(DataLoader(range(10), batch_sampler=batch_sampler)), 1)[0]

    assert ranks(2, fn) == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]]


def test_epochs_reach_the_sampler_below_every_kind_of_loader():
    class Listens:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([[1]])

    inner = Listens()
    set_epoch(ShardedLoader(inner, rank=0, world_size=1), 4)
    assert inner.epoch == 4
    loader = prepare_data_loader(DataLoader(range(4), batch_size=2, shuffle=True), seed=0)
    set_epoch(loader, 6)
    assert loader.batch_sampler.epoch == 6


# --- streams -----------------------------------------------------------------
class Stream(IterableDataset):
    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        return iter(range(self.n))


def test_a_stream_is_refused_with_the_recipe(ranks):
    def fn():
        try:
            prepare_data_loader(DataLoader(Stream(8), batch_size=2))
        except TypeError as error:
            return str(error)

    [message, _] = ranks(2, fn)
    for part in (
        "Stream is an IterableDataset: each rank",
        "DataLoader(ShardedStream(Stream(…), batch_size), batch_size)",
        "get_rank() * num_workers + get_worker_info().id",
    ):
        assert part in message


@pytest.mark.parametrize("n_workers", [0, 1, 2])
@pytest.mark.parametrize("even", [True, False])
def test_a_wrapped_stream_follows_the_rule_for_any_number_of_workers(n_workers, even):
    n, b, w = 23, 2, 2
    for rank in range(w):
        stream = ShardedStream(Stream(n), b, rank=rank, world_size=w, even=even)
        expected = [list(batch) for batch in rank_batches(range(n), b, rank, w, even=even, drop_last=even)]
        assert passes(DataLoader(stream, batch_size=b, num_workers=n_workers), 1)[0] == expected


# --- alone -------------------------------------------------------------------
def test_a_world_of_one_leaves_loaders_alone():
    for loader in (DataLoader(range(4), shuffle=True), DataLoader(Stream(4)), [1, 2]):
        assert prepare_data_loader(loader) is loader


class Dealt(list):
    """A loader whose batches are this rank's own already, as those of a Ray dataset."""

    is_sharded = True


def test_a_loader_that_says_that_it_is_sharded_stays_as_it_is(ranks):
    def fn():
        loader = Dealt([get_rank()])
        return prepare_data_loader(loader) is loader and prepare_data_loader(loader, seed=1) is loader

    assert ranks(2, fn) == [True, True]
