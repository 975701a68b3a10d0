"""Two and three ranks, each with a device of its own: equal to the same ranks on the CPU, whatever the words, and no
rank waits for ever.

The group is the one that learnkit makes, `cpu:gloo,twin:twinccl`, unless a test makes another: twinccl takes tensors of
the device only, as NCCL does, so a tensor that is sent from the CPU where another rank receives on its device would
hang.
"""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner, accuracy, error_rate
from learnkit.callbacks import (
    EMA,
    SWA,
    Accumulate,
    AutoMicrobatch,
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientStats,
    Lookahead,
    MixUp,
    ReduceLROnPlateau,
    SaveBest,
    TerminateOnNaN,
    Timer,
)
from learnkit.distributed import (
    RankFailed,
    all_sum,
    broadcast_from_main,
    destroy_process_group,
    gather_for_metrics,
    gather_objects,
    get_device,
    get_local_rank,
    get_rank,
    get_world_size,
    init_process_group,
    launch,
    prepare_data_loader,
    prepare_model,
    prepare_optimizer,
)
from learnkit.distributed.reduce import broadcast_into, gather_on_main

ALGORITHMS = ("allreduce", "fp16", "bf16", "powersgd", "bytegrad", "local_sgd", "hierarchical", "decentralized")
WORDS = {
    **{name: ("to_distributed", {"algorithm": name}) for name in ALGORITHMS},
    "hook": ("to_distributed", {"algorithm": "hook"}),
    "sync_bn": ("to_distributed", {"sync_bn": True}),
    "delay_allreduce": ("to_distributed", {"delay_allreduce": True}),
    "find_unused_parameters": ("to_distributed", {"find_unused_parameters": True}),
    "static_graph": ("to_distributed", {"static_graph": True}),
    "no bucket views": ("to_distributed", {"gradient_as_bucket_view": False}),
    "to_fsdp": ("to_fsdp", {}),
    "to_fsdp in blocks": ("to_fsdp", {"blocks": nn.Linear}),
    "to_fsdp, activations again": ("to_fsdp", {"blocks": nn.Linear, "activation_checkpointing": True}),
    "to_fsdp, offloaded": ("to_fsdp", {"cpu_offload": True}),
    "to_fsdp in bfloat16": ("to_fsdp", {"mixed_precision": torch.bfloat16}),
}


def plain_hook(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    gradient = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(gradient, async_op=True).get_future().then(lambda done: done.value()[0])


def learner(device=None, n=72, n_valid=15, bs=8, norm=True, **options):
    torch.manual_seed(0)
    x = torch.randn(n, 4)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.ReLU(), nn.Linear(8, 2))
    data = DataBunch.from_tensors((x, y), (x[:n_valid], y[:n_valid]), bs=bs, device=device)
    return Learner(data, model, seed=0, device=device, **{"metrics": [accuracy, error_rate], **options})


def together(learn, word, **more):
    method, options = WORDS[word]
    options = {name: plain_hook if value == "hook" else value for name, value in options.items()}
    return getattr(learn, method)(hang_timeout=20, **options, **more)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()


def outcome(learn):
    """What a fit came to: everything that must not depend on the device."""
    weights = {name: whole(value) for name, value in learn.model.state_dict().items()}
    values = {
        name: learn.values[name] for name in ("train_loss", "valid_loss", *(n for m in learn.metrics for n in m.names))
    }
    return {
        "losses": learn.recorder.losses,
        "values": values,
        "preds": learn.get_preds(with_loss=True),
        "weights": weights,
    }


def trained(word, device, epochs=2, callbacks=(), words=(), constant=False, **options):
    learn = together(learner(device, callbacks=[make() for make in callbacks], **options), word)
    for name in words:
        getattr(learn, name)()
    with learn.no_logging():
        (learn.fit if constant else learn.fit_one_cycle)(epochs, 1e-2)
    assert learn.device.type == device and learn.pred is None
    if device == "twin":
        assert learn.device.index == get_local_rank() == torch.accelerator.current_device_index()
    return outcome(learn)


