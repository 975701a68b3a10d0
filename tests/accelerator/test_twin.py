"""The stand-in accelerator itself: that it computes what the CPU does, and that it shows what a real device would
punish.
"""

import copy
import io
import os
import threading
import time
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from tests.accelerator import twin

CPU, TWIN = "cpu", "twin"  # names: without the environment variable there is no such device


def same_on_both(compute, *tensors):
    """compute(*tensors) and its gradients are the CPU's bit by bit."""
    results = []
    for device in (CPU, TWIN):
        inputs = [t.to(device, copy=True).requires_grad_() for t in tensors]
        out = compute(*inputs)
        if out.requires_grad:
            out.square().sum().backward()
        results.append([out.detach().cpu()] + [t.grad.cpu() for t in inputs if t.grad is not None])
        assert out.device.type == device
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def refuses_to_read(tensor):
    with pytest.raises(RuntimeError, match=r"race: .* has not waited for it"):
        tensor + 1


# What torch asks of a device


def test_torch_knows_the_device():
    assert torch.accelerator.is_available() and torch.accelerator.current_accelerator() == torch.device("twin")
    assert torch.accelerator.device_count() == torch.twin.device_count() == 3
    assert torch.get_device_module("twin") is torch.twin
    assert torch.ones(1, device="twin").device == torch.device("twin:0")
    torch.accelerator.set_device_index(1)
    assert (
        torch.ones(1, device="twin").device == torch.device("twin:1")
        and torch.accelerator.current_stream().device_index == 1
    )
    with pytest.raises(RuntimeError, match="there is no device 3"):
        torch.ones(1, device="twin:3")


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_and_their_gradients_are_the_cpus(dims, transposed):
    convolve = getattr(F, f"conv{'_transpose' * transposed}{dims}d")
    x, w, b = (
        torch.randn(2, 4, *[6] * dims),
        torch.randn(*((4, 3) if transposed else (6, 2)), *[3] * dims),
        torch.randn(3 if transposed else 6),
    )
    same_on_both(lambda x, w, b: convolve(x, w, b, stride=2, padding=1, groups=1 if transposed else 2), x, w, b)


