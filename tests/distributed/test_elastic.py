# pyright: reportPrivateImportUsage=false
"""Nodes that come and go: ranks of one round find each other, and a fit goes on with what is left of its epoch, on
however many there are.
"""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Accumulate, Checkpoint, CSVLogger
from learnkit.callbacks.communicate import Communicate
from learnkit.devices.dtensor import is_shard
from learnkit.distributed import all_sum, get_rank, guard, init_process_group, launch
from tests.distributed.hosts import two_hosts
from tests.distributed.processes import ROOT, TORCHRUN, Processes, Started, free_port
from tests.reliability import conftest as children
from tests.reliability.conftest import Child

start = children.start  # a fixture: forked processes, of which none outlives the test


# --- ranks of one round find each other --------------------------------------
def meet(timeout: float) -> None:
    init_process_group(timeout=timeout)
    with guard():
        print(all_sum(10 ** get_rank()), flush=True)


def start_round(
    start: Callable[..., Child], store: dist.TCPStore, n_restarts: list[int], timeout: float = 20, ranks: Any = None
) -> list[Child]:
    """The workers of one round, as torchrun's agents start them over the agent's store: each agent counts its own
    restarts.
    """
    shared = {
        "WORLD_SIZE": len(n_restarts),
        "LOCAL_WORLD_SIZE": len(n_restarts),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return [
        start(meet, timeout, RANK=rank, LOCAL_RANK=rank, TORCHELASTIC_RESTART_COUNT=n_restarts[rank], **shared)
        for rank in ranks or range(len(n_restarts))
    ]


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False, multi_tenant=True)


def test_ranks_of_each_round_meet_over_one_store_however_often_each_agent_has_restarted(start, store):
    """After a failure a node that has joined meanwhile has counted none; after a change of membership nobody has
    counted it.
    """
    for n_restarts in ([0, 0], [1, 0], [1, 0], [1, 0, 2], [0, 1]):
        round = start_round(start, store, n_restarts)
        assert [child.end(20) for child in round] == [0] * len(n_restarts), [child.said() for child in round]
        assert [child.said()[-1] for child in round] == ["1" * len(n_restarts)] * len(n_restarts)


def test_ranks_of_a_round_that_was_broken_off_while_they_met_are_not_waited_for(start, store):
    for ranks in ([0], [1], [0]):
        broken_off = start_round(start, store, [0, 0], ranks=ranks)
        broken_off[0].wait_for(lambda: store.num_keys() > 1)
        for child in broken_off:
            child.kill()
    round = start_round(start, store, [0, 0])
    assert [child.end(20) for child in round] == [0, 0], [child.said() for child in round]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_never_come_says_so(rank, start, store):
    [child] = start_round(start, store, [0, 0], timeout=1, ranks=[rank])
    assert child.end(20) == 1
    assert (
        f"rank {rank} of 2 could not join the group at 127.0.0.1:{store.port} within 1 s: see that all 2 ranks were "
        f"started" in child.said()[-1]
    )


WHERE_THE_STORE_IS = "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for each torchrun"