def on_both(*arguments, **options):
    """The same on the CPU and on the device, in one group."""
    return trained(*arguments, "cpu", **options), trained(*arguments, "twin", **options)


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_fit(word, a, b, tolerance=0.0):
    """With sync_bn the losses alone, to 1e-5: torch's SyncBatchNorm, which the device has, sums in float32,
    GlobalBatchNorm on the CPU in float64; and Adam makes whole steps of rounding in the gradient of a bias before it,
    which is 0.
    """
    if word == "sync_bn":
        torch.testing.assert_close(torch.tensor(a["losses"]), torch.tensor(b["losses"]), rtol=1e-5, atol=1e-5)
    else:
        same(a, b, tolerance)


# --- words -------------------------------------------------------------------
@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("word", WORDS)
def test_ranks_with_devices_train_as_ranks_on_the_cpu(ranks, word, n_ranks):
    halves = word in ("fp16", "bf16") and n_ranks > 2  # gloo adds them in another order
    for cpu, device in ranks(n_ranks, on_both, word, timeout=60):
        same_fit(word, cpu, device, tolerance=5e-2 if halves else 0.0)


CALLBACKS = {
    "Accumulate": partial(Accumulate, 2),
    "AutoMicrobatch": partial(AutoMicrobatch, 3),
    "ClipGradients": partial(ClipGradients, 0.1),
    "EMA": partial(EMA, 0.9),
    "SWA": SWA,
    "Lookahead": Lookahead,
    "MixUp": MixUp,
    "TerminateOnNaN": TerminateOnNaN,
    "GradientStats": GradientStats,
    "Timer": Timer,
    "EarlyStopping": EarlyStopping,
    "ReduceLROnPlateau": ReduceLROnPlateau,
    "SaveBest": SaveBest,
}
NOT_WITH_FSDP = {"AutoMicrobatch": "refused: a rank that runs out of memory alone would leave the others waiting"}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("word", ["allreduce", "to_fsdp"])
def test_callbacks_on_ranks_with_devices_do_what_they_do_on_the_cpu(ranks, word, name):
    if word == "to_fsdp" and name in NOT_WITH_FSDP:
        pytest.skip(NOT_WITH_FSDP[name])
    # Averages of batch norm's statistics after to_fsdp are another matter than devices: DTensors and tensors do not
    # mix.
    norm = word != "to_fsdp" or name not in ("EMA", "SWA")
    for cpu, device in ranks(
        2, partial(on_both, callbacks=[CALLBACKS[name]], constant=True, norm=norm), word, timeout=60
    ):
        same(cpu, device)


@pytest.mark.parametrize("precision", ["to_bf16", "to_fp16"])
@pytest.mark.parametrize("word", ["allreduce", "delay_allreduce", "to_fsdp"])
def test_half_precision_on_ranks_with_devices_is_close_to_that_of_the_cpu(ranks, word, precision):
    for cpu, device in ranks(2, partial(on_both, words=[precision]), word, timeout=60):
        same(cpu, device, tolerance=5e-2)


# --- evaluations -------------------------------------------------------------
@pytest.mark.parametrize("word", ["allreduce", "to_fsdp"])
@pytest.mark.parametrize("n_valid", [1, 2, 4])
def test_a_rank_without_samples_of_an_evaluation_follows_the_others(ranks, word, n_valid):
    """Three ranks, fewer samples: a rank that has none adds up nothing on its device, where the others' sums are."""
    for cpu, device in ranks(3, partial(on_both, n_valid=n_valid), word, timeout=60):
        same(cpu, device)
        assert len(device["preds"][0]) == n_valid


class Seen:
    """A metric that needs all predictions, so these travel as they are."""

    name = "seen"

    def reset(self):
        self.rows = []

    def update(self, pred, target):
        assert pred.device == target.device
        self.rows.append(pred.argmax(1) == target)

    def compute(self):
        return torch.cat(self.rows).double().mean()


