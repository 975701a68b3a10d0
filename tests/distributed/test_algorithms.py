"""`to_distributed(algorithm=…)`: PyTorch's communication hooks and averages of weights, as one word each."""

import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Accumulate, Checkpoint
from learnkit.distributed import communication_of, gather_objects, get_rank, get_world_size, prepare_model
from learnkit.distributed.algorithms import NAMES, as_algorithm
from learnkit.distributed.request import SAVE

ALL = [
    ("fp16", {}),
    ("bf16", {}),
    ("powersgd", dict(warmup_steps=2)),
    ("bytegrad", {}),
    ("local_sgd", dict(period=3, warmup_steps=2)),
    ("hierarchical", dict(period=2, warmup_steps=0)),
    ("decentralized", dict(period=2)),
]
N, BATCH = 48, 4  # 6 steps an epoch on two ranks


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))


def samples():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 16, generator=g)
    return x, x[:, :3].argmax(1)


def learner(algorithm="allreduce", callbacks=(), **options):
    data = DataBunch.from_tensors(samples(), samples(), bs=BATCH, seed=3)
    learn = Learner(data, net(), opt_func=partial(torch.optim.SGD, momentum=0.9), wd=0.0, callbacks=callbacks)
    return learn.to_distributed(
        algorithm=algorithm, bucket_cap_mb=0.001, **options
    )  # several buckets: what hangs where it hangs


def fitted(*args, epochs=2, **options):
    learn = learner(*args, **options)
    with learn.no_logging():
        learn.fit(epochs, 0.1)
    return learn


def weights(learn):
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def batches_of(learn):
    """This rank's, in the order of two epochs."""
    seen = []

    class See(Callback):
        def before_batch(self, learn):
            if learn.training:
                seen.append((learn.inputs[0].clone(), learn.target.clone()))

    with learn.no_logging():
        learn.fit(2, 0.1, callbacks=[See()])
    return seen


def test_every_algorithm_ends_with_one_model_on_all_ranks_near_that_of_allreduce(ranks):
    def fn():
        plain = fitted()
        found = {}
        for name, options in ALL:
            learn = fitted(name, **options)
            found[name] = weights(learn), learn.values["valid_loss"]
        return weights(plain), plain.values["valid_loss"], found

    (plain, loss, first), (_, _, second) = ranks(2, fn, timeout=60)
    for name, _ in ALL:
        assert torch.equal(first[name][0], second[name][0]), name
        assert first[name][1] == second[name][1]
        assert (
            0 < (first[name][0] - plain).abs().max() < {"fp16": 1e-3, "bf16": 1e-2, "bytegrad": 0.02}.get(name, 0.3)
        ), name
        assert abs(first[name][1] - loss) < {"fp16": 1e-3, "bf16": 3e-3, "bytegrad": 0.01}.get(name, 0.1), name