@pytest.mark.parametrize(
    "compute, sizes",
    [
        (lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), [(8, 3, 4, 4), (3,), (3,)]),
        (lambda x, w, b: F.layer_norm(x, (5,), w, b), [(4, 5), (5,), (5,)]),
        (lambda x, w, b: F.linear(x, w, b), [(4, 5), (3, 5), (3,)]),
        (lambda x: F.cross_entropy(x, torch.arange(4, device=x.device)), [(4, 5)]),
        (lambda x: F.interpolate(x, size=(7, 5), mode="bilinear", antialias=True), [(2, 3, 4, 4)]),
        (lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), [(2, 3, 4, 4), (2, 5, 5, 2)]),
        (lambda x: F.max_pool2d(x, 2), [(2, 3, 4, 4)]),
        (lambda x: F.embedding(torch.tensor([1, 2, 1], device=x.device), x), [(4, 5)]),
        (lambda x: x.sort(dim=1).values.cumsum(1), [(4, 5)]),
        (lambda x: x.topk(2).values, [(4, 5)]),
        (lambda x: x[torch.tensor([0, 2], device=x.device), 1:], [(4, 5)]),
        (lambda x: x[x > 0], [(4, 5)]),
        (lambda x: torch.einsum("ij,kj->ik", x, x).softmax(-1), [(4, 5)]),
        (lambda x: torch.linalg.inv(x), [(4, 4)]),
        (lambda x: torch.stack(torch._foreach_mul([x, x + 1], 2.0)), [(4, 5)]),
    ],
)
def test_results_and_gradients_are_the_cpus_bit_by_bit(compute, sizes):
    same_on_both(compute, *[torch.randn(size) for size in sizes])


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}, {"enable_gqa": True}])
@pytest.mark.parametrize("plain", [False, True])
def test_attention_is_the_cpus(options, plain):
    def attend(q, k, v):
        mask = {"attn_mask": torch.eye(4, device=q.device)} if options.get("mask") else options
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, **mask)

    heads = (4, 2, 2) if "enable_gqa" in options else (2, 2, 2)
    same_on_both(attend, *[torch.randn(2, n, 4, 8) for n in heads])


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU])
def test_recurrent_layers_agree_with_the_cpus(rnn):
    layer, x = rnn(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    layers = {"cpu": layer, "twin": copy.deepcopy(layer).to("twin")}
    outs = {device: layers[device](x.to(device))[0] for device in layers}
    for out in outs.values():
        out.square().sum().backward()
    torch.testing.assert_close(outs["twin"].cpu(), outs["cpu"])
    for one, other in zip(layers["cpu"].parameters(), layers["twin"].parameters(), strict=True):
        torch.testing.assert_close(other.grad.cpu(), one.grad)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adam(p, foreach=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
        lambda p: torch.optim.SGD(p, 0.1),
    ],
)
def test_a_training_with_dropout_is_the_cpus_bit_by_bit(optimizer):
    x, y, ends = torch.randn(8, 3, 6, 6), torch.arange(8) % 3, []
    for device in (CPU, TWIN):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(
            device
        )
        opt = optimizer(model.parameters())
        torch.manual_seed(1)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        ends.append([t.cpu() for t in model.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_sparse_gradients_train_as_on_the_cpu():
    weights = []
    for device in (CPU, TWIN):
        torch.manual_seed(0)
        layer = nn.Embedding(10, 4, sparse=True).to(device)
        for optimizer in (torch.optim.SGD(layer.parameters(), 0.1), torch.optim.SparseAdam(layer.parameters(), 0.1)):
            optimizer.zero_grad()
            layer(torch.tensor([1, 2, 1], device=device)).square().sum().backward()
            assert layer.weight.grad.is_sparse and layer.weight.grad.device.type == device
            optimizer.step()
        weights.append(layer.weight.detach().cpu())
    assert torch.equal(*weights)


def test_moving_a_model_keeps_its_parameters_and_what_they_share():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer, before = torch.optim.SGD(model.parameters(), 0.1), list(model.parameters())
    for device in ("twin", "twin:1", "cpu", "twin"):
        model.to(device)
        assert [p is q for p, q in zip(model.parameters(), before, strict=True)] == [True] * 3 and before[
            0
        ].device.type == device[:4].rstrip(":")
    model(torch.ones(1, 4, device="twin")).sum().backward()
    old = model[1].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[1].weight, old) and model[0].weight is model[1].weight


def test_tensors_of_two_devices_are_refused_but_not_numbers():
    x = torch.ones(3, device="twin")
    for other in (torch.ones(3), torch.ones(3, device="twin:1"), torch.tensor(1.0, device="twin:1")):
        with pytest.raises(
            RuntimeError, match="Expected all tensors to be on the same device, but found at least two devices"
        ):
            x + other
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        torch.ones(3).add_(x)
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        torch.tensor(1.0).add_(x.sum())
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        F.embedding(torch.tensor([0]), torch.ones(3, 3, device="twin"))
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2] and x[torch.tensor([0])].tolist() == [1]
    with pytest.raises(TypeError, match="can't convert twin:0 device type tensor to numpy"):
        x.numpy()


