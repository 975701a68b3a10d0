"""to_channels_last(): the numbers stay, the layout of weights and batches is the other one, for all that reads them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import EMA, SWA, Accumulate, AutoMicrobatch, ChannelsLast, Checkpoint, MixedPrecision

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Notes how the pictures it is given lie."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.seen: set[tuple[bool, bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add((self.training, is_last(x)))
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def pictures(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 6, 6, generator=generator), torch.randint(2, (n,), generator=generator)) for n in sizes]


def learner(*callbacks: Callback, train: Any = None, **options: Any) -> Learner:
    data = (train or pictures(4, 4, 3), pictures(5, 2))
    return Learner(
        data,
        Net(),
        metrics=accuracy,
        callbacks=callbacks,
        **{"opt_func": torch.optim.SGD, "lr": 0.1, "wd": 0.0} | options,
    )


def state(learn: Learner) -> list[Tensor]:
    return [v.detach().clone() for v in learn.model.state_dict().values()]


@pytest.mark.parametrize("opt_func", [torch.optim.SGD, torch.optim.AdamW])
def test_training_validation_and_prediction_have_pictures_with_channels_last_and_the_same_numbers(opt_func):
    learn, plain = (
        learner(opt_func=opt_func, lr=0.01).to_channels_last().fit(2),
        learner(opt_func=opt_func, lr=0.01).fit(2),
    )
    torch.testing.assert_close(state(learn), state(plain), rtol=1e-4, atol=1e-5)
    assert learn.recorder.losses == pytest.approx(plain.recorder.losses, rel=1e-4)
    x = pictures(3)[0][0]
    torch.testing.assert_close(learn.predict(x), plain.predict(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(learn.get_preds()[0], plain.get_preds()[0], rtol=1e-4, atol=1e-5)
    assert learn.model.seen == {(True, True), (False, True)} and plain.model.seen == {(True, False), (False, False)}
    assert is_last(learn.model.conv.weight)


def test_gradients_and_the_state_of_the_optimizer_have_the_layout_of_the_weights():
    class Look(Callback):
        def before_step(self, learn: Learner) -> None:
            assert is_last(learn.model.conv.weight.grad)  # type: ignore[arg-type]

    learn = learner(Look(), opt_func=torch.optim.AdamW).to_channels_last().fit(1)
    assert is_last(learn.opt.state[learn.model.conv.weight]["exp_avg"])


@pytest.mark.parametrize(
    "make",
    [lambda: [Accumulate(2)], lambda: [MixedPrecision()], lambda: [EMA(0.5), SWA(0.0)], lambda: [AutoMicrobatch(2)]],
    ids=["Accumulate", "MixedPrecision", "averages", "AutoMicrobatch"],
)
def test_beside_others_the_numbers_stay_and_so_does_the_layout(make):
    learn, plain = learner(*make()).to_channels_last().fit(2), learner(*make()).fit(2)
    torch.testing.assert_close(state(learn), state(plain), rtol=0, atol=0.02)
    assert is_last(learn.model.conv.weight) and learn.model.seen == {(True, True), (False, True)}
    for callback in learn.callbacks:
        if isinstance(callback, EMA) and callback.average is not None:
            assert is_last(callback.average.values["conv.weight"])


def test_inputs_that_are_no_pictures_are_left_as_they_are():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = Net(), []

        def forward(self, x: Tensor, ids: Tensor, row: Tensor) -> Tensor:
            self.seen.append((ids, row))
            return self.net(x) + row.sum()

    (x, y), ids, row = pictures(4)[0], torch.arange(4), torch.randn(4, 2)
    learn = Learner(([(x, ids, row, y)], None), Two()).to_channels_last().fit(1)
    assert learn.model.seen[0][0] is ids and learn.model.seen[0][1] is row
    assert learn.model.net.seen == {(True, True)} and x.is_contiguous()  # the user's own tensor is as it was


def test_targets_and_masks_keep_their_numbers():
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    x = pictures(4)[0][0]
    values = []
    for wish in (True, False):
        learn = Learner(([(x, x * 2)], [(x, x * 2)]), Same(), opt_func=torch.optim.SGD)
        values.append((learn.to_channels_last() if wish else learn).fit(3).recorder.values[-1])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_called_twice_it_is_there_once():
    learn = learner().to_channels_last().to_channels_last()
    assert sum(isinstance(callback, ChannelsLast) for callback in learn.callbacks) == 1


def test_cudnn_benchmark_is_left_alone_unless_it_is_asked_for():
    before = torch.backends.cudnn.benchmark
    try:
        learner().to_channels_last()
        assert torch.backends.cudnn.benchmark == before
        for wish in (True, False):
            learner().to_channels_last(cudnn_benchmark=wish)
            assert torch.backends.cudnn.benchmark == wish
    finally:
        torch.backends.cudnn.benchmark = before


def test_files_of_either_layout_load_into_either():
    last, plain = learner().to_channels_last().fit(1), learner()
    last.save("last")
    plain.load("last")
    assert plain.model.conv.weight.is_contiguous() and torch.equal(plain.model.conv.weight, last.model.conv.weight)
    plain.fit(1).save("plain")
    last.load("plain")
    assert is_last(last.model.conv.weight) and torch.equal(plain.model.conv.weight, last.model.conv.weight)


def test_after_an_error_the_layout_and_the_next_fit_are_as_before():
    class Raise(Callback):
        def after_backward(self, learn: Learner) -> None:
            raise ConnectionAbortedError

    learn = learner().to_channels_last()
    with pytest.raises(ConnectionAbortedError):
        learn.fit(1, callbacks=[Raise()])
    learn.model.load_state_dict(Net().state_dict())
    learn.fit(1)
    torch.testing.assert_close(state(learn), state(learner().fit(1)), rtol=1e-4, atol=1e-5)


def test_a_resumed_fit_is_the_one_that_was_not_interrupted():
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.batch_index) == (1, 1):
                raise ConnectionAbortedError

    def make(folder: str) -> Learner:
        [(x, y)] = pictures(16)
        data = DataBunch.from_tensors((x, y), bs=4)
        return Learner(
            data, Net(), lr=0.05, seed=1, callbacks=[EMA(0.5), Checkpoint(folder, every_n_steps=1)]
        ).to_channels_last()

    plain = make("a").fit(2)
    with pytest.raises(ConnectionAbortedError):
        make("b").fit(2, callbacks=[Die()])
    learn = make("b").fit(2, resume=True)
    for p, q in zip(state(learn), state(plain), strict=True):
        assert torch.equal(p, q)
    assert is_last(learn.model.conv.weight)
