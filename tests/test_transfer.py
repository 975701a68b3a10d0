"""Copies between the host and a device, as far as a CPU can show them; tests/accelerator shows the rest."""

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from learnkit.checkpoint import snapshot as snapshots
from learnkit.devices import staging
from learnkit.devices.nested import to_device
from learnkit.devices.transfer import Enqueued, Reading, mover, sent

CPU = torch.device("cpu")


def test_what_is_sent_to_the_cpu_is_the_same_tensor():
    tensor = torch.arange(3)
    assert sent(tensor, CPU) is tensor


def test_on_the_cpu_batches_stay_the_same_tensors():
    x, move = torch.ones(2), mover(CPU)
    for _ in range(3):
        found = move({"x": (x, [x, "text"])})
        assert found["x"][0] is x and found["x"][1][0] is x and found["x"][1][1] == "text"


def test_an_object_with_a_method_to_moves_itself_in_any_structure():
    class Graph:
        def to(self, device: torch.device) -> str:
            return f"on {device}"

    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    graph, (moved, *_) = to_device([Graph(), (packed,)], CPU)
    assert graph == "on cpu" and isinstance(moved, PackedSequence) and moved.batch_sizes.is_cpu


def test_a_reading_from_the_cpu_is_there_at_once():
    reading = Reading(torch.arange(3.0, requires_grad=True))
    assert reading.has_arrived and reading.tolist() == [0, 1, 2]


def test_what_is_enqueued_on_the_cpu_is_done():
    with Enqueued(CPU).awaited():
        assert torch.ones(2).sum() == 2


def test_a_copy_of_the_same_memory_is_one_and_a_later_copy_takes_its_place():
    x = torch.arange(6.0).view(2, 3)
    state = {"a": x, "b": [x, x.T], "c": x[:, :0], "d": x[:, :0], "e": (1, "text")}
    first = snapshots.copied_to_host(state)
    assert (
        first["a"].data_ptr() == first["b"][0].data_ptr() != x.data_ptr()
        and first["b"][1].data_ptr() != first["a"].data_ptr()
    )
    assert torch.equal(first["b"][1], x.T) and first["e"] == (1, "text")
    x += 1
    second = snapshots.copied_to_host(state, first)
    assert second["a"].data_ptr() == first["a"].data_ptr() and torch.equal(second["b"][1], x.T)
    apart = snapshots.copied_to_host({"a": x, "b": [x + 1, x.T]}, second)
    assert torch.equal(apart["a"], x) and torch.equal(apart["b"][0], x + 1)


def test_a_state_on_the_cpu_is_written_as_it_is():
    state = {"a": [torch.ones(2)], "b": 1}
    assert staging.on_host(state) is state


def test_bytes_are_cut_into_loads_of_one_size_across_tensors():
    pairs = [(torch.arange(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)) for n in (5, 0, 3, 9)]
    loads = list(staging.loads(pairs, 4))
    assert [[len(source) for source, _ in load] for load in loads] == [[4], [1, 3], [4], [4], [1]]
    for load in loads:
        for source, into in load:
            into.copy_(source)
    assert all(torch.equal(source, into) for source, into in pairs)