def test_every_device_draws_from_a_state_of_its_own():
    torch.manual_seed(3)
    cpu_state = torch.get_rng_state()
    drawn = [torch.randn(4, device=f"twin:{i}").cpu() for i in (0, 1)] + [
        F.dropout(torch.ones(64, device="twin")).cpu()
    ]
    assert torch.equal(torch.get_rng_state(), cpu_state)
    state = torch.twin.get_rng_state(0)
    after = torch.randperm(9, device="twin:0").cpu()
    torch.twin.set_rng_state(state, 0)
    assert torch.equal(torch.randperm(9, device="twin:0").cpu(), after)
    torch.manual_seed(3)
    again = [torch.randn(4, device=f"twin:{i}").cpu() for i in (0, 1)] + [
        F.dropout(torch.ones(64, device="twin")).cpu()
    ]
    assert all(torch.equal(one, other) for one, other in zip(drawn, again, strict=True)) and drawn[
        2
    ].unique().tolist() == [0, 2]
    mine = torch.Generator("twin").manual_seed(5)
    assert torch.equal(
        torch.rand(3, generator=mine, device="twin").cpu(), torch.rand(3, generator=torch.Generator().manual_seed(5))
    )
    with pytest.raises(RuntimeError, match="Expected a 'twin' device type for generator but found 'cpu'"):
        torch.empty(3, device="twin").normal_(generator=torch.Generator())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_has_cudas_lists(dtype):
    x = torch.ones(2, 2, device="twin")
    with torch.autocast("twin", dtype):
        low = [
            x @ x,
            F.linear(x, x),
            F.conv1d(x, x[:, :, None]),
            torch.addmm(x, x, x),
            torch.bmm(x[None], x[None]),
            F.scaled_dot_product_attention(x, x, x),
        ]
        half = low[0]
        full = [
            half.softmax(-1),
            F.layer_norm(half, (2,)),
            half.exp(),
            half.sum(),
            half.norm(),
            half.pow(2),
            F.mse_loss(half, half),
            half.cumsum(0),
        ]
        assert {t.dtype for t in low} == {dtype} and {t.dtype for t in full} == {torch.float32}
        assert torch.atan2(half, x).dtype == torch.float32 and torch.cat([half, x]).dtype == torch.float32
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(half, x)


def test_a_grad_scaler_skips_a_step_of_infinities():
    layer = nn.Linear(2, 2).to("twin")
    optimizer, scaler = torch.optim.SGD(layer.parameters(), 0.1), torch.amp.GradScaler("twin", init_scale=8.0)
    before = layer.weight.detach().clone()
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(1, 2, device="twin")).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) == (factor != 1.0)
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_run_on_it(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).to("twin")
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    x = torch.randn(5, 3, device="twin")
    for m in (model, compiled):
        m(x).square().sum().backward()
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_what_is_saved_comes_back_to_its_device_or_another():
    layer, file = nn.Linear(2, 2).to("twin:1"), io.BytesIO()
    torch.save(layer.state_dict(), file)
    for where, expected in ((None, "twin:1"), ("cpu", "cpu"), ("twin:0", "twin:0")):
        file.seek(0)
        loaded = torch.load(file, weights_only=True, map_location=where)
        assert str(loaded["weight"].device) == expected and torch.equal(loaded["weight"].cpu(), layer.weight.cpu())


def test_a_data_loader_pins_its_batches():
    for (x,) in DataLoader(TensorDataset(torch.arange(6.0)), batch_size=3, pin_memory=True):
        assert x.is_pinned()
    assert not torch.ones(1).is_pinned() and torch.ones(1, pin_memory=True).is_pinned()


def test_a_child_forked_after_the_device_was_used_cannot_use_it():
    assert not torch.twin.is_initialized()
    torch.ones(1, device="twin")
    assert torch.twin.is_initialized()
    if (pid := os.fork()) == 0:
        try:
            torch.ones(1, device="twin")
        except RuntimeError as error:
            os._exit(7 if "Cannot re-initialize" in str(error) and torch.twin._is_in_bad_fork() else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


# Memory


def test_memory_is_counted_and_limited_for_each_device():
    twin.limit(4096, 1)
    torch.accelerator.reset_peak_memory_stats(1)
    x = torch.empty(256, device="twin:1")
    y = x + x
    assert (torch.accelerator.memory_allocated(1), torch.accelerator.memory_allocated(0)) == (2048, 0)
    del y
    assert (torch.accelerator.memory_allocated(1), torch.accelerator.max_memory_allocated(1)) == (1024, 2048)
    assert torch.accelerator.get_memory_info(1) == (3072, 4096)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"twin out of memory. Tried to allocate .*Device 1 has a total capacity"
    ):
        torch.empty(1000, device="twin:1")
    with pytest.raises(torch.OutOfMemoryError):
        torch.cat([x] * 4)
    torch.empty(1000, device="twin:0")
    assert torch.accelerator.memory_allocated(1) == 1024