@pytest.mark.parametrize("n_valid", [1, 15])
def test_a_metric_of_all_predictions_sees_those_of_ranks_with_devices(ranks, n_valid):
    for cpu, device in ranks(3, partial(on_both, n_valid=n_valid, metrics=[accuracy, Seen()]), "allreduce", timeout=60):
        same(cpu, device)
        assert device["values"]["seen"] == pytest.approx(device["values"]["accuracy"])


# --- what is sent ------------------------------------------------------------
def sent():
    """Each rank has something else to send, on the device, on the CPU, or nothing."""
    rank, device = get_rank(), get_device()
    here = [torch.full((2,), 1.0, device=device), torch.full((2,), 10.0), torch.full((2,), 100.0, device=device)][rank]
    rows = [torch.arange(2.0, device=device), torch.arange(3.0), None][rank]
    into = [torch.full((3,), float(rank), device=device), torch.tensor([rank]), torch.zeros(0)]
    broadcast_into(into)
    return {
        "sum": all_sum(here).tolist(),
        "where": all_sum(here).device == here.device,
        "numbers": all_sum([rank, here.sum()])[0],
        "rows": gather_for_metrics(rows).tolist(),
        "nothing": gather_for_metrics(None),
        "objects": [(r, None if t is None else (t.device.type, t.tolist())) for r, t in gather_objects((rank, rows))],
        "own device": all(
            t is None or t.device in (torch.device("cpu"), device) for _, t in gather_objects((rank, rows))
        ),
        "on main": [None if t is None else (t.device.type, t.tolist()) for t in gather_on_main(rows)],
        "from main": (broadcast_from_main(rows).device == device, broadcast_from_main(here if rank else "text")),
        "into": [t.tolist() for t in into],
    }


def test_what_is_sent_says_where_it_is_and_a_rank_with_nothing_follows(ranks):
    for rank, got in enumerate(ranks(3, sent)):
        assert got["sum"] == [111.0, 111.0] and got["where"] and got["numbers"] == 3
        assert got["rows"] == [0.0, 1.0, 0.0, 1.0, 2.0] and got["nothing"] is None
        assert (
            got["objects"] == [(0, ("twin", [0.0, 1.0])), (1, ("cpu", [0.0, 1.0, 2.0])), (2, None)]
            and got["own device"]
        )
        assert got["on main"] == ([("cpu", [0.0, 1.0]), ("cpu", [0.0, 1.0, 2.0]), None] if rank == 0 else [])
        assert got["from main"] == (True, "text")
        assert got["into"] == [[0.0, 0.0, 0.0], [0], []]


def different_shapes():
    with pytest.raises(
        ValueError,
        match=r"different tensors to share: number 1 is float32 \(2,\) on rank 0 and float32 \(3,\) on rank 1",
    ):
        broadcast_into([torch.zeros(2, device=get_device()), torch.zeros(2 + get_rank())])
    return True


def test_shapes_that_differ_are_an_error_on_all_ranks(ranks):
    assert ranks(2, different_shapes) == [True, True]


def test_what_launch_returns_is_on_the_cpu(ranks):
    """Else the process that called it would use each rank's device, and could fork no others."""

    def make():
        device = get_device()
        x = torch.arange(3.0, device=device)
        return {
            "tensor": x,
            "twice": [x, x],
            "parameter": nn.Parameter(x),
            "model": nn.Linear(2, 2, device=device),
            "shape": x.shape,
        }

    for got in ranks(2, make):
        assert (
            got["tensor"].device.type == "cpu"
            and got["tensor"].tolist() == [0.0, 1.0, 2.0]
            and got["twice"][0] is got["twice"][1]
        )
        assert isinstance(got["parameter"], nn.Parameter) and got["parameter"].device.type == "cpu"
        assert got["model"](torch.ones(1, 2)).shape == (1, 2) and got["shape"] == (3,)


