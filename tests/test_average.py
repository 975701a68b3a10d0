"""An average of a model: its arithmetic, its own storage, and the exchange with the model's weights."""

import pytest
import torch
from torch import nn

from learnkit.devices.ranks import Alone
from learnkit.optim.average import Average


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(torch.randn_like(value) if value.is_floating_point() else 1)


def test_updates_of_one_part_in_k_give_the_mean_of_all():
    model, states = net(), []
    average = Average(model)
    for k in range(1, 6):
        move(model)
        states.append([p.detach().clone() for p in model.parameters()])
        average.update(1 / k)
    means = [torch.stack(values).mean(0) for values in zip(*states, strict=True)]
    torch.testing.assert_close([average.values[name] for name, _ in model.named_parameters()], means)
    assert average.values["1.num_batches_tracked"] == 5


def test_a_part_of_zero_keeps_it_and_a_part_of_one_is_the_model():
    model = net()
    start, average = {k: v.clone() for k, v in model.state_dict().items()}, Average(model)
    move(model)
    average.update(0.0)
    assert all(torch.equal(average.values[k], v) for k, v in start.items() if v.is_floating_point())
    average.update(1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(average.values[name], value)


def test_a_model_without_buffers_and_one_with_half_precision_are_averaged():
    for model in (nn.Linear(2, 2, bias=False), nn.Linear(2, 2).bfloat16()):
        average = Average(model)
        start = model.weight.detach().float().clone()
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(0.25)
        torch.testing.assert_close(average.values["weight"], start + 0.25, rtol=0, atol=0.02)
        assert average.values["weight"].dtype == torch.float32
        with average.swapped():
            assert model.weight.dtype == model.state_dict()["weight"].dtype


def test_many_small_steps_are_not_lost_in_half_precision():
    """In bfloat16 1 + 0.001 is 1."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = Average(model)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(100):
        average.update(0.001)
    assert average.values["weight"].item() == pytest.approx(2 - 0.999**100, rel=1e-4)


def test_the_exchange_moves_no_number_and_keeps_the_parameters_and_their_gradients():
    model = net()
    average, tensors = Average(model), list(model.parameters())
    move(model)
    model(torch.randn(5, 3)).sum().backward()
    addresses, gradients = [p.data_ptr() for p in tensors], [p.grad for p in tensors]
    with average.swapped():
        assert [p.data_ptr() for p in tensors] == [average.values[n].data_ptr() for n, _ in model.named_parameters()]
        assert all(p is q for p, q in zip(model.parameters(), tensors, strict=True))
    assert [p.data_ptr() for p in tensors] == addresses
    assert all(p.grad is g for p, g in zip(tensors, gradients, strict=True))


def test_ranks_share_what_is_no_parameter():
    class Told(Alone):
        def share(self, tensors):
            self.shared = [tuple(t.shape) for t in tensors]

    Average(net()).unite(ranks := Told())
    assert ranks.shared == [(4,), (4,), ()]


def test_a_state_comes_back_and_one_of_another_model_is_refused():
    a, model = Average(net()), net()
    b = Average(model)
    move(model)
    b.update(0.5)
    a.load_state_dict({name: value.clone() for name, value in b.state_dict().items()})
    for name, value in b.state_dict().items():
        assert torch.equal(a.values[name], value)
    with pytest.raises(
        ValueError, match=r"the saved average is of another model: 0\.bias, .* exist in only one of them"
    ):
        a.load_state_dict(Average(nn.Linear(3, 2)).state_dict())


def test_averages_and_exchanges_are_without_a_graph():
    model = net()
    average = Average(model)
    model(torch.randn(5, 3)).sum().backward()
    average.update(0.5)
    with average.swapped():
        pass
    average.apply()
    assert not any(v.requires_grad for v in average.values.values()) and all(
        p.requires_grad and p.is_leaf for p in model.parameters()
    )
