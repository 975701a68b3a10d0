"""Draws are a pure function of (seed, epoch, sample), uniform, and independent of each other."""

import math

import pytest
import torch

from learnkit.data.loaders import TensorLoader
from learnkit.data.prefetch import ahead
from learnkit.data.random import Draws, SampleTransform, scramble, transform_batch


def draws(*index: int, seed: int = 0, epoch: int = 0, place: int = 0) -> Draws:
    return Draws(seed, epoch, torch.tensor(index), place)


def test_scramble_is_the_finalizer_of_splitmix64():
    def by_hand(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    numbers = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF, 0xFEDCBA9876543210]
    signed = [n - 2**64 if n >= 2**63 else n for n in numbers]
    assert [n % 2**64 for n in scramble(torch.tensor(signed)).tolist()] == [by_hand(n) for n in numbers]


def test_a_sample_draws_the_same_in_every_batch():
    together, alone = draws(*range(100)), draws(37)
    assert together.uniform()[37] == alone.uniform()[0]
    assert together.integers(1000)[37] == alone.integers(1000)[0]
    assert torch.equal(together.uniform(0, 1, 3, 2)[37], alone.uniform(0, 1, 3, 2)[0])


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"place": 1}])
def test_seed_epoch_and_place_each_give_other_numbers(other):
    assert not (draws(*range(100)).uniform() == draws(*range(100), **other).uniform()).any()


def test_each_call_gives_new_numbers():
    d = draws(*range(100))
    assert not (d.uniform() == d.uniform()).any()


def test_uniform_numbers_are_uniform_and_uncorrelated():
    n = 100_000
    d = draws(*range(n))
    x, y = d.uniform(), d.uniform()
    assert x.min() >= 0 and x.max() < 1
    counts = torch.histc(x, 100, 0, 1)
    chi2 = ((counts - n / 100).square() / (n / 100)).sum().item()
    assert abs(chi2 - 99) < 4.5 * math.sqrt(2 * 99)
    for a, b in ((x, y), (x[1:], x[:-1])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4.5 / math.sqrt(n)
    within = draws(*range(1000)).uniform(0, 1, 100)
    assert abs(torch.corrcoef(within.T)[0, 1:]).max() < 4.5 / math.sqrt(1000)


def test_integers_are_each_equally_frequent():
    counts = torch.bincount(draws(*range(90_000)).integers(9), minlength=9)
    assert len(counts) == 9 and (counts - 10_000).abs().max() < 4.5 * math.sqrt(10_000)


def test_uniform_stays_within_its_range():
    x = draws(*range(10_000)).uniform(-2, 3)
    assert -2 <= x.min() < -1.99 and 2.99 < x.max() <= 3


class Shift(SampleTransform):
    def __call__(self, x, draws):
        return x + draws.uniform()


def test_a_loader_hands_out_the_draws_of_its_samples_and_plain_functions_still_work():
    x = torch.zeros(10)
    loader = TensorLoader((x, torch.arange(10)), bs=4, shuffle=True, seed=3, batch_tfms=[Shift(), lambda x: x * 2])
    loader.set_epoch(5)
    seen = {int(i): float(v) for xb, ib in loader for v, i in zip(xb, ib, strict=False)}
    assert seen == {i: 2 * float(Draws(3, 5, torch.tensor([i])).uniform()) for i in range(10)}


def test_batches_of_every_size_share_and_place_have_the_same_draws():
    def seen(loaders):
        return sorted(
            (int(i), float(v)) for loader in loaders for xb, ib in loader for v, i in zip(xb, ib, strict=False)
        )

    def loader(bs):
        return TensorLoader((torch.zeros(12), torch.arange(12)), bs=bs, shuffle=True, seed=1, batch_tfms=[Shift()])

    whole, rest = seen([loader(12)]), seen([loader(3).rest(6)])
    assert whole == seen([loader(3)]) == seen([loader(3).sharded(rank, 2, even=True) for rank in range(2)])
    assert set(rest) < set(whole) and len(rest) == 6


def test_in_order_keeps_the_seed():
    loader = TensorLoader((torch.zeros(4),), bs=4, seed=7, batch_tfms=[Shift()])
    assert torch.equal(next(iter(loader))[0], next(iter(loader.in_dataset_order()))[0])


def test_batches_cut_ahead_are_the_same_ones():
    tensors = (torch.randn(50), torch.arange(50))
    plain, early = (TensorLoader(tensors, bs=8, shuffle=True, seed=2, batch_tfms=[Shift()], n_ahead=n) for n in (0, 2))
    for a, b in zip(plain, early, strict=True):
        assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


def test_batches_cut_ahead_go_to_the_device_while_the_tensors_stay():
    loader = TensorLoader((torch.zeros(8, 2),), bs=4, n_ahead=2).to(torch.device("meta"))
    assert [batch[0].device.type for batch in loader] == ["meta"] * 2 and loader.tensors[0].device.type == "cpu"
    with pytest.raises(ValueError, match="needs n_ahead=1 or more; else move the tensors there"):
        TensorLoader((torch.zeros(8),), device=torch.device("meta"))


def test_ahead_raises_what_was_raised_in_its_place_and_ends_its_thread():
    import threading

    def items():
        yield 1
        raise KeyError("two")

    before = threading.active_count()
    reader = ahead(items(), 3)
    assert next(reader) == 1
    with pytest.raises(KeyError, match="two"):
        next(reader)
    endless = ahead(iter(int, 1), 2)
    next(endless)
    endless.close()
    assert threading.active_count() == before


def test_no_index_is_made_for_transforms_that_do_not_ask():
    def refuse():
        raise AssertionError

    assert transform_batch(torch.ones(2), [torch.neg], 0, 0, refuse).tolist() == [-1, -1]
