"""What a distributed training step costs over DistributedDataParallel by hand, in exact counts. Seconds:
benchmarks/ddp.py.
"""

import io
import sys
from collections import Counter
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import learnkit
from learnkit import DataBunch, Learner, accuracy, error_rate
from learnkit.callbacks import Progress, Recorder
from learnkit.distributed import sync_batchnorm

HOME = tuple(
    str(Path(folder).resolve()) for folder in (learnkit.__path__[0], sys.modules["learnkit.callbacks"].__path__[0])
)
DISPLAYS = (Progress.advance.__code__, Progress.show_loss_of_all.__code__)
BATCH = 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Traffic(TorchDispatchMode):
    """Counts collectives by name, those that DDP starts in C++ too, and "read", each number fetched from a tensor.

    Those that happen while the bar is drawn are counted apart, as "bar: read" and so on.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "c10d":
            self.count(name)
        if name == "_local_scalar_dense":
            self.count("read")  # item, bool, float, int, an index, a format
        return func(*args, **(kwargs or {}))

    def count(self, name):
        frame = sys._getframe()
        while frame is not None and frame.f_code not in DISPLAYS:
            frame = frame.f_back
        self.counts[name if frame is None else f"bar: {name}"] += 1


class Reads(TorchFunctionMode):
    """Tells of those that the dispatcher does not see."""

    def __init__(self, tell):
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.tell("read")
        return func(*args, **(kwargs or {}))


def traffic(work) -> Counter[str]:
    with redirect_stdout(Terminal()), Traffic() as counted, Reads(counted.count):
        work()
    return counted.counts


def calls(work) -> Counter[str]:
    """The Python functions that this rank calls (generators resumed included): ours by name, and those of all
    "others".
    """
    names: Counter[str] = Counter()

    def see(frame, event, arg):
        if event == "call":
            names[frame.f_code.co_name if is_ours(frame.f_code.co_filename) else "others"] += 1

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return names


@cache
def is_ours(file: str) -> bool:
    return str(Path(file).resolve()).startswith(HOME)


def per_step(count, fit_of_n) -> Counter[str]:
    """What ten steps more of a second fit need, by ten."""
    counts = []
    for n in (4, 14):
        fit = fit_of_n(n)
        fit()
        counts.append(count(fit))
    more = {name: counts[1][name] - counts[0][name] for name in counts[0] | counts[1]}
    return Counter({name: n / 10 for name, n in more.items() if n})


# --- the two sides: n steps of a fit on each of two ranks --------------------


def net(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32) if norm else nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 2)
    )


def data(n):
    return torch.randn(n, 16), torch.randint(2, (n,))


def by_hand(n, norm=False, sync_bn=False, loader=False, **ddp_options):
    dataset = TensorDataset(*data(2 * BATCH * n))
    batches = DataLoader(dataset, BATCH, sampler=DistributedSampler(dataset)) if loader else [dataset[:BATCH]] * n
    model = sync_batchnorm(net(norm)) if sync_bn else net(norm)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **ddp_options)

    def fit():
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        for x, y in batches:
            loss = F.cross_entropy(ddp(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()

    return fit


def learner(n, valid=None, norm=False, loader=False, metrics=(), n_ranks=2, **options):
    train = data(n_ranks * BATCH * n)
    bunch = DataBunch.from_tensors(train, valid, bs=BATCH)
    if loader:
        bunch = DataBunch(DataLoader(TensorDataset(*train), BATCH, shuffle=True, drop_last=True), bunch.valid_dl)
    learn = Learner(
        bunch,
        net(norm),
        loss_func=F.cross_entropy,
        opt_func=partial(torch.optim.SGD, momentum=0.9),
        wd=0.0,
        metrics=metrics,
    )
    return learn if n_ranks == 1 else learn.to_distributed(**options)


def bare(n, **options):
    learn = learner(n, **options).remove_callback(Progress).remove_callback(Recorder)
    return lambda: learn.fit(1, 0.1)


def default(n, **options):
    learn = learner(n, valid=data(10), metrics=accuracy, **options)
    return lambda: learn.fit_one_cycle(1, 0.1)


# --- what is counted ---------------------------------------------------------


def test_the_counting_sees_every_collective_that_the_group_numbers(ranks):
    """The control: the group itself numbers its collectives."""

    def fn():
        fit, group = by_hand(3, norm=True), dist.group.WORLD
        before = group._get_sequence_number_for_group()
        return sum(traffic(lambda: (fit(), dist.barrier())).values()), group._get_sequence_number_for_group() - before

    for counted, numbered in ranks(2, fn):
        assert counted == numbered >= 10


def test_a_step_has_the_collectives_of_ddp_no_other_and_no_read(ranks):
    cases = [
        ({}, {"allreduce_": 1}),
        ({"loader": True}, {"allreduce_": 1}),
        ({"bucket_cap_mb": 0.001}, {"allreduce_": 2}),
        ({"norm": True}, {"allreduce_": 1, "broadcast_": 2}),
        ({"norm": True, "sync_bn": True}, {"allreduce_": 3, "broadcast_": 2}),
    ]

    def fn():
        return [[per_step(traffic, partial(side, **options)) for side in (by_hand, bare)] for options, _ in cases]

    assert ranks(2, fn) == [[[expected, expected] for _, expected in cases]] * 2


def test_beside_the_bar_every_ten_steps_the_default_callbacks_neither_talk_nor_read(ranks):
    def fn():
        return [per_step(traffic, partial(default, loader=loader)) for loader in (False, True)]

    for counts in (counts for of_rank in ranks(2, fn) for counts in of_rank):
        assert {name: n for name, n in counts.items() if not name.startswith("bar: ")} == {"allreduce_": 1}
        assert counts["bar: allreduce_"] <= 0.1


def test_a_validation_is_one_collective_however_many_batches_and_metrics(ranks):
    def fn():
        return [
            traffic(learner(1, valid=data(2 * BATCH * n), metrics=metrics).validate)
            for n, metrics in ((1, ()), (5, [accuracy, error_rate]))
        ]

    for counts in (counts for of_rank in ranks(2, fn) for counts in of_rank):
        assert {name: n for name, n in counts.items() if name != "read"} == {"allreduce_": 1}


def test_an_epoch_adds_four_collectives_at_most(ranks):
    """Of the training losses, the validation, the stops, and a check that all did as many steps."""

    def fn():
        learn = learner(4, valid=data(10), metrics=accuracy)
        learn.fit(1, 0.1)
        one, two = (traffic(partial(learn.fit, n, 0.1)) for n in (1, 2))
        return sum(two[name] - one[name] for name in two if name != "read")

    for more in ranks(2, fn):
        assert 4 + 2 <= more <= 4 + 4


def test_a_step_makes_seven_calls_more_than_alone_and_at_most_four_more_than_ddp_by_hand(ranks):
    def fn():
        return [per_step(calls, side) for side in (bare, partial(bare, n_ranks=1), by_hand)]

    for ours, alone, hand in ranks(2, fn):
        assert Counter({**ours, "others": 0}) - alone == {
            "around_batch": 1,
            "around_backward": 1,
            "run_owned": 2,
            "run_layer": 2,
            "passed": 1,
        }
        assert sum(ours.values()) - sum(hand.values()) <= 4


def test_a_step_of_a_data_loader_makes_at_most_eleven_calls_more_than_ddp_by_hand(ranks):
    def fn():
        return [per_step(calls, partial(side, loader=True)) for side in (bare, by_hand)]

    for ours, hand in ranks(2, fn):
        assert sum(ours.values()) - sum(hand.values()) <= 11
