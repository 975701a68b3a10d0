"""BnFreeze and GradualUnfreezing: what stands still does so to the bit, and the rest is trained as by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import BnFreeze, Checkpoint, GradualUnfreezing


def learner(*callbacks: Callback, **options: Any) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    x = torch.randn(24, 4)
    data = DataBunch.from_tensors((x, (x[:, 0] > 0).long()), (x[:8], (x[:8, 0] > 0).long()), bs=8, seed=1)
    return Learner(data, model, callbacks=callbacks, splitter=lambda m: [m[:2], m[2:4], m[4]], **options)


def statistics(learn: Learner) -> list[torch.Tensor]:
    return [b.clone() for b in learn.model.buffers()]


def weights(learn: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learn.model.parameters()]


# --- BnFreeze ----------------------------------------------------------------
@pytest.mark.parametrize(
    "options, frozen, still",
    [
        (dict(), 1, [True, False]),
        (dict(), 2, [True, True]),
        (dict(), 0, [False, False]),
        (dict(all=True), 0, [True, True]),
    ],
)
def test_statistics_stand_still_where_the_layer_is_frozen(options, frozen, still):
    learn = learner(BnFreeze(**options)).freeze_to(frozen)
    before = statistics(learn)
    learn.fit(2)
    same = [torch.equal(a, b) for a, b in zip(before, statistics(learn), strict=True)]
    assert same == [still[0]] * 3 + [still[1]] * 3 and all(m.training for m in learn.model.modules())


def test_frozen_batch_norm_normalizes_with_its_statistics():
    class Looks(Callback):
        def after_forward(self, learn):
            if learn.training:
                modes.append([m.training for m in learn.model if isinstance(m, nn.BatchNorm1d)])

    modes: list[list[bool]] = []
    learner(BnFreeze(), Looks()).freeze_to(1).fit(1)
    assert modes == [[False, True]] * 3


def test_modes_are_put_back_after_an_error():
    class Fails(Callback):
        def after_step(self, learn):
            raise ConnectionError

    with pytest.raises(ConnectionError):
        (learn := learner(BnFreeze(all=True), Fails())).fit(1)
    assert all(m.training for m in learn.model.modules())


# --- GradualUnfreezing -------------------------------------------------------
@pytest.mark.parametrize(
    "unfreezing, waiting",
    [
        (GradualUnfreezing(), [2, 1, 0, 0]),
        (GradualUnfreezing(2), [2, 2, 1, 1]),
        (GradualUnfreezing(plan={1: 1, 3: 0}), [2, 1, 1, 0]),
    ],
)
def test_groups_join_one_after_the_other_and_move_from_then_on(unfreezing, waiting):
    class Looks(Callback):
        def before_epoch(self, learn):
            self.before = weights(learn)

        def after_epoch(self, learn):
            same = [torch.equal(a, b) for a, b in zip(self.before, weights(learn), strict=True)]
            found.append(sum(all(part) for part in (same[:4], same[4:8], same[8:])))

    found: list[int] = []
    learner(unfreezing, Looks()).fit(4)
    assert found == waiting


def test_it_equals_fits_of_one_epoch_with_freeze_to_between():
    by_hand = learner(opt_func=torch.optim.SGD, wd=0.1)
    for n in (2, 1, 0):
        by_hand.freeze_to(n).fit(1, 0.05)
    gradual = learner(GradualUnfreezing(), opt_func=torch.optim.SGD, wd=0.1).fit(3, 0.05)
    for a, b in zip(weights(by_hand), weights(gradual), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_a_resumed_fit_unfreezes_at_the_same_epochs():
    class Dies(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn: Learner) -> None:
            if learn.training and learn.step == 5:
                raise ConnectionAbortedError

    whole = learner(GradualUnfreezing()).fit(3)
    with pytest.raises(ConnectionAbortedError):
        learner(GradualUnfreezing(), Checkpoint("kept", every_n_steps=2), Dies()).fit(3)
    resumed = learner(GradualUnfreezing(), Checkpoint("kept", every_n_steps=2)).fit(3, resume=True)
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="every=0"):
        GradualUnfreezing(0)
    with pytest.raises(ValueError, match="numbers of groups from 0 to 2"):
        learner(GradualUnfreezing(plan={0: 3})).fit(1)
    learn = learner(GradualUnfreezing())
    learn.splitter = None
    with pytest.raises(ValueError, match="one layer group"):
        learn.fit(1)