def test_memory_that_nobody_has_written_is_poison():
    assert torch.empty(3, device="twin").isnan().all() and (torch.empty(3, device="twin", dtype=torch.long) == -1).all()


def test_without_float64_it_refuses_as_mps_does():
    half = torch.ones(2, device="twin")
    with twin.without_float64():
        for make in (
            lambda: torch.ones(2, device="twin", dtype=torch.float64),
            half.double,
            lambda: torch.ones(2, dtype=torch.float64).to("twin"),
            lambda: half.sum(dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="Cannot convert a twin Tensor to float64 dtype"):
                make()
        assert (half * 2.5).tolist() == [2.5, 2.5] and half.mean().item() == 1
    assert half.double().dtype == torch.float64


# Waits


def test_waits_are_counted_where_cuda_waits():
    x, mask, cpu = (
        torch.arange(1.0, 5.0, device="twin"),
        torch.tensor([True, False, True, True], device="twin"),
        torch.ones(4),
    )
    pinned, n = torch.ones(4, pin_memory=True), torch.tensor([1, 2, 1, 1], device="twin")
    event = torch.Event("twin")
    event.record()
    waiting = {
        "item": [
            x[0].item,
            lambda: bool(x[0] > 0),
            lambda: int(x[0]),
            lambda: float(x[0]),
            lambda: F.one_hot(n),
            lambda: torch.allclose(x, x),
        ],
        "device to host": [
            x.cpu,
            x.tolist,
            lambda: cpu.copy_(x),
            lambda: cpu.copy_(x, non_blocking=True),
            lambda: pinned.copy_(x),
        ],
        "host to device": [
            lambda: cpu.to("twin"),
            lambda: pinned.to("twin"),
            lambda: torch.tensor([1.0], device="twin"),
            lambda: x.copy_(cpu),
            lambda: torch.tensor(1.0, device="twin"),
            lambda: x[torch.tensor([0, 1])],
        ],
        "op": [
            x.nonzero,
            lambda: x[mask],
            lambda: x.masked_select(mask),
            x.unique,
            x.unique_consecutive,
            lambda: x.equal(x),
            lambda: x.repeat_interleave(n),
            lambda: n.bincount(),
            lambda: x.multinomial(2),
            lambda: x.masked_fill(mask, x[0]),
        ],
        "synchronize": [
            torch.accelerator.synchronize,
            torch.accelerator.current_stream().synchronize,
            event.synchronize,
        ],
    }
    for kind, calls in waiting.items():
        for i, call in enumerate(calls):
            with twin.waits() as seen:
                call()
            assert [wait.kind for wait in seen][:1] == [kind], (kind, i, seen.events)


def test_nothing_is_counted_where_cuda_does_not_wait():
    x, mask = torch.arange(1.0, 5.0, device="twin"), torch.tensor([True, False, True, True], device="twin")
    pinned, n = torch.ones(4, pin_memory=True), torch.tensor([1, 2, 1, 1], device="twin")
    layer = nn.Linear(4, 2).to("twin")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with twin.waits() as seen:
        pinned.to("twin", non_blocking=True)
        pinned.copy_(x, non_blocking=True)
        x.to("cpu", non_blocking=True)  # into pinned memory, which torch makes for it
        x[mask] = 0
        x.masked_fill_(mask, 0.5)
        torch.where(mask, x, 0)
        x.repeat_interleave(n, output_size=5)
        F.one_hot(n, 3)
        torch.zeros(3, device="twin")[0] = 1
        F.cross_entropy(layer(x)[None], n[:1] * 0).backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        torch.randperm(5, device="twin")
        x.to("twin:1")
        event = torch.Event("twin")
        event.record()
        event.query()
        torch.accelerator.current_stream().wait_event(event)
    assert seen.events == []


def test_a_wait_names_its_place_and_can_be_refused():
    x = torch.ones(2, device="twin").sum()
    with twin.waits() as seen:
        for _ in range(3):
            x.item()
    [(wait, count)] = seen.counted().items()
    assert isinstance(seen.counted(), Counter) and count == 3 and (wait.kind, wait.op) == ("item", "float[]")
    assert wait.place.startswith("tests/accelerator/test_twin.py:") and wait.place.endswith(
        " test_a_wait_names_its_place_and_can_be_refused"
    )
    with (
        twin.waits(error=True),
        pytest.raises(
            RuntimeError, match=r"the host waits for the device: item \(float\[\]\) at tests/accelerator/test_twin.py:"
        ),
    ):
        x.item()
    with twin.waits() as outer:
        with twin.waits() as inner:
            x.item()
        assert len(inner) == 1 and len(outer) == 0
    assert x.item() == 2


def test_a_wait_inside_the_library_is_put_down_to_its_line():
    from learnkit.devices.nested import to_device

    with twin.waits() as seen:
        to_device(torch.ones(2), torch.device("twin"))
    for wait in seen:
        assert wait.place.startswith("learnkit/data/batch.py:")


# Streams: what nobody has waited for has not arrived


def test_a_copy_to_the_device_is_there_only_after_a_wait():
    source, copies, work = torch.arange(4.0).pin_memory(), torch.Stream("twin"), torch.accelerator.current_stream()
    with copies:
        x = source.to("twin", non_blocking=True)
    refuses_to_read(x)
    with twin.unchecked():
        assert (x + 1).isnan().all()
    work.wait_stream(copies)
    assert (x + 1).tolist() == [1, 2, 3, 4]


def test_a_copy_to_the_host_is_there_only_after_a_wait():
    x, target, event = torch.arange(4.0, device="twin"), torch.zeros(4, pin_memory=True), torch.Event("twin")
    target.copy_(x, non_blocking=True)
    event.record()
    x.mul_(9)  # after the copy in the stream's order
    assert target.isnan().all()
    assert not event.query() and target.isnan().all()
    assert event.query() and target.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "wait",
    [
        lambda e, s: e.synchronize(),
        lambda e, s: s.synchronize(),
        lambda e, s: torch.accelerator.synchronize(),
        lambda e, s: torch.ones(1, device="twin").item(),
    ],
)
def test_whatever_synchronizes_lets_copies_arrive(wait):
    target, event, stream = torch.zeros(4, pin_memory=True), torch.Event("twin"), torch.accelerator.current_stream()
    target.copy_(torch.ones(4, device="twin"), non_blocking=True)
    event.record()
    assert target.isnan().all()
    wait(event, stream)
    assert target.tolist() == [1] * 4