def test_where_a_node_that_joined_would_end_the_job_it_is_told_how_it_would_not():
    """By the command of torchrun, for which a shell stands here."""
    script = "from learnkit.distributed import init_process_group; print(init_process_group())"
    command = ["sh", "-c", 'TORCHELASTIC_RUN_ID=job "$0" -c "$1"; exit $?', sys.executable, script, "--nnodes", "1:2"]
    environment = {"RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(ROOT), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout == "False\n"
    assert re.search(rf"torchrun was started with --nnodes=1:2, but torch .* {WHERE_THE_STORE_IS}", done.stderr)


@pytest.mark.parametrize(
    "nodes, served, told",
    [("1:2", "True", True), ("1:2", "False", False), ("2:2", "True", False), ("2", "True", False)],
)
def test_it_is_told_where_the_number_of_nodes_may_change_and_the_store_is_shared_alone(
    nodes, served, told, monkeypatch
):
    for name, value in {
        "PET_NNODES": nodes,
        "TORCHELASTIC_USE_AGENT_STORE": served,
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=WHERE_THE_STORE_IS) if told else nullcontext():
        assert not init_process_group()


# --- another number of ranks goes on -----------------------------------------
N, BS, EPOCHS, LR = 45, 4, 2, 0.05
Era = tuple[int, int | None]  # so many ranks, for so many batches (None: to the end)


class Batch(NamedTuple):
    epoch: int
    step: int  # done, before it
    samples: list[int]  # of all ranks
    lr: float
    world_size: int


class Notes(Callback):
    """What was trained on; a window that leads to no step was not. Leaves after so many batches, as on a signal that
    comes to all ranks.
    """

    def __init__(self, n_batches: int | None) -> None:
        self.n_batches, self.n_done, self.waiting, self.batches = n_batches, 0, [], []
        self.own: list[Any] = []  # weights, and PowerSGD's errors, that it began with and left with

    def before_batch(self, learn: Learner) -> None:
        if learn.training and not self.n_done:
            self.own.append(own_of(learn))

    def after_backward(self, learn: Learner) -> None:
        self.waiting += ids_in(learn)

    def after_step(self, learn: Learner) -> None:
        self.batches.append(
            Batch(learn.epoch, learn.step - 1, self.waiting, learn.opt.param_groups[-1]["lr"], learn.world_size)
        )
        self.waiting = []

    def after_batch(self, learn: Learner) -> None:
        if not learn.training:
            return
        self.n_done += 1
        if self.n_done == self.n_batches:
            self.own.append(own_of(learn))
            os.kill(os.getpid(), signal.SIGTERM)


def ids_in(learn: Learner) -> list[int]:
    assert isinstance(learn.inputs, tuple)
    return [int(i) for i in learn.inputs[0][:, 0].tolist()]


def own_of(learn: Learner) -> tuple[torch.Tensor, list[torch.Tensor]]:
    states = [cb.state_dict().get("powersgd", {"errors": []}) for cb in learn.running if isinstance(cb, Communicate)]
    return weights_of(learn), [error.clone() for state in states for error in state["errors"] if error is not None]


def weights_of(learn: Learner) -> torch.Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in learn.model.parameters()])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    if not is_shard(tensor):
        return tensor
    return tensor.full_tensor()  # type: ignore[attr-defined]


class Dataset(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)
    x[:, 0] = torch.arange(float(N))
    return Dataset(x, y)


class Scaled(nn.Module):
    """So that a sample's number, its first feature, is a number like the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([1 / N, 1, 1, 1])


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(Scaled(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def make_data(kind: str) -> DataBunch:
    samples = dataset()
    if kind == "batches":
        return DataBunch([(samples.x[k : k + BS], samples.y[k : k + BS]) for k in range(0, N, BS)])
    if kind != "DataLoader":
        return DataBunch.from_tensors(samples, samples, bs=BS, drop_last=False)
    samples = TensorDataset(*samples)
    return DataBunch(DataLoader(samples, BS, shuffle=True), DataLoader(samples, BS))


def train(
    n_batches: int | None,
    kind: str = "tensors",
    callbacks: Callable[[], list[Callback]] = list,
    spread: bool = False,
    **options: Any,
) -> Any:
    """What a user's script does, the same at each start; with what it noted."""
    torch.manual_seed(5)
    learn = Learner(
        make_data(kind), net(), opt_func=torch.optim.SGD, wd=0.0, callbacks=[Checkpoint("kept"), *callbacks()]
    )
    if spread:
        learn.to_fsdp()
    else:
        learn.to_distributed(**options)
    notes = Notes(n_batches)
    with learn.no_logging(), nullcontext() if n_batches is None else pytest.raises(SystemExit, match="143"):
        learn.fit_one_cycle(EPOCHS, LR, resume=True, moms=None, callbacks=[notes])
    train_losses = [row[0] for row in learn.recorder.values]
    return (
        notes,
        weights_of(learn),
        learn.recorder.lrs,
        learn.recorder.losses,
        train_losses,
        learn.step,
        learn.n_steps,
        torch.rand(1).item(),
    )


def history(eras: list[Era], **options: Any) -> list[list[Any]]:
    """Of each era, what each of its ranks tells."""
    return [
        launch(functools.partial(train, n_batches, **options), world_size, every_rank=True, timeout=60)
        for world_size, n_batches in eras
    ]