# --- groups that the user made -----------------------------------------------
def in_own_group(backend, chooses, function, *arguments):
    """`chooses`: None, "set" (set_device, as scripts of old do) or "bound" (device_id=)."""
    device = torch.device("twin", get_local_rank())
    if chooses is not None:
        torch.accelerator.set_device_index(device)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), get_world_size(), False)
    bound = {"device_id": device} if chooses == "bound" else {}
    dist.init_process_group(
        backend, store=dist.PrefixStore("own", store), rank=get_rank(), world_size=get_world_size(), **bound
    )
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "word", ["allreduce", "decentralized", "sync_bn", "delay_allreduce", "to_fsdp", "to_fsdp, offloaded"]
)
@pytest.mark.parametrize(
    "backend, chooses",
    [
        ("cpu:gloo,twin:twinccl", None),
        ("cpu:gloo,twin:twinccl", "set"),
        ("cpu:gloo,twin:twinccl", "bound"),
        ("twin:twinccl", None),
        ("twin:twinccl", "set"),
        ("twin:twinccl", "bound"),
    ],
)
def test_a_group_that_the_user_made_is_used_as_it_is(backend, chooses, word):
    """That of the device alone is what Ray's workers and most scripts have: init_process_group("nccl")."""
    if backend == "twin:twinccl" and word == "to_fsdp, offloaded":
        with pytest.raises(
            RankFailed,
            match=r"cpu_offload=True .* made with backend 'twin:twinccl', .* "
            r"init_process_group\('cpu:gloo,twin:twinccl'\)",
        ):
            launch(in_own_group, 2, backend, chooses, trained, word, "twin", timeout=60)
        return
    own = launch(in_own_group, 2, backend, chooses, trained, word, "twin", timeout=60)
    same_fit(word, own, launch(in_own_group, 2, "cpu:gloo", None, trained, word, "cpu", timeout=60))


@pytest.mark.parametrize(
    "backend, device, message",
    [
        (
            "gloo",
            "twin",
            r"sends nothing that is on twin, where this model is\. Make it with "
            r"init_process_group\('cpu:gloo,twin:twinccl'\)",
        ),
        (
            "twin:twinccl",
            "cpu",
            r"sends nothing that is on cpu, where this model is\. Make it with "
            r"init_process_group\('cpu:gloo,twin:twinccl'\)",
        ),
    ],
)
def test_a_group_of_one_backend_that_cannot_send_the_model_is_an_error(backend, device, message):
    with pytest.raises(RankFailed, match=message):
        launch(in_own_group, 2, backend, None, trained, "allreduce", device, timeout=60)


def bound_to_another():
    torch.accelerator.set_device_index(1 - get_rank())
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, False)
    dist.init_process_group(
        "cpu:gloo,twin:twinccl",
        store=store,
        rank=get_rank(),
        world_size=2,
        device_id=torch.device("twin", 1 - get_rank()),
    )
    learner().to_distributed()


def test_a_group_bound_to_another_device_is_an_error():
    with pytest.raises(
        RankFailed, match=r"bound to twin:\d \(device_id=…\), but this rank trains on twin:\d: its local_rank is \d"
    ):
        launch(bound_to_another, 2, timeout=60)


# --- loops of one's own ------------------------------------------------------
def own_loop(device_type, options):
    device = torch.device("twin", get_local_rank()) if device_type == "twin" else torch.device("cpu")
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    model = prepare_model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), device=device, **options)
    opt = prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    loader = prepare_data_loader(
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, shuffle=True), seed=1
    )
    for bx, by in loader:
        loss = F.mse_loss(model(bx.to(device)), by.to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
    return [whole(p) for p in model.parameters()], gather_for_metrics(loss).cpu(), all_sum(loss).cpu()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"algorithm": "bf16"},
        {"algorithm": "local_sgd", "warmup_steps": 1},
        {"delay_allreduce": True},
        {"sync_bn": True},
    ],
    ids=str,
)
def test_a_loop_of_ones_own_on_devices_is_that_of_the_cpu(ranks, options):
    for cpu, device in zip(ranks(2, own_loop, "cpu", options), ranks(2, own_loop, "twin", options), strict=True):
        torch.testing.assert_close(cpu, device, rtol=0, atol=0)  # there is no batch norm that sync_bn could change


