"""prepare_model: two ranks with half the batch each train like one with all of it, batch normalization included."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from learnkit.distributed import (
    GlobalBatchNorm,
    check_same,
    get_rank,
    get_world_size,
    prepare_model,
    restore_batchnorm,
    sync_batchnorm,
    unwrap_model,
)


def net(*, batchnorm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4) if batchnorm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.BatchNorm1d(8) if batchnorm else nn.Identity(),
        nn.Linear(8, 3),
    )


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 5 + torch.randn(n, 2, 4, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def trained(model: nn.Module, x: Tensor, y: Tensor, weight: float = 1.0) -> dict[str, Tensor]:
    """The state after five steps of SGD. `weight`: of this rank's loss, where ranks hold different numbers of
    samples.
    """
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        (F.cross_entropy(model(x), y) * weight).backward()
        opt.step()
        opt.zero_grad()
    return copy.deepcopy((model.module if isinstance(model, DistributedDataParallel) else model).state_dict())


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[key].double(), b[key].double(), atol=tolerance) for key in a)


@pytest.mark.parametrize(
    "sync_bn, sizes", [(False, (6, 6)), (False, (8, 4)), (True, (6, 6)), (True, (9, 3)), (True, (4, 4, 4))]
)
def test_ranks_train_as_one_process_with_the_whole_batch(ranks, sync_bn, sizes):
    x, y = data()

    def fn():
        own_x, own_y = x.split(sizes)[get_rank()], y.split(sizes)[get_rank()]
        model = prepare_model(net(batchnorm=sync_bn), sync_bn=sync_bn)
        return trained(model, own_x, own_y, weight=len(own_x) * get_world_size() / len(x))

    alone = trained(net(batchnorm=sync_bn), x, y)
    assert all(close(state, alone) for state in ranks(len(sizes), fn))


def test_plain_batch_normalization_does_see_its_own_part_only(ranks):
    """The control: without sync_bn the numbers must differ."""
    x, y = data()

    def fn():
        return trained(prepare_model(net(batchnorm=True)), x.split(6)[get_rank()], y.split(6)[get_rank()])

    assert not close(ranks(2, fn)[0], trained(net(batchnorm=True), x, y), 1e-3)


@pytest.mark.parametrize(
    "make, shape",
    [
        (nn.BatchNorm1d, (6, 3)),
        (nn.BatchNorm1d, (6, 3, 5)),
        (nn.BatchNorm3d, (6, 3, 2, 2, 2)),
        (lambda n: nn.BatchNorm2d(n, momentum=None, affine=False), (6, 3, 2, 2)),
        (lambda n: nn.BatchNorm2d(n, track_running_stats=False), (6, 3, 2, 2)),
    ],
)
@pytest.mark.parametrize("sizes", [(3, 3), (5, 1), (6, 0)])
def test_outputs_gradients_and_statistics_equal_those_of_the_whole_batch(ranks, make, shape, sizes):
    torch.manual_seed(3)
    x, weight = 100 + torch.randn(shape), torch.randn(shape)

    def run(norm: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        output = norm(x)
        (output * weight).sum().backward()
        return [output.detach(), x.grad, *norm.state_dict().values()]

    def fn():
        rank = get_rank()
        return run(sync_batchnorm(make(3)), x.split(sizes)[rank], weight.split(sizes)[rank])

    norm = make(3)
    expected = run(norm, x, weight)
    for rank, got in enumerate(ranks(2, fn)):
        whole = [t.split(sizes)[rank] for t in expected[:2]] + expected[2:]
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-5) for a, b in zip(got, whole, strict=True))


def test_converting_and_back_keeps_classes_and_the_weights_themselves():
    model = nn.Sequential(net(batchnorm=True), nn.BatchNorm3d(2, eps=1e-3))
    before = [type(m) for m in model.modules()]
    weights, buffers = list(map(id, model.parameters())), list(map(id, model.buffers()))
    assert sum(isinstance(m, GlobalBatchNorm) for m in sync_batchnorm(model).modules()) == 3
    assert list(map(id, model.parameters())) == weights and list(map(id, model.buffers())) == buffers
    restore_batchnorm(model)
    assert [type(m) for m in model.modules()] == before and list(map(id, model.parameters())) == weights
    assert model[1].eps == 1e-3 and "replaces" not in vars(model[1])


def test_a_batchnorm_that_is_the_whole_model_is_converted_and_half_precision_stays():
    norm = sync_batchnorm(nn.BatchNorm1d(2).bfloat16())
    assert type(norm) is GlobalBatchNorm and norm(torch.randn(4, 2).bfloat16()).dtype == torch.bfloat16
    assert type(restore_batchnorm(norm)) is nn.BatchNorm1d


def test_options_go_to_ddp_and_gradients_are_bucket_views(ranks):
    def fn():
        plain, told = (
            prepare_model(nn.Linear(2, 2)),
            prepare_model(nn.Linear(2, 2), find_unused_parameters=True, gradient_as_bucket_view=False),
        )
        return plain.gradient_as_bucket_view, told.gradient_as_bucket_view, told.find_unused_parameters

    assert ranks(2, fn) == [(True, False, True)] * 2


def test_a_model_without_trainable_weights_is_not_wrapped(ranks):
    def fn():
        return type(prepare_model(nn.ReLU())).__name__

    assert ranks(2, fn) == ["ReLU", "ReLU"]


def test_wrapping_twice_is_told(ranks):
    def fn():
        try:
            prepare_model(prepare_model(nn.Linear(2, 2)))
        except TypeError as error:
            return str(error)

    assert "wrapped in DistributedDataParallel already" in ranks(2, fn)[0]


def test_a_world_of_one_gets_its_own_model():
    model = net(batchnorm=True)
    assert prepare_model(model, sync_bn=True) is model and type(model[1]) is nn.BatchNorm2d


# --- compar ------------------------------------------------------------------
def differences(facts_of) -> str | None:
    try:
        check_same(facts_of(get_rank()))
    except ValueError as error:
        return str(error)


def test_equal_facts_pass(ranks):
    assert ranks(3, differences, lambda rank: {"lr": float("nan"), "model": "a", "n": 3}) == [None] * 3


def test_the_odd_rank_is_named_with_entry_and_values_on_every_rank(ranks):
    def facts(rank):
        return {"lr": 0.1 if rank == 2 else 0.3, "seed": 1, **({"batch size": 8} if rank else {})}

    [message, *others] = ranks(3, differences, facts)
    assert others == [message, message]
    assert "\n  lr: rank 2 has 0.1; ranks 0, 1 have 0.3\n" in message
    assert "\n  batch size: rank 0 has (not there); ranks 1, 2 have 8\n" in message
    assert "seed:" not in message


def test_of_two_ranks_the_other_one_is_odd(ranks):
    assert "lr: rank 1 has 1; rank 0 has 0\n" in ranks(2, differences, lambda rank: {"lr": rank})[0]


def test_alone_all_agree():
    check_same({"lr": 1})


def test_an_unwrapped_model_is_the_one_that_was_given(ranks):
    def fn():
        model = nn.Linear(2, 2)
        return [unwrap_model(prepare_model(model)) is model, unwrap_model(model) is model]

    assert ranks(2, fn) == [[True, True]] * 2
    assert fn() == [True, True]