def trained(eras: list[list[Any]]) -> list[Batch]:
    """The steps of all eras, each with the samples of all its ranks."""
    steps = [zip(*[notes.batches for notes, *_ in ranks], strict=True) for ranks in eras]
    return [
        of_ranks[0]._replace(samples=[i for batch in of_ranks for i in batch.samples])
        for era in steps
        for of_ranks in era
    ]


def one_cycle_at(k: int, n: int) -> float:
    """README's definition, with the defaults of fit_one_cycle."""

    def cosine(a: float, b: float, t: float) -> float:
        return b + (a - b) * (1 + math.cos(math.pi * t)) / 2

    peak = int(n * 0.3)
    return cosine(LR / 25, LR, k / peak) if k < peak else cosine(LR, LR / 25e4, (k - peak) / (n - 1 - peak))


def rates(steps: list[Batch]) -> list[float]:
    """Each as far from the cycle's end as what is left of the samples makes steps, on the ranks that make this one."""
    found, n_done = [], Counter[int]()
    for batch in steps:
        size = BS * batch.world_size
        left = math.ceil((N - n_done[batch.epoch]) / size) + (EPOCHS - 1 - batch.epoch) * math.ceil(N / size)
        whole = EPOCHS * math.ceil(N / size)
        found.append(one_cycle_at(whole - left, whole))
        n_done[batch.epoch] += len(batch.samples)
    return found


def by_hand(steps: list[Batch]) -> tuple[torch.Tensor, list[float], list[float]]:
    """Weights, the loss of each step and each epoch's, of one plain loop over these batches at these rates."""
    model, samples = net(), dataset()
    losses, sizes = [], [len(batch.samples) for batch in steps]
    for batch in steps:
        loss = nn.functional.cross_entropy(model(samples.x[batch.samples]), samples.y[batch.samples])
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= batch.lr * p.grad  # type: ignore[operator]
        model.zero_grad()
        losses.append(loss.item())
    of_epochs = [
        [(loss, n) for loss, n, batch in zip(losses, sizes, steps, strict=True) if batch.epoch == epoch]
        for epoch in range(EPOCHS)
    ]
    means = [sum(loss * n for loss, n in epoch) / sum(n for _, n in epoch) for epoch in of_epochs]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses, means


HISTORIES: list[list[Era]] = [
    [(2, 3), (1, 4), (2, None)],
    [(2, 2), (3, 4), (1, None)],
    [(1, 7), (3, 1), (2, 5), (1, None)],
]


@pytest.mark.parametrize("kind", ["tensors", "DataLoader", "to_fsdp"])
@pytest.mark.parametrize("eras", HISTORIES, ids=["2-1-2", "2-3-1", "1-3-2-1"])
def test_a_fit_that_changes_hands_equals_one_loop_over_each_sample_once(eras, kind):
    ended = history(eras, kind=kind, spread=kind == "to_fsdp")
    steps = trained(ended)
    for epoch in range(EPOCHS):
        counts = Counter(i for batch in steps if batch.epoch == epoch for i in batch.samples)
        assert counts == Counter(range(N)), f"epoch {epoch}"
    assert [batch.step for batch in steps] == list(range(len(steps)))
    weights, losses, means = by_hand(steps)
    for _, found, lrs, found_losses, train_losses, n_done, n_planned, _ in ended[-1]:
        assert n_done == n_planned == len(steps)
        assert torch.allclose(found, weights, atol=1e-5)
        assert lrs == [batch.lr for batch in steps] == pytest.approx(rates(steps))
        assert found_losses == pytest.approx(losses, abs=1e-5)
        assert train_losses == pytest.approx(means, abs=1e-5)


def test_of_ready_made_batches_of_unequal_sizes_each_is_trained_on_once_too():
    """Dealt out one to a rank: 6 of 12, then 4, then 2; each rank counts by its samples."""
    steps = trained(ended := history([(2, 3), (1, 4), (2, None)], kind="batches"))
    assert [len(batch.samples) for batch in steps if batch.epoch == 0] == [8] * 3 + [4] * 4 + [5]
    for epoch in range(EPOCHS):
        assert Counter(i for batch in steps if batch.epoch == epoch for i in batch.samples) == Counter(range(N))
    weights, losses, _ = by_hand(steps)
    for _, found, lrs, found_losses, *_ in ended[-1]:
        assert torch.allclose(found, weights, atol=1e-5)
        assert found_losses == pytest.approx(losses, abs=1e-5) and lrs[-6:] == pytest.approx(
            [one_cycle_at(k, 12) for k in range(6, 12)]
        )


