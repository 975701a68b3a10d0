"""A loop of one's own takes the options of `to_distributed` and `to_fsdp`, and ends with the Learner's numbers."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from learnkit.devices.dtensor import whole
from learnkit.distributed import (
    communication_of,
    get_rank,
    prepare_data_loader,
    prepare_model,
    prepare_optimizer,
    set_epoch,
    shard_model,
    unwrap_model,
)
from learnkit.distributed.fully_shard import is_fully_sharded
from tests.distributed.test_algorithms import ALL, batches_of, fitted, learner, net, weights


def prepared(name, **options):
    """As the Learner of test_algorithms has it, by hand."""
    model = prepare_model(net(), algorithm=name, bucket_cap_mb=0.001, **options)
    return model, prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True), model)


def trained(model, opt, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()


def flat(model):
    return torch.cat([p.detach().flatten() for p in unwrap_model(model).parameters()])


def test_every_algorithm_gives_a_loop_of_ones_own_the_learners_weights(ranks):
    def fn():
        own, differing = batches_of(learner()), []
        for name, options in [("allreduce", {}), *ALL]:
            model, opt = prepared(name, **options)
            for epoch in range(2):
                trained(model, opt, own[epoch * len(own) // 2 : (epoch + 1) * len(own) // 2])
                if (communication := communication_of(model)) is not None:
                    communication.average_now()
            if not torch.equal(flat(model), weights(fitted(name, **options))):
                differing.append(name)
        return differing

    assert ranks(2, fn, timeout=60) == [[], []]


def test_a_loop_of_ones_own_that_is_resumed_with_what_its_algorithm_keeps_equals_the_one_that_never_stopped(ranks):
    def fn():
        own, differing = batches_of(learner()), []
        for name, options in ALL:
            model, opt = prepared(name, **options)
            trained(model, opt, own[:7])
            kept = copy.deepcopy(
                [unwrap_model(model).state_dict(), opt.state_dict(), communication_of(model).state_dict(opt)]
            )
            trained(model, opt, own[7:])
            again, opt_again = prepared(name, **options)
            unwrap_model(again).load_state_dict(kept[0])
            opt_again.load_state_dict(kept[1])
            if (communication := communication_of(again)) is not None:
                communication.load_state_dict(kept[2], opt_again)
            trained(again, opt_again, own[7:])
            if not torch.equal(flat(model), flat(again)):
                differing.append(name)
        return differing

    assert ranks(2, fn, timeout=60) == [[], []]


def test_an_algorithm_that_averages_says_before_the_second_step_that_it_was_told_no_optimizer(ranks):
    def fn():
        model = prepare_model(net(), algorithm="decentralized")
        model(torch.randn(2, 16))
        try:
            model(torch.randn(2, 16))
        except RuntimeError as error:
            return str(error)

    assert all("prepare_optimizer(optimizer, model) before the loop" in text for text in ranks(2, fn))


def test_an_optimizer_of_another_model_is_refused(ranks):
    def fn():
        model = prepare_model(net(), algorithm="local_sgd")
        try:
            prepare_optimizer(torch.optim.SGD(net().parameters()), model)
        except ValueError as error:
            return str(error)

    assert all("none of this model's parameters" in text for text in ranks(2, fn))


# --- one reduction after the backward pass -----------------------------------
def test_delay_allreduce_leaves_the_mean_gradient_after_each_of_several_backward_passes_in_one_collective_each(ranks):
    def fn():
        x, y = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(get_rank())), torch.tensor([0, 1, 2, 0])
        model, plain = prepare_model(net(), delay_allreduce=True), DistributedDataParallel(net())
        n_sent, reduce = 0, dist.all_reduce

        def counted(*args, **kwargs):
            nonlocal n_sent
            n_sent += 1
            return reduce(*args, **kwargs)

        dist.all_reduce = counted
        try:
            for k in range(2):
                F.cross_entropy(model(x[k]), y).backward()  # as two losses, one after the other
        finally:
            dist.all_reduce = reduce
        sum(F.cross_entropy(plain(x[k]), y) for k in range(2)).backward()
        close = all(
            torch.allclose(p.grad, q.grad, atol=1e-7)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True)
        )
        return isinstance(model, DistributedDataParallel), close, n_sent

    assert ranks(2, fn) == [(False, True, 2)] * 2


def test_delay_allreduce_begins_from_rank_0s_weights_and_refuses_another_algorithm(ranks):
    def fn():
        torch.manual_seed(get_rank())
        model = prepare_model(nn.Linear(3, 2), delay_allreduce=True)
        try:
            prepare_model(net(), delay_allreduce=True, algorithm="fp16")
        except ValueError as error:
            return flat(model), str(error)

    (first, error), (second, _) = ranks(2, fn)
    assert torch.equal(first, second) and "one all-reduce of all gradients, and algorithm='fp16' has none" in error


# --- precision ---------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_autocast_around_the_forward_pass_and_gives_float32(dtype):
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype):
        expected = net()(x)
    output = prepare_model(net(), mixed_precision=dtype)(x)
    assert expected.dtype == dtype and output.dtype == torch.float32 and torch.equal(output, expected.float())


def test_mixed_precision_on_two_ranks_trains_as_ddp_with_autocast_by_hand(ranks):
    def fn():
        own = batches_of(learner())
        model, opt = prepare_model(net(), mixed_precision=torch.bfloat16), None
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        by_hand = DistributedDataParallel(net())
        opt_by_hand = torch.optim.SGD(by_hand.parameters(), lr=0.1)
        for x, y in own:
            F.cross_entropy(model(x), y).backward()
            with torch.autocast("cpu", torch.bfloat16):
                output = by_hand(x)
            F.cross_entropy(output.float(), y).backward()
            for one in (opt, opt_by_hand):
                one.step()
                one.zero_grad()
        return torch.equal(flat(model), flat(by_hand))

    assert ranks(2, fn) == [True, True]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(mixed_precision=torch.float64), "mixed_precision=torch.float64: expected torch.bfloat16"),
        (dict(algorithm="qadam"), "PyTorch has no engine for quantized Adam"),
        (dict(algorithm="fp16", rank=2), "rank=2 has no meaning for algorithm='fp16'"),
    ],
)
def test_options_are_refused_alone_as_on_many_ranks(options, message):
    with pytest.raises(ValueError, match=message):
        prepare_model(net(), **options)


# --- a model that is spread --------------------------------------------------
def test_a_spread_model_begins_from_rank_0s_weights(ranks):
    def fn():
        torch.manual_seed(get_rank())
        model = shard_model(
            net() if get_rank() == 0 else nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3)),
            blocks=nn.Linear,
        )
        return is_fully_sharded(model), torch.cat([whole(p.detach()).flatten() for p in model.parameters()])

    for is_spread, own in ranks(2, fn):
        assert is_spread and torch.equal(own, flat(net()))


def test_alone_each_function_gives_back_what_it_was_given():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    assert prepare_model(model, algorithm="local_sgd", delay_allreduce=False) is model
    assert prepare_optimizer(opt, model) is opt and communication_of(model) is None
    assert not opt._optimizer_step_post_hooks


# --- batches on a device -----------------------------------------------------
def test_batches_come_to_the_device_and_all_else_is_the_loaders_own():
    loader = DataLoader(TensorDataset(torch.arange(12.0)), 4, shuffle=True)
    moved = prepare_data_loader(loader, device=torch.device("meta"))
    assert len(moved) == 3 and moved.dataset is loader.dataset
    assert [x.device.type for [x] in moved] == ["meta"] * 3
    assert prepare_data_loader(loader) is loader


def test_epochs_are_heard_by_a_loader_whose_batches_are_moved(ranks):
    def fn():
        plain, moved = (
            prepare_data_loader(DataLoader(TensorDataset(torch.arange(12)), 2, shuffle=True), seed=1, device=device)
            for device in (None, torch.device("cpu"))
        )
        orders = []
        for loader in (plain, moved):
            set_epoch(loader, 5)
            orders.append([x.tolist() for [x] in loader])
        return orders

    for plain, moved in ranks(2, fn):
        assert plain == moved
