"""Batches on their way to the device: the CPU's, in time, while the device works on the batch before, and without a
wait of the host.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.data import loaders as data
from learnkit.data.loaders import TensorLoader
from learnkit.data.random import Draws, SampleTransform
from learnkit.devices.accelerator import has_streams
from learnkit.devices.nested import tensors_in, to_device
from learnkit.devices.transfer import Reading, copy_stream, mover, pinned, sent
from learnkit.distributed import prepare_data_loader
from learnkit.vision.data import ImageDataBunch
from learnkit.vision.pictures import Pictures
from learnkit.vision.transform import flip_lr, rand_pad
from tests.accelerator import twin

N, BS = 48, 4
CPU = torch.device("cpu")
DEVICES = ("twin:0", "twin:1")  # the current one, and another
Pair = namedtuple("Pair", "a b")


class Shift(SampleTransform):
    """Random for each sample, by its number."""

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        return x + draws.uniform(-1.0, 1.0, 1)


class Pictured(Dataset[Any]):
    """Pictures that are made one by one."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return torch.randint(256, (3, 8, 8), dtype=torch.uint8), i % 3


def whole() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 6, generator=generator), torch.randint(3, (N,), generator=generator)


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = whole()
    return [(x[i : i + BS], y[i : i + BS]) for i in range(0, N, BS)]


def pictures() -> dict[str, Pictures]:
    generator = torch.Generator().manual_seed(1)

    def some(n: int) -> Pictures:
        return Pictures(
            torch.randint(256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8),
            torch.arange(n) % 3,
            [""] * n,
            ["a", "b", "c"],
        )

    return {"train": some(N), "valid": some(N)}


def dataset() -> TensorDataset:
    return TensorDataset(*whole())


def from_pictures(device: torch.device) -> ImageDataBunch:
    tfms = ([*rand_pad(2, 8), flip_lr(p=0.5)], [])
    return ImageDataBunch.from_pictures(pictures(), ds_tfms=tfms, bs=BS, seed=1, device=device)


def streamed(device: torch.device) -> ImageDataBunch:
    """Pictures of which the device has no room for all."""
    if device.type == "cpu":
        return from_pictures(device)
    twin.limit(2 * N * 3 * 8 * 8, device)
    try:
        bunch = from_pictures(device)
    finally:
        twin.limit(None, device)
    assert bunch.train_dl.n_ahead and bunch.train_dl.tensors[0].is_cpu  # type: ignore[attr-defined]
    return bunch


def one_by_one(device: torch.device, n_workers: int) -> ImageDataBunch:
    return ImageDataBunch.from_dataset(
        Pictured(), Pictured(), ds_tfms=([flip_lr(p=0.5)], []), bs=BS, seed=1, device=device, num_workers=n_workers
    )


