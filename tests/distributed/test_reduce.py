"""Sums, rows, objects and flags: what ranks tell each other."""

import signal
import threading
import time
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from learnkit.distributed import (
    RankFailed,
    agree,
    all_sum,
    barrier,
    broadcast_from_main,
    destroy_process_group,
    gather_for_metrics,
    gather_objects,
    gather_on_main,
    get_rank,
    init_process_group,
    launch,
    on_main,
    rank0_first,
)
from learnkit.distributed.reduce import broadcast_into

Pair = namedtuple("Pair", "loss, n")


def same(a, b) -> bool:
    """Equal in structure, types, dtypes, shapes and values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# --- sums --------------------------------------------------------------------
def test_sums_keep_structure_shape_and_dtype(ranks):
    def fn():
        r = get_rank() + 1
        return all_sum(
            {"loss": torch.tensor(0.5 * r), "counts": [torch.tensor([r, 10 * r]), r], "pair": Pair(1.5 * r, r)}
        )

    expected = {"loss": torch.tensor(1.5), "counts": [torch.tensor([3, 30]), 3], "pair": Pair(4.5, 3)}
    assert all(same(result, expected) for result in ranks(2, fn))


def test_whole_numbers_are_summed_exactly(ranks):
    big = 2**62 + 1
    assert ranks(2, lambda: all_sum(torch.tensor([big if get_rank() else -3]))) == [torch.tensor([big - 3])] * 2


def test_flags_count_and_half_precision_does_not_overflow(ranks):
    def fn():
        return all_sum([torch.tensor([True, False]), torch.tensor(60000.0, dtype=torch.float16)])

    assert same(ranks(2, fn)[0], [torch.tensor([2, 0]), torch.tensor(120000.0)])


def test_all_sums_travel_in_one_collective_and_what_was_given_stays():
    def fn():
        init_process_group()
        given = {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.float64), "c": torch.tensor(4)}
        with torch.profiler.profile() as profile:
            all_sum(given)
        destroy_process_group()
        n = sum("gloo:all_reduce" in event.name for event in profile.events())
        return n, [t.sum().item() for t in given.values()]

    assert launch(fn, 2) == (1, [3, 4, 4])


def test_sums_and_counts_of_two_ranks_are_the_single_process_ones(ranks):
    losses = torch.randn(33, dtype=torch.float32)

    def fn():
        own = losses.split([20, 13])[get_rank()]
        total, n = all_sum((own.sum(), len(own)))
        return (total / n).item()

    assert ranks(2, fn) == pytest.approx([losses.mean().item()] * 2, abs=1e-6)


# --- rows --------------------------------------------------------------------
@pytest.mark.parametrize("sizes", [(2, 3), (0, 4), (5, 0), (0, 0)])
def test_unequal_numbers_of_rows_are_gathered_in_rank_order(ranks, sizes):
    rows, labels = torch.randn(sum(sizes), 3, dtype=torch.bfloat16), torch.arange(sum(sizes))

    def fn():
        r = get_rank()
        return gather_for_metrics((rows.split(sizes)[r], {"label": labels.split(sizes)[r]}))

    assert all(same(result, (rows, {"label": labels})) for result in ranks(2, fn))


def test_a_rank_without_any_batch_gives_none_or_shapeless_rows(ranks):
    def fn():
        empty = get_rank() == 0
        first = gather_for_metrics(None if empty else {"x": torch.ones(2, 3)})
        return first, gather_for_metrics(torch.empty(0) if empty else torch.ones(2, 3, dtype=torch.int32))

    expected = ({"x": torch.ones(2, 3)}, torch.ones(2, 3, dtype=torch.int32))
    assert all(same(result, expected) for result in ranks(2, fn))


def test_numbers_and_scalars_become_one_row_a_rank(ranks):
    assert ranks(3, lambda: gather_for_metrics((torch.tensor(get_rank()), get_rank() * 2))[0].tolist())[1] == [0, 1, 2]


def columns() -> dict[str, Tensor]:
    """Every way for rows to lie in memory, and every kind of number."""
    table = torch.arange(42.0).reshape(6, 7)
    pictures = torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    complex_ = torch.complex(table, table + 1)
    return {
        "one row of a column": table[:1, 0],
        "one row, stride 7": table[:1, :1],
        "no row": table[:0, 0],
        "no row, stride 7": table[:0],
        "no column": table[:, :0],
        "a column": table[:, 2],
        "every second": table[::2, ::3],
        "turned": table.t(),
        "flipped": table.flip(0),
        "expanded": table[:1].expand(4, 7),
        "one row expanded": torch.ones(1).expand(1),
        "a row of one, stride 0": torch.tensor(3.0).expand(1, 1),
        "channels last": pictures,
        "one picture": pictures[:1],
        "one channel": pictures[:, :1],
        "bool": table[:, 0] > 8,
        "one bool": table[:1, 0] > 8,
        "half": table[:1, 0].half(),
        "int8": table.to(torch.int8)[:, 3],
        "complex": complex_[:, 1],
        "conjugate": complex_[:1, 1].conj(),
        "negative": complex_[:, 1].conj().imag,
        "one negative": complex_[:1, 1].conj().imag,
        "with a gradient": table[:1, 0].clone().requires_grad_(),
        "a part of a memory": table[2:3, 3],
    }


def test_rows_arrive_whatever_their_strides_and_dtypes(ranks):
    def fn() -> list[Any]:
        own = {name: rows if get_rank() == 0 else rows.detach().clone() for name, rows in columns().items()}
        return [gather_for_metrics(own), gather_objects(own), broadcast_from_main(own), gather_on_main(own)]

    expected = columns()
    for rank, (gathered, objects, shared, of_main) in enumerate(ranks(2, fn)):
        for name, rows in expected.items():
            twice = torch.cat([rows.detach(), rows.detach()])
            assert torch.equal(gathered[name], twice) and gathered[name].dtype == rows.dtype, name
            for whole in (*objects, shared, *of_main):
                assert torch.equal(whole[name], rows) and whole[name].dtype == rows.dtype, name
        assert len(of_main) == (0 if rank else 2)


def test_values_of_rank_0_arrive_in_tensors_of_any_strides(ranks):
    def fn() -> list[Any]:
        own = [
            t.detach().clone() + (get_rank() if not t.is_complex() and t.dtype != torch.bool else 0)
            for t in columns().values()
        ]
        table = torch.full((6, 7), float(get_rank()))
        broadcast_into([table[:1, 0], table[:, 2], table[:0, 3], *own])
        broadcast_into([table[5:, 6]])
        return [table, *own]

    (table, *first), (other, *second) = ranks(2, fn)
    assert table.sum() == 0 and (other == 0).sum() == 8  # a column, the first number, and the last one
    assert all(map(torch.equal, first, second))


def test_complex_numbers_are_summed_as_they_are(ranks):
    def fn() -> Any:
        return all_sum({"z": torch.tensor([1 + 2j, 3j])[:1].conj() * (1 + get_rank()), "n": 1})

    for found in ranks(2, fn):
        assert found["z"].tolist() == [3 - 6j] and found["n"] == 2


def test_rows_that_do_not_fit_raise_on_every_rank(ranks):
    def fn():
        try:
            gather_for_metrics(torch.ones(2, 3 + get_rank()))
        except ValueError as error:
            return str(error)

    message = (
        "gather_for_metrics cannot join float32 (2, 3), float32 (2, 4): only the first dimension may differ between "
        "ranks."
    )
    assert ranks(2, fn) == [message, message]


# --- objects -----------------------------------------------------------------
OBJECT = {"name": "wrn", 3: (1, None, [True, 2.5, float("inf")]), ("a", 1): torch.tensor([[1j, 2]]), "long": "é" * 3000}


def test_objects_of_any_length_arrive_as_they_were(ranks):
    def fn():
        return gather_objects({**OBJECT, "rank": get_rank()}), broadcast_from_main(OBJECT if get_rank() == 0 else 1)

    for gathered, received in ranks(2, fn):
        assert same(received, OBJECT)
        assert same(gathered, [{**OBJECT, "rank": 0}, {**OBJECT, "rank": 1}])


def test_an_object_that_cannot_travel_raises_on_every_rank(ranks):
    def fn():
        messages = []
        for send in (gather_objects, broadcast_from_main):
            try:
                send({1} if get_rank() == 0 else 1)
            except TypeError as error:
                messages.append(str(error))
        return messages

    for messages in ranks(2, fn):
        assert len(messages) == 2
        assert all(m.startswith("rank 0: cannot send a set between ranks: expected None, a bool") for m in messages)


# --- flags -------------------------------------------------------------------
def test_one_raised_flag_is_everybodys(ranks):
    def fn():
        return agree(get_rank() == 1), agree(False), agree(10 * get_rank())

    results = ranks(2, fn)
    assert results == [(True, False, 10)] * 2
    assert [type(value) for value in results[0]] == [bool, bool, int]


def test_signals_are_heard_while_a_rank_waits_for_another(ranks):
    def fn():
        heard = []
        signal.signal(signal.SIGUSR2, lambda *_: heard.append(time.monotonic()))
        start = time.monotonic()
        if get_rank() == 0:
            threading.Timer(0.2, signal.raise_signal, (signal.SIGUSR2,)).start()
        else:
            time.sleep(1)
        barrier()
        return heard[0] - start if heard else None

    assert ranks(2, fn)[0] < 0.9


def test_a_group_must_be_there_before_its_collectives():
    with pytest.raises(RankFailed, match=r"this is rank \d of 2, but there is no process group yet: call"):
        launch(lambda: all_sum(1), 2)


# --- alone -------------------------------------------------------------------
def test_a_world_of_one_gives_back_what_it_was_given():
    x = torch.randn(3, 2)
    assert same(all_sum({"x": x, "n": 3}), {"x": x, "n": 3})
    assert same(gather_for_metrics((x, torch.tensor(2))), (x, torch.tensor([2])))
    assert gather_objects("a") == ["a"]
    assert broadcast_from_main("a") == "a"
    assert agree(True) is True and agree(5) == 5
    barrier()
    with rank0_first():
        pass


# --- one by one --------------------------------------------------------------
def test_rank_0_goes_first_before_and_after_the_group_exists(tmp_path):
    def fn():
        seen = []
        for file in (tmp_path / "a", tmp_path / "b"):
            with rank0_first():
                seen.append(file.exists())
                if get_rank() == 0:
                    time.sleep(0.2)
                file.touch()
            init_process_group()
        destroy_process_group()
        return seen

    assert launch(fn, 3, every_rank=True, timeout=30) == [[False, False], [True, True], [True, True]]


def test_an_error_of_the_first_one_is_told_to_those_who_wait(ranks):
    def fn():
        try:
            with rank0_first():
                if get_rank() == 0:
                    raise OSError("no space left")
        except (OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    expected = "RuntimeError: rank 0 goes first on this machine, and failed in rank0_first: OSError: no space left"
    assert ranks(2, fn) == ["OSError: no space left", expected]


def test_a_death_of_the_first_one_is_noticed_by_those_who_wait():
    def fn():
        import os

        with rank0_first():
            if get_rank() == 0:
                os._exit(9)
            return "went in"

    with pytest.raises(
        RankFailed, match=r"rank 0, which goes first on this machine, is gone|rank 0 of 2 failed: it ended with"
    ):
        launch(fn, 2, timeout=20)


# --- for rank 0 alone --------------------------------------------------------
def test_rank_0_alone_gets_what_all_get_and_turns_stay_in_step(ranks, tmp_path):
    def fn():
        own = {
            "rank": get_rank(),
            "rows": torch.arange(get_rank() * 1000.0),
            "none": None,
            (1, "a"): [torch.tensor(True), 2.5],
        }
        found, of_all = gather_on_main(own), gather_objects(own)
        for k in range(2):
            on_main(lambda k=k: (tmp_path / f"{k}").touch(), "touch a file")
        barrier()
        if get_rank():
            return found
        return [
            [str(a) == str(b) for a, b in zip(found, of_all, strict=True)],
            len(found),
            len(list(tmp_path.iterdir())),
        ]

    first, *others = ranks(3, fn)
    assert first == [[True] * 3, 3, 2] and others == [[], []]


def test_what_cannot_be_sent_to_rank_0_is_told_to_all(ranks):
    def fn():
        try:
            gather_on_main(object() if get_rank() == 1 else 1)
        except TypeError as error:
            return str(error)

    first, second = ranks(2, fn)
    assert "rank 1 has something" in first and "cannot send a object" in second


def test_alone_rank_0_has_its_own():
    assert gather_on_main([1]) == [[1]]