# --- checkpoints and resuming ------------------------------------------------
class StopAt(Callback):
    def __init__(self, step):
        self.at = step

    def after_step(self, learn):
        if learn.step == self.at:
            raise KeyboardInterrupt


def interrupted(word, folder, sharded):
    norm = word != "to_fsdp"
    average = [] if word == "decentralized" else [partial(EMA, 0.9)]  # whose average is each rank's own

    def build(*more):
        callbacks = [Checkpoint(folder, every_n_steps=2, sharded=sharded), *(make() for make in average), *more]
        return together(learner("twin", norm=norm, callbacks=callbacks), word)

    straight = together(learner("twin", norm=norm, callbacks=[make() for make in average]), word)
    with straight.no_logging():
        straight.fit_one_cycle(2, 1e-2)
    learn = build(StopAt(6))
    with learn.no_logging(), pytest.raises(KeyboardInterrupt):
        learn.fit_one_cycle(2, 1e-2)
    destroy_process_group()
    init_process_group()
    learn = build()
    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2, resume=True)
    return outcome(straight), outcome(learn), learn.recorder.losses


@pytest.mark.parametrize("word", ["allreduce", "powersgd", "decentralized", "delay_allreduce", "to_fsdp"])
def test_a_fit_on_devices_that_was_resumed_is_one_that_never_stopped(ranks, word, tmp_path):
    for straight, resumed, _ in ranks(2, interrupted, word, tmp_path, False, timeout=90):
        same(straight, resumed)


def test_a_sharded_checkpoint_on_devices_is_resumed_exactly(ranks, tmp_path):
    for straight, resumed, _ in ranks(2, interrupted, "to_fsdp", tmp_path, True, timeout=90):
        same(straight, resumed)


# --- bad input, and ranks that fail ------------------------------------------
@pytest.mark.parametrize(
    "local_rank, message",
    [
        (7, r"local_rank=7, but the launcher started this process as LOCAL_RANK=\d: expected \d"),
        (0, "local_rank=0, but the launcher started this process as LOCAL_RANK=1: expected 1"),
    ],
)
def test_a_local_rank_that_is_not_the_launchers_is_an_error(local_rank, message):
    with pytest.raises(RankFailed, match=message):
        launch(lambda: learner().to_distributed(local_rank), 2, timeout=60)


def test_a_local_rank_of_no_process_of_this_machine_is_an_error(monkeypatch):
    from learnkit.distributed.world import check_local_rank

    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="local_rank=2, but 2 processes run on this machine: expected 0 to 1"):
        check_local_rank(2)


def test_more_ranks_than_devices_is_an_error_unless_they_train_on_the_cpu(monkeypatch):
    n = torch.accelerator.device_count()
    with pytest.raises(RankFailed, match=rf"local_rank={n}, but this machine shows {n} device"):
        launch(lambda: learner().to_distributed(), n + 1, timeout=60)
    losses = launch(lambda: trained("allreduce", "cpu")["losses"], n + 1, timeout=60, every_rank=True)
    assert losses[0] == losses[-1]


class Dies(Callback):
    def __init__(self, how):
        self.how = how

    def before_backward(self, learn):
        if learn.rank == 1 and learn.step == 3:
            if self.how == "killed":
                os.kill(os.getpid(), 9)
            raise ValueError("rank 1 has had enough")


@pytest.mark.parametrize(
    "how, reason",
    [
        ("raised", "rank 1 of 2 failed: ValueError: rank 1 has had enough"),
        ("killed", "rank 1 of 2 failed: it ended with signal SIGKILL"),
    ],
)
@pytest.mark.parametrize("word", ["allreduce", "to_fsdp"])
def test_a_rank_with_a_device_that_fails_ends_all(word, how, reason):
    def fit():
        learn = together(learner("twin", callbacks=[Dies(how)]), word)
        with learn.no_logging():
            learn.fit(2)

    with pytest.raises(RankFailed, match=reason):
        launch(fit, 2, timeout=40)