def test_an_event_orders_what_came_before_it_and_nothing_after():
    side, event = torch.Stream("twin"), torch.Event("twin")
    with side:
        x = torch.ones(2, device="twin")
        event.record()
        y = torch.ones(2, device="twin")
    torch.accelerator.current_stream().wait_event(event)
    assert (x + 1).tolist() == [2, 2]
    refuses_to_read(y)


def test_writing_what_another_stream_still_reads_is_a_race():
    x, side = torch.ones(2, device="twin"), torch.Stream("twin")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        y = x + 1
    assert (x + 1).tolist() == [2, 2]  # both may read
    with pytest.raises(
        RuntimeError, match="race: aten::add_ on stream 0 of twin:0 writes memory that an operation reads on stream"
    ):
        x.add_(1)
    torch.accelerator.current_stream().wait_stream(side)
    assert x.add_(1).tolist() == [2, 2] and y.tolist() == [2, 2]


def test_a_pinned_buffer_that_is_overwritten_too_early_is_seen():
    buffer = torch.ones(4, pin_memory=True)
    x = buffer.to("twin", non_blocking=True)
    buffer.fill_(7)  # before the copy
    assert x.tolist() == [7] * 4
    y = buffer.to("twin", non_blocking=True)
    y + 1  # on a real device the copy may now be over, or not
    buffer.fill_(8)
    assert twin.races() == []
    torch.accelerator.synchronize()
    [race] = twin.races()
    assert "pinned memory was changed while a copy of it" in race
    z = buffer.to("twin", non_blocking=True)
    torch.accelerator.synchronize()
    buffer.fill_(9)
    assert z.tolist() == [8] * 4 and twin.races() == []


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_given_out_again_while_another_stream_uses_it_is_seen(recorded):
    side, work = torch.Stream("twin"), torch.accelerator.current_stream()
    with side:
        x = torch.ones(4, device="twin")
    work.wait_stream(side)
    x + 1
    if recorded:
        x.record_stream(work)
    del x
    assert twin.races() == []
    with side:
        torch.empty(4, device="twin")
    assert [("call record_stream" in race) for race in twin.races()] == [True] * (not recorded)