PATHS: dict[str, Callable[[torch.device], Any]] = {
    "a list of pageable batches": lambda device: DataBunch(batches(), batches()),
    "a list of pinned batches": lambda device: DataBunch(
        *[[tuple(t.pin_memory() for t in b) for b in batches()] for _ in range(2)]
    ),
    "batches on the device": lambda device: DataBunch(
        *[[tuple(t.to(device) for t in b) for b in batches()] for _ in range(2)]
    ),
    "batches on another device": lambda device: DataBunch(
        *[[tuple(t.to("twin:1") for t in b) for b in batches()] for _ in range(2)]
    ),
    "inputs on the device, targets not": lambda device: DataBunch(
        *[[(x.to(device), y) for x, y in batches()] for _ in range(2)]
    ),
    "batches of many sizes": lambda device: DataBunch(
        *[[(x[: 1 + i % 3], y[: 1 + i % 3]) for i, (x, y) in enumerate(batches())] for _ in range(2)]
    ),
    "views of pinned memory": lambda device: DataBunch(
        *[[(torch.cat([x, x], 1).pin_memory()[:, ::2], y.pin_memory()) for x, y in batches()] for _ in range(2)]
    ),
    "mappings": lambda device: DataBunch(*[[{"x": x, "labels": y} for x, y in batches()] for _ in range(2)]),
    "nested": lambda device: DataBunch(
        *[[([x, {"more": (x + 1, "text")}], y) for x, y in batches()] for _ in range(2)]
    ),
    "named tuples": lambda device: DataBunch(*[[(Pair(x, x + 1), y) for x, y in batches()] for _ in range(2)]),
    "a DataLoader, pinned": lambda device: DataBunch.create(dataset(), dataset(), bs=BS, seed=1, num_workers=0),
    "a DataLoader, workers": lambda device: DataBunch.create(dataset(), dataset(), bs=BS, seed=1, num_workers=2),
    "a DataLoader, not pinned": lambda device: DataBunch(DataLoader(dataset(), BS), DataLoader(dataset(), BS)),
    "tensors, default device": lambda device: DataBunch.from_tensors(
        whole(), whole(), bs=BS, seed=1, batch_tfms=[Shift()]
    ),
    "tensors on the device": lambda device: DataBunch.from_tensors(
        whole(), whole(), bs=BS, seed=1, batch_tfms=[Shift()], device=device
    ),
    "tensors on the CPU": lambda device: DataBunch.from_tensors(
        whole(), whole(), bs=BS, seed=1, batch_tfms=[Shift()], device="cpu"
    ),
    "tensors cut ahead": lambda device: DataBunch(
        *[
            TensorLoader(whole(), bs=BS, shuffle=shuffle, seed=1, batch_tfms=[Shift()], n_ahead=2, device=device)
            for shuffle in (True, False)
        ]
    ),
    "tensors on the device, cut ahead": lambda device: DataBunch(
        TensorLoader([t.to(device) for t in whole()], bs=BS, seed=1, batch_tfms=[Shift()], shuffle=True, n_ahead=2)
    ),
    "pictures held": from_pictures,
    "pictures streamed": streamed,
    "pictures made one by one": lambda device: one_by_one(device, 0),
    "pictures made by workers": lambda device: one_by_one(device, 2),
}


class See(Callback):
    """Keeps what each batch was; from the third batch of a pass to its end, nobody may wait for the device."""

    def __init__(self, *, waits: bool) -> None:
        self.batches, self.waits, self.context = [], waits, None

    def before_batch(self, learn: Learner) -> None:
        self.batches.append([t.clone() for t in tensors_in((learn.inputs, learn.target))])
        assert {t.device for t in self.batches[-1]} == {learn.device}
        if not self.waits and learn.batch_index == 1:
            self.enter()

    def enter(self) -> None:
        self.context = twin.waits(error=True)
        self.context.__enter__()

    def leave(self) -> None:
        context, self.context = self.context, None
        if context is not None:
            context.__exit__(None, None, None)

    def after_batch(self, learn: Learner) -> None:
        if learn.batch_index == N // BS - 1:
            self.leave()

    def around_fit(self, learn: Learner, run: Callable[[], None]) -> None:
        try:
            run()
        finally:
            self.leave()


class Net(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, 3)

    def forward(self, x: Any) -> Tensor:
        while not isinstance(x, Tensor):
            x = x[0]
        return self.linear(x.flatten(1).float())


def fitted(
    path: str, device: torch.device, *, waits: bool = True
) -> tuple[list[list[Tensor]], list[Tensor], dict[str, float]]:
    """(batches, weights, values) of two epochs."""
    torch.manual_seed(1)
    see = See(waits=waits)
    learn = Learner(PATHS[path](device), Net(192 if "pictures" in path else 6), metrics=accuracy, seed=1, device=device)
    with learn.no_logging():
        learn.fit(2, 0.1, callbacks=[see])
    return (
        [[t.cpu() for t in batch] for batch in see.batches],
        [p.detach().cpu() for p in learn.model.parameters()],
        learn.values,
    )


# --- what arrives ------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_brings_the_cpus_batches_and_no_batch_waits(path, device):
    on_cpu, on_device = fitted(path, CPU), fitted(path, torch.device(device), waits=False)
    for ours, theirs in zip(on_device[0], on_cpu[0], strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, on_device[1], on_cpu[1]))
    assert on_device[2] == on_cpu[2]
    assert twin.races() == []


