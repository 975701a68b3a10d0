"""CutMix: rectangles, and losses by the areas that are seen; nothing in evaluation; the same after a resume."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Checkpoint, CutMix


def learner(*callbacks, size=(6, 9)) -> Learner:
    torch.manual_seed(1)
    x, y = torch.randn(48, 2, *size), torch.randint(3, (48,))
    data = DataBunch.from_tensors((x, y), (x[:10], y[:10]), bs=8)
    return Learner(data, nn.Sequential(nn.Flatten(), nn.Linear(2 * size[0] * size[1], 3)), callbacks=callbacks, seed=2)


class Watch(Callback):
    order = CutMix.order - 1

    def __init__(self, cut: CutMix):
        self.cut, self.shares, self.plain, self.n_plain = cut, [], torch.zeros(0), 0

    def before_forward(self, learn):
        self.plain = learn.inputs[0].clone()

    def after_forward(self, learn):
        x, seen, y = self.plain, learn.inputs[0], learn.target
        if not learn.training:
            self.n_plain += torch.equal(x, seen)
            return torch.testing.assert_close(learn.loss, F.cross_entropy(learn.pred, y))
        own = (seen == x)[0, 0]  # where the first picture is its own
        p = self.cut.partners
        for i in range(len(x)):
            if p[i] != i:
                assert torch.equal(seen[i], torch.where(own, x[i], x[p[i]])) or p[0] == 0
        if p[0] != 0:
            rows, columns = (~own).any(1), (~own).any(0)
            assert torch.equal(~own, rows[:, None] & columns[None, :]), "not a rectangle"
            assert own.float().mean().item() == pytest.approx(self.cut.share)
        ones = F.one_hot(y, 3).float()
        torch.testing.assert_close(
            learn.loss, F.cross_entropy(learn.pred, self.cut.share * ones + (1 - self.cut.share) * ones[p])
        )
        self.shares.append(self.cut.share)


def fit(learn, epochs=1, **options):
    with learn.no_logging():
        return learn.fit(epochs, 1e-2, **options)


def test_a_rectangle_of_the_partner_is_pasted_in_and_the_losses_count_by_area_and_evaluation_is_plain():
    watch = Watch(cut := CutMix())
    fit(learner(cut, watch), 8)
    assert len(watch.shares) == 48 and len(set(watch.shares)) > 10 and watch.n_plain == 16


def test_without_the_border_the_shares_would_be_uniform_and_with_it_they_are_larger():
    watch = Watch(cut := CutMix(1.0))
    fit(learner(cut, watch, size=(20, 20)), 40)
    shares = torch.tensor(watch.shares)
    side = torch.rand(200_000).sqrt()  # of the rectangle, for a uniform area; its centre is uniform too
    centre = torch.rand(2, 200_000)
    spans = (centre + side / 2).clamp(max=1) - (centre - side / 2).clamp(min=0)
    wanted = 1 - spans[0] * spans[1]
    assert abs(shares.mean() - wanted.mean()) < 4.5 * wanted.std() / len(shares) ** 0.5 + 0.02  # .02: whole pixels


def test_a_fit_that_was_broken_off_and_resumed_is_the_same_to_the_bit(tmp_path):
    class Break(Callback):
        def after_step(self, learn):
            if learn.step == 9:
                raise InterruptedError

    whole = fit(learner(CutMix(), Checkpoint(tmp_path / "a", every_n_steps=3)), 3)
    with pytest.raises(InterruptedError):
        fit(learner(CutMix(), Checkpoint(tmp_path / "b", every_n_steps=4), Break()), 3)
    rest = fit(learner(CutMix(), Checkpoint(tmp_path / "b", every_n_steps=4)), 3, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


def test_what_are_no_pictures_is_refused_and_alpha_is_above_0():
    with pytest.raises(ValueError, match="alpha=0: expected a number above 0"):
        CutMix(0)
    data = DataBunch.from_tensors((torch.randn(16, 4), torch.randint(3, (16,))), bs=8)
    with pytest.raises(
        ValueError, match=r"CutMix expects pictures \(batch, channels, height, width\); this batch's input is \(8, 4\)"
    ):
        fit(Learner(data, nn.Linear(4, 3), callbacks=CutMix()))


def test_its_state_is_empty_and_goes_round():
    cut = CutMix()
    cut.load_state_dict(cut.state_dict())
    assert cut.state_dict() == {}