def test_memory_given_out_again_after_its_stream_has_waited_is_no_race():
    side, work = torch.Stream("twin"), torch.accelerator.current_stream()
    with side:
        x = torch.ones(4, device="twin")
    work.wait_stream(side)
    x + 1
    del x
    side.wait_stream(work)
    with side:
        torch.empty(4, device="twin")
    assert twin.races() == []


def test_a_backward_pass_over_two_streams_is_ordered_by_autograd():
    x, side, work = (
        torch.ones(3, device="twin", requires_grad=True),
        torch.Stream("twin"),
        torch.accelerator.current_stream(),
    )
    side.wait_stream(work)
    with side:
        y = x * 2
    work.wait_stream(side)
    (y * 3).sum().backward()
    assert x.grad.tolist() == [6, 6, 6] and twin.races() == []


def test_threads_with_streams_of_their_own_get_their_own_copies():
    wrong = []

    def work(i):
        with torch.Stream("twin"):
            for n in range(200):
                x = torch.full((8,), float(n), pin_memory=True).to("twin", non_blocking=True)
                y = (x * i).requires_grad_()
                (y * y).sum().backward()
                target, event = torch.empty(8, pin_memory=True), torch.Event("twin")
                target.copy_(y.grad, non_blocking=True)
                event.record()
                while not event.query():
                    pass
                if target.tolist() != [2.0 * i * n] * 8:
                    wrong.append((i, n, target))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and twin.races() == []


def test_copies_between_devices_are_ordered_on_both():
    x = torch.ones(3, device="twin:0")
    y = x.to("twin:1", non_blocking=True)
    x.add_(1)
    assert (y + 1).tolist() == [2, 2, 2]


def test_events_measure_time_once_they_are_over():
    start, end = torch.Event("twin", enable_timing=True), torch.Event("twin", enable_timing=True)
    start.record()
    time.sleep(0.01)
    end.record()
    with pytest.raises(RuntimeError, match="must be completed"):
        start.elapsed_time(end)
    end.synchronize()
    assert start.elapsed_time(end) >= 10


# Collectives