def test_a_learner_on_the_cpu_reads_batches_of_the_device_when_they_are_there():
    def seen(device: str) -> list[list[Tensor]]:
        see = See(waits=True)
        learn = Learner(
            DataBunch.from_tensors(whole(), bs=BS, seed=1, batch_tfms=[Shift()], device=device), Net(6), device="cpu"
        )
        with learn.no_logging():
            learn.fit(1, 0.1, callbacks=[see])
        return see.batches

    for ours, theirs in zip(seen("twin:0"), seen("cpu"), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_a_packed_sequence_moves_itself_and_keeps_its_sizes_on_the_cpu():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    move = mover(torch.device("twin:0"))
    for _ in range(3):
        found = move((packed, torch.ones(2)))
        assert (
            isinstance(found[0], PackedSequence)
            and str(found[0].data.device) == "twin:0"
            and found[0].batch_sizes.is_cpu
        )
        assert torch.equal(found[0].data.cpu(), packed.data) and str(found[1].device) == "twin:0"


def test_sparse_batches_subclasses_and_those_with_a_graph_keep_what_they_are():
    class Named(Tensor):
        pass

    leaf = torch.ones(3, requires_grad=True)
    batch = (torch.eye(3).to_sparse(), torch.ones(2).as_subclass(Named), leaf)
    move = mover(torch.device("twin:0"))
    for _ in range(3):
        sparse, named, of_leaf = move(batch)
    assert sparse.is_sparse and torch.equal(sparse.to_dense().cpu(), torch.eye(3))
    assert type(named) is Named and str(named.device) == "twin:0"
    of_leaf.sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.ones(3))