def test_final_losses_on_digits_are_as_near_to_allreduces_as_benchmarks_algorithms_says(ranks, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark: Any = import_module("algorithms")
    words = ["allreduce", "fp16", "bf16", "powersgd", "bytegrad", "local_sgd", "decentralized", "to_fsdp"]

    def fn():
        return {word: benchmark.final_loss(word, seed=0, n_epochs=3) for word in words}

    losses = ranks(2, fn, timeout=60)[0]
    assert losses["allreduce"] < 0.5  # of 2.3 at the start
    for word in words[1:]:
        assert abs(losses[word] - losses["allreduce"]) < benchmark.BOUNDS[word], word
    assert len(set(losses.values())) >= len(words) - 1  # by other ways; to_fsdp's may be allreduce's very own


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_hook_of_torch_and_its_name_are_the_same(name, ranks):
    def fn():
        hook = getattr(default_hooks, f"{name}_compress_hook")
        return torch.equal(weights(fitted(name)), weights(fitted(lambda state, bucket: hook(dist.group.WORLD, bucket))))

    assert ranks(2, fn) == [True, True]


def test_decentralized_is_a_loop_by_hand_that_averages_weights_every_so_many_steps_and_at_the_end_of_an_epoch(ranks):
    def fn():
        own = batches_of(learner("decentralized", period=4))
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for k, (x, y) in enumerate(own):
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            if k % 4 == 0 or k + 1 in (len(own) // 2, len(own)):
                for p in model.parameters():
                    dist.all_reduce(p.data)
                    p.data /= 2
        by_hand = torch.cat([p.detach().flatten() for p in model.parameters()])
        return float((weights(fitted("decentralized", period=4)) - by_hand).abs().max())

    assert max(ranks(2, fn)) < 1e-6


def on_two_machines(name, options, among_gradients, among_weights):
    """Largest difference between a fit on two machines of two ranks and a loop by hand, which in step k averages
    gradients and then weights among that many ranks: 4, the 2 of a machine, or 1.
    """
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    own = batches_of(learner(name, **options))
    model, pair = net(), dist.new_subgroups(group_size=2)[0]
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def average(tensors, n):
        for t in tensors if n > 1 else []:
            dist.all_reduce(t, group=pair if n == 2 else None)
            t /= n

    for k, (x, y) in enumerate(own):
        F.cross_entropy(model(x), y).backward()
        average([p.grad for p in model.parameters()], among_gradients(k))
        opt.step()
        opt.zero_grad()
        average([p.data for p in model.parameters()], 4 if k + 1 in (len(own) // 2, len(own)) else among_weights(k))
    by_hand = torch.cat([p.detach().flatten() for p in model.parameters()])
    return float((weights(fitted(name, **options)) - by_hand).abs().max())


def test_on_two_machines_hierarchical_averages_weights_within_a_machine_and_every_fourth_time_between_them(ranks):
    def fn():
        return on_two_machines("hierarchical", dict(period=1, warmup_steps=0), lambda k: 1, lambda k: 2 if k % 4 else 4)

    assert max(ranks(4, fn, timeout=60)) < 1e-6


def test_on_two_machines_local_sgd_averages_gradients_within_a_machine_and_weights_between_them(ranks):
    def fn():
        return on_two_machines(
            "local_sgd", dict(period=2, warmup_steps=1), lambda k: 4 if k < 1 else 2, lambda k: 4 if k % 2 else 1
        )

    assert max(ranks(4, fn, timeout=60)) < 1e-6


def test_on_two_machines_a_fit_leaves_no_group_behind(ranks):
    def fn():
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        counts = []
        for name in ("local_sgd", "hierarchical"):
            learn = learner(name, period=2, warmup_steps=0)
            with learn.no_logging():
                for _ in range(2):
                    learn.fit(1, 0.1)
                    counts.append(len(dist.distributed_c10d._world.pg_map))
        return counts

    assert ranks(4, fn, timeout=60) == [[1, 1, 1, 1]] * 4


def test_local_sgd_is_ddp_until_its_warm_up_is_over(ranks):
    def fn():
        return [
            torch.equal(weights(fitted("local_sgd", warmup_steps=n, period=3, epochs=1)), weights(fitted(epochs=1)))
            for n in (100, 2)
        ]

    assert ranks(2, fn) == [[True, False]] * 2


def test_powersgd_is_torchs_hook_by_hand(ranks):
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    def fn():
        own = batches_of(learner())
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=2, start_powerSGD_iter=3, orthogonalization_epsilon=1e-8
        )  # type: ignore[arg-type]

        def hook(state, bucket):
            future = powerSGD_hook.powerSGD_hook(state, bucket)
            future.wait()
            return future

        model = net()
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.001, gradient_as_bucket_view=True)
        ddp.register_comm_hook(state, hook)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for x, y in own:
            F.cross_entropy(ddp(x), y).backward()
            opt.step()
            opt.zero_grad()
        by_hand = torch.cat([p.detach().flatten() for p in model.parameters()])
        return float((weights(fitted("powersgd", rank=2, warmup_steps=3)) - by_hand).abs().max())

    assert max(ranks(2, fn)) < 1e-6


# --- what compression loses in a step, against its f -------------------------
def gradients(name, **options):
    """(the mean that the hook gives, as float64; each rank's own) of one backward pass, and the state of the hook."""
    x, y = (part.tensor_split(get_world_size())[get_rank()] for part in samples())
    own, model = net(), prepare_model(net(), algorithm=name, **options)
    for _ in range(1 + options.get("warmup_steps", 0)):
        own.zero_grad()
        model.zero_grad()
        for each in (own, model):
            F.cross_entropy(each(x), y).backward()
    given, communication = [p.grad.double() for p in model.parameters()], communication_of(model)
    return given, gather_objects([p.grad.double() for p in own.parameters()]), communication and communication.state


@pytest.mark.parametrize("name, rounding", [("fp16", 2**-11), ("bf16", 2**-9)])
def test_rounded_gradients_are_off_by_a_rounding_of_the_number_the_quotient_and_each_sum_at_most_and_by_some_at_all(
    name, rounding, ranks
):
    def fn():
        given, of_ranks, _ = gradients(name)
        off = [(got - torch.stack(own).mean(0)).abs() for got, *own in zip(given, *of_ranks, strict=True)]
        n = get_world_size() + 1
        bounds = [
            1.02 * n * rounding * torch.stack(own).abs().mean(0) + n * 2**-25 for own in zip(*of_ranks, strict=True)
        ]
        return all(bool((a <= b).all()) for a, b in zip(off, bounds, strict=True)), max(float(a.max()) for a in off)

    for n in (2, 3):
        for within, most in ranks(n, fn):
            assert within and most > rounding * 1e-3


def test_gradients_of_8_bits_are_off_by_half_a_step_of_each_ranks_range(ranks):
    def fn():
        given, of_ranks, _ = gradients("bytegrad")
        rows = torch.stack([torch.cat([g.flatten() for g in own]) for own in of_ranks])
        steps = (rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)) / 255
        off = (torch.cat([g.flatten() for g in given]) - rows.mean(0)).abs().max()
        return float(off / steps.mean())

    for n in (2, 3):
        for ratio in ranks(n, fn):
            assert 0.1 < ratio <= 0.505


@pytest.mark.parametrize("rank", [1, 2])
def test_powersgd_gives_a_matrix_of_its_rank_near_the_best_one_and_keeps_all_that_it_lost(rank, ranks):
    def fn():
        given, of_ranks, state = gradients("powersgd", rank=rank, warmup_steps=2)
        shapes = [g.shape for g in given]
        kept = torch.stack(gather_objects(next(iter(state.state.error_dict.values())))).double().mean(0)
        kept = [
            part.view(shape)
            for part, shape in zip(kept.split([s.numel() for s in order_of(state)]), order_of(state), strict=True)
        ]
        exact = [torch.stack(own).mean(0) for own in zip(*of_ranks, strict=True)]
        found = []
        for got, mean in zip(given, exact, strict=True):
            [error] = [e for e in kept if e.shape == got.shape]
            lost, best = (got - mean).norm(), torch.linalg.svdvals(mean)[rank:].norm() if mean.ndim == 2 else 0.0
            found.append(
                (
                    float((got + error - mean).abs().max()),
                    int(torch.linalg.matrix_rank(got, rtol=1e-4)) if got.ndim == 2 else 0,
                    float(lost / mean.norm()),
                    float(best / mean.norm()),
                )
            )
        return found, [tuple(s) for s in shapes]

    def order_of(state):
        return [p.shape for p in next(iter(state.layouts.values()))]

    for found, shapes in ranks(2, fn):
        for (missing, own_rank, lost, best), shape in zip(found, shapes, strict=True):
            assert missing < 1e-6, "given and kept are all there was"
            if len(shape) == 2 and sum(shape) * rank * 2 < shape[0] * shape[1]:
                assert own_rank <= rank and best - 1e-6 <= lost < min(1.0, 1.5 * best + 0.05)
            else:
                assert lost < 1e-6  # not worth compressing


class Killed(Exception):
    pass


class Kill(Callback):
    """Saves after the fourth batch of the second epoch, and dies in the next."""

    order = -200

    def before_batch(self, learn):
        if learn.training and learn.epoch == 1 and learn.batch_index == 3:
            learn.wanted = SAVE
        if learn.training and learn.epoch == 1 and learn.batch_index == 4:
            raise Killed


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_that_was_resumed_within_an_epoch_equals_the_one_that_never_stopped_with_every_algorithm(
    accumulate, ranks, tmp_path
):
    def fn():
        differing = []
        for name, options in ALL:
            callbacks = [Accumulate(accumulate)] if accumulate > 1 else []
            whole = fitted(name, [*callbacks], epochs=3, **options)
            folder = tmp_path / name
            learn = learner(name, [*([Accumulate(2)] if accumulate > 1 else []), Checkpoint(folder)], **options)
            with learn.no_logging(), pytest.raises(Killed):
                learn.fit(3, 0.1, callbacks=[Kill()])
            again = learner(name, [*([Accumulate(2)] if accumulate > 1 else []), Checkpoint(folder)], **options)
            with again.no_logging():
                again.fit(3, 0.1, resume=True)
            assert again.resumed is not None and again.resumed["items"]
            if not torch.equal(weights(whole), weights(again)):
                differing.append((name, float((weights(whole) - weights(again)).abs().max())))
        return differing

    assert ranks(2, fn, timeout=90) == [[], []]


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(algorithm="powersdg"), ValueError, "is unknown: expected one of allreduce, fp16"),
        (dict(algorithm="qadam"), ValueError, "PyTorch has no engine for quantized Adam"),
        (dict(algorithm="async"), ValueError, "no engine for asynchronous"),
        (
            dict(algorithm="low_precision_decentralized"),
            ValueError,
            "no engine for decentralized averaging in low precision",
        ),
        (dict(algorithm=3), TypeError, "expected one of allreduce"),
        (dict(algorithm="fp16", period=3), ValueError, "it is an option of local_sgd, hierarchical, decentralized"),
        (dict(algorithm="decentralized", period=0), ValueError, "period=0: expected a whole number, 1 or more"),
        (dict(algorithm="powersgd", rank=True), ValueError, "rank=True: expected a whole number"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(given, error, message):
    with pytest.raises(error, match=message):
        Learner(DataBunch.from_tensors(samples(), bs=4), net()).to_distributed(**given)


def test_one_reduction_afterwards_and_another_algorithm_exclude_each_other(ranks):
    def fn():
        try:
            learner("fp16", delay_allreduce=True)
        except ValueError as error:
            return str(error)

    assert all("use one" in text for text in ranks(2, fn))


def test_alone_every_name_is_accepted_and_does_nothing():
    plain = fitted()
    for name in NAMES:
        assert torch.equal(weights(fitted(name)), weights(plain))
    assert as_algorithm("powersgd").warmup_steps == 10
