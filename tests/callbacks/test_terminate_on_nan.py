"""TerminateOnNaN: the fit ends before the step that would spoil the weights."""

import warnings

import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import TerminateOnNaN


class Spoil(Callback):
    """Puts a value into the gradients (or the loss) at a step."""

    order = -1

    def __init__(self, value: float, step: int = 3, *, loss: bool = False) -> None:
        self.value, self.step, self.loss = value, step, loss

    def after_forward(self, learn: Learner) -> None:
        if self.loss and learn.training and learn.step == self.step:
            learn.loss = learn.loss * self.value

    def after_backward(self, learn: Learner) -> None:
        if not self.loss and learn.step == self.step:
            learn.model[0].weight.grad[0, 1] = self.value


class Weights(Callback):
    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def after_step(self, learn: Learner) -> None:
        self.kept = [p.detach().clone() for p in learn.model.parameters()]


def make() -> Learner:
    torch.manual_seed(0)
    data = DataBunch.from_tensors(
        (torch.randn(32, 4), torch.randn(32, 2)), (torch.randn(8, 4), torch.randn(8, 2)), bs=4
    )
    return Learner(data, nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("loss", [False, True])
def test_the_fit_ends_before_the_step_with_the_weights_of_the_last_good_one(value, loss):
    learn, weights = make(), Weights()
    names = "4 parameters" if loss else r"1 parameters are not finite \(0\.weight"
    with pytest.warns(UserWarning, match=f"stopped before step 3: the gradients of {names}.*epoch 0, training batch 3"):
        learn.fit(3, callbacks=[Spoil(value, loss=loss), TerminateOnNaN(), weights])
    assert learn.step == 3 and learn.epoch == 0
    assert all(
        torch.equal(p, kept) and bool(p.isfinite().all())
        for p, kept in zip(learn.model.parameters(), weights.kept, strict=True)
    )


def test_finite_gradients_change_nothing():
    plain, watched = make().fit(2), make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watched.fit(2, callbacks=[TerminateOnNaN()])
    assert watched.step == 16 and plain.recorder.losses == watched.recorder.losses