@pytest.mark.parametrize("device", ["twin", *DEVICES])
def test_a_loop_of_ones_own_gets_its_batches_from_prepare_data_loader(device):
    loader = prepare_data_loader(DataLoader(dataset(), BS), device=torch.device(device))
    for (x, y), (own_x, own_y) in zip(loader, batches(), strict=True):
        assert x.device == y.device == torch.empty(0, device=device).device
        assert torch.equal(x.cpu(), own_x) and torch.equal(y.cpu(), own_y)
    assert twin.races() == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 4),
        lambda: torch.ones(3, 4).pin_memory(),
        lambda: torch.ones(3, 4).T,
        lambda: torch.arange(12.0).view(3, 4).pin_memory()[:, 1:],
        lambda: torch.arange(3.0).expand(2, 3),
        lambda: torch.zeros(0, 3),
        lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last).pin_memory(),
    ],
)
def test_what_is_copied_lies_in_pinned_memory_without_gaps(make):
    own = make()
    found = pinned(own)
    assert torch.equal(found, own) and found.stride() == torch.empty_like(own).stride()
    assert found.is_pinned() or not own.numel()
    assert (found is own) == (own.is_pinned() and own.stride() == torch.empty_like(own).stride())


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_that_are_cut_ahead_are_pinned_by_the_thread(shuffle, monkeypatch):
    seen: list[Tensor] = []

    def see(device: torch.device) -> Callable[[Any], Any]:
        move = mover(device)
        return lambda cut: move((seen.extend(tensors_in(cut)), cut)[1])

    monkeypatch.setattr(data, "mover", see)
    loader = TensorLoader(whole(), bs=BS, shuffle=shuffle, seed=1, n_ahead=2, device=torch.device("twin:0"))
    assert len(list(loader)) == N // BS
    assert len(seen) == (N // BS) * (3 if shuffle else 2) and all(t.is_pinned() for t in seen)


# --- when --------------------------------------------------------------------
def test_a_batch_is_copied_while_the_device_works_on_the_one_before():
    device = torch.device("twin:0")
    move, work = mover(device), torch.accelerator.current_stream(device)
    batch = [move(torch.ones(8)) for _ in range(3)][-1]
    (batch * 2).sum()
    over, source = work.record_event(), torch.ones(8).pin_memory()
    after = move(source)
    copy_stream(device).synchronize()  # the host knows that the copy is over,
    source.zero_()  # and may change what was copied;
    assert not over.query()  # the work that was enqueued before it need not be over
    assert torch.equal(after.cpu(), torch.ones(8)) and twin.races() == []


def test_a_copy_waits_for_what_used_its_memory_before():
    device = torch.device("twin:0")
    move, work = mover(device), torch.accelerator.current_stream(device)
    for _ in range(2):
        move(torch.ones(8))
    (torch.ones(8, device=device) * 2).sum()
    over = work.record_event()
    for _ in range(2):
        move(torch.ones(8))  # the first takes memory for the second, perhaps the one that was freed above
    copy_stream(device).synchronize()
    assert over.query()


def test_a_batch_may_come_while_another_stream_is_the_current_one():
    device = torch.device("twin:0")
    move, streams, found = mover(device), [torch.Stream(device), torch.Stream(device)], []
    for i in range(6):
        with streams[i % 2]:
            found.append((move(torch.full((8,), float(i))) * 2).sum())
    torch.accelerator.synchronize()
    assert [total.item() for total in found] == [16.0 * i for i in range(6)] and twin.races() == []


def test_two_batches_lie_on_the_device_however_far_the_host_is_ahead():
    device, n_bytes = torch.device("twin:0"), 1 << 16
    inputs = [torch.ones(n_bytes // 4) for _ in range(10)]
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    move = mover(device)
    with twin.waits(error=True):
        for t in inputs:
            move(t).add_(1)
    assert torch.accelerator.max_memory_allocated() - before == 2 * n_bytes
    assert twin.races() == []


def test_a_pass_of_one_batch_takes_its_memory_once():
    n_bytes = 1 << 16
    learn = Learner(
        DataBunch([(torch.ones(2, n_bytes // 8), torch.ones(2, 1))]), nn.Linear(n_bytes // 8, 1), device="twin:0"
    )
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    learn.predict(torch.ones(2, n_bytes // 8))
    assert n_bytes <= torch.accelerator.max_memory_allocated() - before < 1.5 * n_bytes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", ["held", "cut ahead", "one by one"])
def test_a_look_at_the_first_batch_moves_no_generator_of_the_device(device, make):
    def noisy(x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, device=x.device)

    place = torch.device(device)
    bunch = {
        "held": lambda: DataBunch.from_tensors(whole(), bs=BS, batch_tfms=[noisy], device=place),
        "cut ahead": lambda: DataBunch(TensorLoader(whole(), bs=BS, batch_tfms=[noisy], n_ahead=1, device=place)),
        "one by one": lambda: ImageDataBunch.from_dataset(
            Pictured(), ds_tfms=[noisy], bs=BS, device=place, num_workers=0
        ),
    }[make]()
    before = torch.twin.get_rng_state(place)  # type: ignore[attr-defined]
    first, second = bunch.one_batch(), bunch.one_batch()
    assert torch.equal(first[0].cpu(), second[0].cpu())
    assert torch.equal(torch.twin.get_rng_state(place), before)  # type: ignore[attr-defined]


# --- streams -----------------------------------------------------------------
def n_streams_taken(work: Callable[[], object]) -> int:
    """Each new stream has the next number."""
    first = torch.Stream("twin:0").stream_id
    work()
    return torch.Stream("twin:0").stream_id - first - 1


def test_all_passes_and_learners_of_a_process_share_one_copy_stream_a_device():
    def passes() -> None:
        for path in ("a list of pageable batches", "tensors cut ahead", "pictures made one by one"):
            fitted(path, torch.device("twin:0"))
        Learner(DataBunch(batches()), Net(6), device="twin:0").predict(torch.ones(2, 6))

    has_streams(torch.device("twin:0"))  # which may try two
    assert n_streams_taken(passes) == 1
    assert n_streams_taken(passes) == 0


# --- numbers, to and from ----------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
def test_a_reading_has_the_values_of_when_it_was_asked_for_and_does_not_wait_for_them(device):
    values = torch.arange(3.0, device=device)
    with twin.waits(error=True):
        reading = Reading(values)
        values += 1
        assert not reading.has_arrived
    torch.accelerator.synchronize(torch.device(device))
    with twin.waits(error=True):
        assert reading.has_arrived
        assert reading.tolist() == [0, 1, 2]


def test_a_reading_that_has_not_arrived_is_waited_for_once():
    reading = Reading(torch.arange(3.0, device="twin:0"))
    with twin.waits() as seen:
        assert reading.tolist() == [0, 1, 2]
    assert len(seen) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_sent_is_there_for_what_is_enqueued_next_and_nobody_waits(device):
    with twin.waits(error=True):
        found = [sent(torch.full((3,), i), torch.device(device)) * 2 for i in range(5)]
    assert [t.tolist() for t in found] == [[2 * i] * 3 for i in range(5)] and twin.races() == []
    assert sent(found[0], torch.device(device)) is found[0]


def test_a_copy_to_the_cpu_is_waited_for():
    found = to_device({"x": (torch.arange(3, device="twin:0"),)}, CPU)
    assert torch.equal(found["x"][0], torch.arange(3))