def test_where_the_ranks_come_back_within_an_epoch_the_schedule_is_the_one_that_it_was():
    """Of 45 samples 2 ranks take 24 in 3 steps, one takes 16 in 4, and 2 the last 5: the second epoch is that of 2
    ranks throughout.
    """
    lrs = history([(2, 3), (1, 4), (2, None)])[-1][0][2]
    assert lrs[-6:] == pytest.approx([one_cycle_at(k, 12) for k in range(6, 12)])


def test_of_a_window_of_batches_that_is_broken_off_each_sample_is_trained_on_again():
    """Its gradients are of no use to other ranks."""
    ended = history([(2, 3), (1, 3), (2, None)], callbacks=lambda: [Accumulate(2)])
    steps = trained(ended)
    assert [len(batch.samples) for batch in steps if batch.epoch == 0] == [16, 8, 16, 5]
    assert Counter(i for batch in steps if batch.epoch == 0 for i in batch.samples) == Counter(range(N))
    weights, losses, _ = by_hand(steps)
    for _, found, _, found_losses, _, n_done, n_planned, _ in ended[-1]:
        assert n_done == n_planned == len(steps)
        assert torch.allclose(found, weights, atol=1e-5)
        assert found_losses == pytest.approx(losses, abs=1e-5)


def test_an_epoch_of_which_too_little_is_left_for_so_many_ranks_is_over():
    """One sample is not enough for two ranks: of 45, one has trained on 44 in 11 steps."""
    steps = trained(ended := history([(1, 11), (2, None)]))
    assert [len(batch.samples) for batch in steps] == [4] * 11 + [8] * 5 + [5]
    assert ended[-1][0][5:7] == (17, 17)


def test_a_log_goes_on_with_the_losses_of_all_ranks():
    ended = history([(2, 3), (3, 1), (1, None)], callbacks=lambda: [CSVLogger("log.csv", every_n_steps=5)])
    steps = trained(ended)
    losses, rows = ended[-1][0][3], [line.split(",") for line in Path("log.csv").read_text().splitlines()]
    assert rows[0][:2] == ["step", "loss"]
    first = next(row for row in rows if row[0] == "5")
    assert float(first[1]) == pytest.approx(
        sum(loss * len(batch.samples) for loss, batch in zip(losses[:5], steps[:5], strict=True))
        / sum(len(batch.samples) for batch in steps[:5]),
        abs=1e-5,
    )


def test_ranks_that_come_later_draw_anew_and_the_others_go_on():
    first, alone, second, third = [
        [rank[-1] for rank in ranks] for ranks in history([(2, 3), (1, 1), (2, 1), (3, None)])
    ]
    assert first[0] == alone[0] == second[0] == third[0]  # the model draws nothing: what was put back
    assert second[1] == third[1]
    assert len({first[0], first[1], second[1], third[2]}) == 4


@pytest.mark.parametrize("algorithm", ["local_sgd", "decentralized"])
def test_ranks_that_had_weights_of_their_own_go_on_from_their_mean_on_another_number(algorithm):
    two, one, three = history(
        [(2, 3), (1, 2), (3, None)], algorithm=algorithm, **({"warmup_steps": 1} if algorithm == "local_sgd" else {})
    )
    a, b = [rank[0].own[-1][0] for rank in two]
    assert not torch.equal(a, b)
    assert torch.allclose(one[0][0].own[0][0], (a + b) / 2, atol=1e-7)
    for rank in three:
        assert torch.equal(rank[0].own[0][0], one[0][0].own[-1][0])
        assert torch.equal(rank[1], three[0][1])


def test_what_powersgd_owes_is_shared_among_another_number_of_ranks():
    """Each has the mean of the errors, so that the mean gradient gets what it still lacks; alone there is nobody to owe
    it to.
    """
    two, three, one = history([(2, 4), (3, 2), (1, None)], algorithm="powersgd", warmup_steps=2)
    owed = [torch.stack(errors).mean(0) for errors in zip(*[rank[0].own[-1][1] for rank in two], strict=True)]
    assert len(owed) == 4 and any(error.abs().max() > 0 for error in owed)
    for rank in three:
        for found, expected in zip(rank[0].own[0][1], owed, strict=True):
            assert torch.allclose(found, expected, atol=1e-8)
    assert one[0][5] == one[0][6]


