"""MixUp: the blended inputs and losses, by hand; nothing in evaluation; the same after a resume."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Checkpoint, LabelSmoothing, MixUp


def learner(*callbacks, loss_func=None, **options) -> Learner:
    torch.manual_seed(1)
    x, y = torch.randn(48, 5), torch.randint(3, (48,))
    data = DataBunch.from_tensors((x, y), (x[:10], y[:10]), bs=8)
    return Learner(
        data,
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        loss_func=loss_func,
        callbacks=callbacks,
        seed=2,
        **options,
    )


class Watch(Callback):
    """Sees the batch before and after it was mixed."""

    order = MixUp.order - 1

    def __init__(self):
        self.rows = []

    def before_forward(self, learn):
        self.plain = learn.inputs[0].clone()

    def after_forward(self, learn):
        self.rows.append((self.plain, learn.inputs[0], learn.pred, learn.target, learn.loss, learn.training))


def fit(learn, epochs=1, **options):
    with learn.no_logging():
        return learn.fit(epochs, 1e-2, **options)


def test_inputs_are_blended_and_the_loss_is_the_mean_of_both_targets_losses():
    mix, watch = MixUp(0.4), Watch()

    class Compare(Callback):
        order = MixUp.order - 2

        def after_forward(self, learn):
            if not learn.training:
                return
            w, p, (plain, mixed, pred, y, loss, _) = mix.weights, mix.partners, watch.rows[-1]
            torch.testing.assert_close(mixed, w[:, None] * plain + (1 - w[:, None]) * plain[p])
            ones = F.one_hot(y, 3).float()
            torch.testing.assert_close(
                loss, F.cross_entropy(pred, w[:, None] * ones + (1 - w[:, None]) * ones[p])
            )  # torch's own soft targets
            assert sorted(p.tolist()) == list(range(8)) and (w >= 0.5).all() and (w <= 1).all()

    fit(learner(mix, watch, Compare()), 2)
    assert len(watch.rows) == 2 * (6 + 2)


def test_evaluation_is_plain():
    watch = Watch()
    learn = fit(learner(MixUp(0.4), watch))
    for plain, seen, pred, y, loss, training in watch.rows:
        if not training:
            assert torch.equal(plain, seen)
            torch.testing.assert_close(loss, F.cross_entropy(pred, y))
    preds, targets = learn.get_preds()
    torch.testing.assert_close(learn.validate()["valid_loss"], F.cross_entropy(preds, targets).item())


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_weights_are_the_larger_ones_of_beta_distributed_pairs(alpha):
    weights = []

    class Keep(Callback):
        def after_forward(self, learn):
            if learn.training:
                weights.append(mix.weights.clone())

    mix = MixUp(alpha)
    fit(learner(mix, Keep()), 60)
    w, reference = torch.cat(weights), torch.distributions.Beta(alpha, alpha).sample((100_000,))
    reference = torch.maximum(reference, 1 - reference)
    assert abs(w.mean() - reference.mean()) < 4.5 * reference.std() / len(w) ** 0.5


def test_over_all_pairs_and_weights_the_mean_of_inputs_stays_the_batch_mean():
    watch = Watch()
    fit(learner(MixUp(1.0), watch), 40)
    shift = torch.stack([(mixed - plain).mean(0) for plain, mixed, *_, training in watch.rows if training])
    assert (shift.mean(0).abs() < 4.5 * shift.std(0) / len(shift) ** 0.5).all()


def test_targets_of_a_regression_are_mixed_as_losses():
    x = torch.randn(32, 2)
    mix = MixUp(1.0)

    class Compare(Callback):
        order = MixUp.order - 1

        def after_forward(self, learn):
            w, p = mix.weights[:, None], mix.partners
            losses = w * (learn.pred - learn.target).square() + (1 - w) * (learn.pred - learn.target[p]).square()
            if learn.training:
                torch.testing.assert_close(learn.loss, losses.mean())

    fit(Learner(DataBunch.from_tensors((x, x.sum(1, keepdim=True)), bs=8), nn.Linear(2, 1), callbacks=[mix, Compare()]))


def test_with_label_smoothing_the_smoothed_losses_are_mixed():
    mix, watch = MixUp(0.4), Watch()

    class Compare(Callback):
        order = MixUp.order - 2

        def after_forward(self, learn):
            if not learn.training:
                return
            ones = F.one_hot(learn.target, 3).float()
            soft = mix.weights[:, None] * ones + (1 - mix.weights[:, None]) * ones[mix.partners]
            torch.testing.assert_close(learn.loss, F.cross_entropy(learn.pred, soft, label_smoothing=0.1))

    fit(learner(mix, watch, Compare(), LabelSmoothing(0.1)))


def test_a_fit_that_was_broken_off_and_resumed_is_the_same_to_the_bit(tmp_path):
    class Break(Callback):
        def after_step(self, learn):
            if learn.step == 9:
                raise InterruptedError

    whole = fit(learner(MixUp(0.4), Checkpoint(tmp_path / "a", every_n_steps=3)), 3)
    with pytest.raises(InterruptedError):
        fit(learner(MixUp(0.4), Checkpoint(tmp_path / "b", every_n_steps=4), Break()), 3)
    rest = fit(
        learner(
            MixUp(0.4),
            Checkpoint(tmp_path / "b", every_n_steps=4),
        ),
        3,
        resume=True,
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    assert whole.recorder.losses[8:] == rest.recorder.losses[8:]


def test_it_draws_from_no_global_generator():
    fit(learn := learner(MixUp(0.4)))
    after = torch.get_rng_state()
    fit(learner())
    assert torch.equal(after, torch.get_rng_state()) and learn.step == 6


def test_its_state_is_empty_and_goes_round():
    mix = MixUp(0.4)
    mix.load_state_dict(mix.state_dict())
    assert mix.state_dict() == {}


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan")])
def test_alpha_is_above_0(alpha):
    with pytest.raises(ValueError, match="expected a number above 0"):
        MixUp(alpha)


def test_integer_inputs_mappings_and_losses_without_reduction_are_refused_before_a_step():
    whole = DataBunch.from_tensors((torch.randint(5, (16, 2)), torch.randint(3, (16,))), bs=8)
    with pytest.raises(
        TypeError,
        match=r"MixUp expects batches \(x, y\) of tensors with floating-point x; this batch is .*int64 \(8, 2\)",
    ):
        fit(Learner(whole, nn.Linear(2, 3), callbacks=MixUp()))
    with pytest.raises(TypeError, match="gives no loss per sample"):
        fit(learner(MixUp(), loss_func=lambda pred, y: F.cross_entropy(pred, y)))
    with pytest.raises(ValueError, match="already, and two would undo"):
        learner(MixUp(), MixUp())