def collectives():
    rank = dist.get_rank()
    device = torch.device("twin", rank)
    x, out = torch.arange(4.0, device=device) + rank, {}
    assert (
        dist.get_backend_config() == "cpu:gloo,twin:twinccl"
        and dist.get_default_backend_for_device("twin") == "twinccl"
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        y = torch.full((2,), rank + 1, device=device).to(dtype)
        dist.all_reduce(y)
        out[dtype] = y.tolist()
    for op in ("AVG", "MAX", "MIN", "PRODUCT"):
        y = x.clone()
        dist.all_reduce(y, getattr(dist.ReduceOp, op))
        out[op] = y.tolist()
    y = x.clone()
    dist.broadcast(y, 1)
    out["broadcast"] = y.tolist()
    y = x.clone()
    dist.reduce(y, 0)
    out["reduce"] = y.tolist()
    y = x.new_empty(8)
    dist.all_gather_into_tensor(y, x)
    out["all_gather_into_tensor"] = y.tolist()
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x)
    out["all_gather"] = [part.tolist() for part in parts]
    y = x.new_empty(2)
    dist.reduce_scatter_tensor(y, x)
    out["reduce_scatter_tensor"] = y.tolist()
    dist.reduce_scatter(y, list(x.chunk(2)), op=dist.ReduceOp.AVG)
    out["reduce_scatter"] = y.tolist()
    y = torch.empty_like(x)
    dist.all_to_all_single(y, x)
    out["all_to_all_single"] = y.tolist()
    parts = [x.new_empty(2), x.new_empty(2)]
    dist.all_to_all(parts, list(x.chunk(2)))
    out["all_to_all"] = [part.tolist() for part in parts]
    dist.gather(x, parts := [torch.empty_like(x) for _ in range(2)] if rank == 0 else None, dst=0)
    out["gather"] = parts and [part.tolist() for part in parts]
    dist.scatter(y, [x, x * 2] if rank == 0 else None, src=0)
    out["scatter"] = y.tolist()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, y, 1 - rank)]):
        work.wait()
    out["batch_isend_irecv"] = y.tolist()
    with dist._coalescing_manager(device=device, async_ops=True) as several:
        a, b = torch.ones(2, device=device), torch.ones(1, device=device)
        for t in (a, b):
            dist.all_reduce(t)
    several.wait()
    out["coalesced"] = [a.tolist(), b.tolist()]
    with twin.waits() as seen:
        dist.barrier()
    out["waits of a barrier"] = [(wait.kind, wait.op) for wait in seen]
    dist.all_gather_object(parts := [None, None], {"rank": rank})
    out["all_gather_object"] = [part["rank"] for part in parts]
    out["races"] = twin.races()
    return out


def test_collectives_give_what_gloo_gives(ranks):
    first, second = ranks(2, collectives)
    assert second["gather"] is None and second["scatter"] == [0, 2, 4, 6] and second["reduce_scatter_tensor"] == [5, 7]
    whole = torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8
    expected = {dtype: [3, 3] for dtype in whole} | {
        torch.bool: [True, True],
        "AVG": [0.5, 1.5, 2.5, 3.5],
        "MAX": [1, 2, 3, 4],
        "MIN": [0, 1, 2, 3],
        "PRODUCT": [0, 2, 6, 12],
        "broadcast": [1, 2, 3, 4],
        "reduce": [1, 3, 5, 7],
        "all_gather_into_tensor": [0, 1, 2, 3, 1, 2, 3, 4],
        "all_gather": [[0, 1, 2, 3], [1, 2, 3, 4]],
        "reduce_scatter_tensor": [1, 3],
        "reduce_scatter": [0.5, 1.5],
        "all_to_all_single": [0, 1, 1, 2],
        "all_to_all": [[0, 1], [1, 2]],
        "gather": [[0, 1, 2, 3], [1, 2, 3, 4]],
        "scatter": [0, 1, 2, 3],
        "batch_isend_irecv": [1, 2, 3, 4],
        "coalesced": [[2, 2], [2]],
        "waits of a barrier": [("synchronize", "barrier")],
        "all_gather_object": [0, 1],
        "races": [],
    }
    assert first == expected


def late_results():
    rank = dist.get_rank()
    x = torch.full((4,), rank + 1.0, device=torch.device("twin", rank))
    work = dist.all_reduce(x, async_op=True)
    refuses_to_read(x)
    with twin.unchecked():
        assert x.isnan().all()
    with twin.waits() as seen:
        work.wait()
        y = x + 1
        z = x.clone()
        then = dist.all_reduce(z, async_op=True).get_future().then(lambda future: future.value()[0] * 10)
        z = then.wait() + 1
    assert seen.events == []
    return y.tolist(), z.tolist(), twin.races()


