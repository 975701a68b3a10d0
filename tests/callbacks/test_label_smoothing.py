"""LabelSmoothing: torch's smoothed cross-entropy in training, the plain one in evaluation, the Learner's own
afterwards.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import LabelSmoothing


def learner(*callbacks, loss_func=None) -> Learner:
    torch.manual_seed(1)
    x, y = torch.randn(24, 5), torch.randint(3, (24,))
    return Learner(
        DataBunch.from_tensors((x, y), (x[:10], y[:10]), bs=8),
        nn.Linear(5, 3),
        loss_func=loss_func,
        callbacks=callbacks,
        seed=2,
    )


def fit(learn, epochs=1):
    with learn.no_logging():
        return learn.fit(epochs, 1e-2)


class Compare(Callback):
    def __init__(self, **options):
        self.options, self.n = options, 0

    def after_forward(self, learn):
        eps = 0.2 if learn.training else 0.0
        torch.testing.assert_close(
            learn.loss, F.cross_entropy(learn.pred, learn.target, label_smoothing=eps, **self.options)
        )
        if learn.training and not self.options:  # the paper's formula
            log = learn.pred.log_softmax(1)
            wanted = -0.8 * log.gather(1, learn.target[:, None]).mean() - 0.2 * log.mean()
            torch.testing.assert_close(learn.loss, wanted)
        self.n += 1


@pytest.mark.parametrize(
    "loss_func, options",
    [
        (None, {}),
        (F.cross_entropy, {}),
        (nn.CrossEntropyLoss(), {}),
        (
            nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), ignore_index=1),
            {"weight": torch.tensor([1.0, 2.0, 3.0]), "ignore_index": 1},
        ),
    ],
    ids=["default", "function", "module", "weights"],
)
def test_training_has_the_smoothed_loss_and_evaluation_the_plain_one(loss_func, options):
    learn = learner(LabelSmoothing(0.2), compare := Compare(**options), loss_func=loss_func)
    fit(learn, 2)
    assert compare.n == 2 * (3 + 2) and learn.loss_func is loss_func


def test_an_evaluation_in_the_middle_of_training_has_the_plain_loss_and_training_goes_on_smoothed():
    class Validate(Callback):
        def after_step(self, learn):
            learn.validate()

    fit(learner(LabelSmoothing(0.2), Validate(), compare := Compare()))
    assert compare.n == 3 + 3 * 2 + 2


def test_after_an_error_the_learner_has_its_own_loss_again():
    class Fail(Callback):
        def after_step(self, learn):
            raise InterruptedError

    loss = nn.CrossEntropyLoss()
    learn = learner(LabelSmoothing(0.2), Fail(), loss_func=loss)
    with pytest.raises(InterruptedError):
        fit(learn)
    assert learn.loss_func is loss


@pytest.mark.parametrize(
    "loss_func, name",
    [
        (F.mse_loss, "mse_loss"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "CrossEntropyLoss"),
        (nn.CrossEntropyLoss(reduction="sum"), "CrossEntropyLoss"),
    ],
)
def test_another_loss_is_refused_before_the_first_step(loss_func, name):
    learn = learner(LabelSmoothing(0.2), loss_func=loss_func)
    with pytest.raises(TypeError, match=f"LabelSmoothing works with cross-entropy; the Learner's loss is {name}"):
        fit(learn)
    assert learn.step == 0


def test_eps_is_a_share_and_the_state_is_empty():
    for eps in (0, 1, -0.1):
        with pytest.raises(ValueError, match=f"eps={eps}: expected a share between 0 and 1"):
            LabelSmoothing(eps)
    smooth = LabelSmoothing()
    smooth.load_state_dict(smooth.state_dict())
    assert smooth.state_dict() == {}