# --- two hosts ---------------------------------------------------------------
ELASTIC = (
    "--nnodes=1:2",
    "--nproc-per-node=1",
    "--max-restarts=3",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=host0:29500",
    "--rdzv-id=job",
    "--rdzv-conf=last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=4",
)
TRAIN = """\
import json
import os
import signal
import time
import time
from pathlib import Path

import torch

from learnkit import Callback, Learner
from learnkit.callbacks import Checkpoint
from tests.distributed.test_elastic import EPOCHS, LR, Notes, make_data, net

class Events(Callback):
    def before_batch(self, learn):
        if not learn.training: return
        host = os.uname().nodename
        Path(f"{host}-{learn.world_size}-{learn.rank}-{learn.step}").touch()
        if host == "host1" and learn.step == 2: time.sleep(60)                          # it is killed meanwhile
        if learn.world_size == 1 and learn.step == 5: wait_for_signal(learn)            # its agent's, as a host joins
        if host == "host1" and learn.step == 8:
            os.kill(os.getppid(), signal.SIGTERM)                                       # this host is to be given back
            wait_for_signal(learn)

    def after_step(self, learn):
        with open(f"notes-{learn.rank}", "a") as file: file.write(json.dumps(notes.batches[-1]) + "\\n")

def wait_for_signal(learn):
    while learn.wanted is None: time.sleep(0.01)

torch.manual_seed(5)
kept = Checkpoint("kept", every_n_steps=1)
learn = Learner(make_data("tensors"), net(), opt_func=torch.optim.SGD, wd=0., callbacks=[kept])
learn.to_distributed()
notes = Notes(None)
learn.fit_one_cycle(EPOCHS, LR, moms=None, resume=True, callbacks=[Events(), notes])
weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
if learn.rank == 0: torch.save([weights, learn.recorder.lrs], "outcome")
"""


def test_a_job_that_loses_a_host_gains_it_again_and_has_to_give_it_back_trains_on_each_sample_once():
    """The host that is lost has rank 0, which keeps the store and writes the checkpoints: agents sort nodes by what
    they are called.
    """
    Path("train.py").write_text(TRAIN)
    with two_hosts() as hosts, Processes(Path.cwd()) as processes:

        def start(i: int, *options: str) -> Started:
            return processes.start(
                *hosts.command(i, *TORCHRUN, *ELASTIC, *options, "train.py"), TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
            )

        first, lost = start(0), start(1, "--local-addr=10.77.0.2")
        wait_for("host1-2-0-2", first)
        lost.process.kill()
        wait_for("host0-1-0-5", first)
        again = start(1)
        assert first.ended(90).code == 0
        assert again.ended(10).code != 0
        assert processes.left_after(1) == []
    of_rank_0, of_rank_1 = (
        [Batch(*json.loads(line)) for line in Path(f"notes-{i}").read_text().splitlines()] for i in range(2)
    )
    others = {batch.step: batch.samples for batch in of_rank_1}
    steps = [batch._replace(samples=batch.samples + others.get(batch.step, [])) for batch in of_rank_0]
    assert [batch.step for batch in steps] == list(range(len(steps)))
    eras = [(world_size, len(list(batches))) for world_size, batches in groupby(steps, lambda batch: batch.world_size)]
    assert [world_size for world_size, _ in eras] == [2, 1, 2, 1] and [n for _, n in eras[:2]] == [2, 4]
    for epoch in range(EPOCHS):
        assert Counter(i for batch in steps if batch.epoch == epoch for i in batch.samples) == Counter(range(N))
    weights, lrs = torch.load("outcome", weights_only=True)
    assert torch.allclose(weights, by_hand(steps)[0], atol=1e-5) and lrs == pytest.approx(rates(steps))
    Path("kept").rename("kept by the hosts")
    [alike] = history([*eras[:-1], (1, None)])[-1]
    assert torch.equal(weights, alike[1]) and lrs == alike[2]


def wait_for(file: str, started: Started) -> None:
    deadline = time.monotonic() + 120
    while not Path(file).exists():
        assert started.process.poll() is None and time.monotonic() < deadline, started.err.read_text()
        time.sleep(0.02)