def test_a_collectives_result_is_there_only_after_a_wait(ranks):
    for answer in ranks(2, late_results):
        assert answer == ([4.0] * 4, [61.0] * 4, [])


def refusals():
    device = torch.device("twin", dist.get_rank())
    only = dist.new_group(backend="twinccl")
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(1), group=only)
    with pytest.raises(RuntimeError, match="same dtype"):
        dist.all_gather_into_tensor(torch.ones(2, device=device), torch.ones(1, device=device, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="must be contiguous"):
        dist.all_reduce(torch.ones(2, 2, device=device)[:, 0])
    with pytest.raises(RuntimeError, match="not supported"):
        dist.all_reduce(torch.ones(2, device=device, dtype=torch.int16))
    backend = only._get_backend(device)
    with pytest.raises(RuntimeError, match="Tensors must be on a twin device and dense, got one on cpu"):
        backend.allreduce([torch.ones(1)])
    dist.all_reduce(x := torch.ones(1))  # gloo's
    return x.item()


def test_twinccl_refuses_what_nccl_refuses(ranks):
    assert ranks(2, refusals) == [2, 2]


def trained(how, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=None if device.type == "cpu" else [device.index], bucket_cap_mb=0.001
        )
    else:
        mesh = dist.device_mesh.init_device_mesh(device.type, (2,))
        for layer in (model[0], model[2], model):
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(dist.get_rank())
    with torch.device("cpu"):
        x = torch.randn(6, 8).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [(p.full_tensor() if how == "fsdp" else p).detach().cpu() for p in model.parameters()]


def trained_on_both(how):
    ends = [trained(how, device) for device in (torch.device(CPU), torch.device("twin", dist.get_rank()))]
    return all(torch.equal(one, other) for one, other in zip(*ends, strict=True)), twin.races()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_train_as_on_gloo_bit_by_bit(ranks, how):
    assert ranks(2, trained_on_both, how) == [(True, [])] * 2


def sync_batch_norm(dtype):
    rank = dist.get_rank()
    torch.manual_seed(0)
    x, weight, outs = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), []
    for norm, part, device in (
        (nn.BatchNorm2d(3), slice(None), CPU),
        (nn.SyncBatchNorm(3), slice(0, 2) if rank == 0 else slice(2, 6), f"twin:{rank}"),
    ):
        mine = x[part].to(device, dtype if device != CPU else None).requires_grad_()
        out = norm.to(device)(mine)
        (out * weight[part].to(device)).sum().backward()
        if device != CPU:
            dist.all_reduce(norm.weight.grad)
        outs.append(
            [t.detach().cpu().float() for t in (out, mine.grad, norm.running_mean, norm.running_var, norm.weight.grad)]
        )
    mine = slice(0, 2) if rank == 0 else slice(2, 6)
    expected = [outs[0][0][mine], outs[0][1][mine], *outs[0][2:]]
    return max((one - other).abs().max().item() for one, other in zip(expected, outs[1], strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_sync_batch_norm_of_two_ranks_is_batch_norm_of_the_whole(ranks, dtype, tolerance):
    assert max(ranks(2, sync_batch_norm, dtype)) < tolerance


def late_partner():
    rank = dist.get_rank()
    x = torch.ones(1, device=torch.device("twin", rank))
    if rank == 1:
        time.sleep(1)
    start = time.monotonic()
    work = dist.all_reduce(x, async_op=True)
    issued = time.monotonic() - start
    work.wait()
    return issued < 0.5, x.item()


def test_starting_a_collective_does_not_wait_for_the_other_ranks(ranks):
    assert ranks(2, late_partner) == [(True, 2)] * 2
