"""What is tried out on a Learner leaves it bit-identical."""
import random

import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import EarlyStopping
from learnkit.trial import unchanged


class Counts(Callback):
    def __init__(self): self.steps, self.n = [], torch.zeros(1)

    def after_step(self, learn):
        self.steps.append(learn.step)
        self.n += 1


def learner(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(.5), nn.Linear(8, 3))
    data = DataBunch.from_tensors((torch.randn(40, 4), torch.randint(3, (40,))), (torch.randn(10, 4), torch.randint(3, (10,))), bs=8)
    return Learner(data, model, metrics=accuracy, **options)


def everything(learn):
    tensors = {f"model {k}": v for k, v in learn.model.state_dict().items()} | {"rng": torch.get_rng_state()}
    if learn.opt is not None:
        tensors |= {f"opt {i} {k}": v for i, state in learn.opt.state_dict()["state"].items() for k, v in state.items()}
    plain = [random.getstate(), learn.epochs_trained, learn.n_fits, learn.values, learn.recorder.losses, learn.data.train_dl.sampler.epoch,
             [(vars(cb)["steps"][:], vars(cb)["n"].tolist()) for cb in learn.callbacks if isinstance(cb, Counts)],
             None if learn.opt is None else [{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups],
             [m.training for m in learn.model.modules()], [p.requires_grad for p in learn.model.parameters()]]
    return {k: v.clone() for k, v in tensors.items()}, plain


def assert_same(learn, before):
    tensors, plain = everything(learn)
    assert plain == before[1] and tensors.keys() == before[0].keys()
    for name, value in tensors.items(): assert torch.equal(value, before[0][name]), name


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_no_trace(fitted, fails):
    learn = learner(callbacks=Counts())
    if fitted: learn.fit_one_cycle(1)
    before = everything(learn)
    try:
        with unchanged(learn):
            learn.fit(2, 1.)
            learn.model[0].requires_grad_(False)
            learn.validate()
            if fails: raise KeyboardInterrupt
    except KeyboardInterrupt: pass
    assert_same(learn, before)
    assert (learn.opt is not None) == fitted


def test_a_fit_after_a_trial_equals_the_fit_without_one():
    with_trial, without = learner(), learner()
    torch.manual_seed(5)
    with_trial.fit(1)
    with unchanged(with_trial): with_trial.fit(1, 10.)
    with_trial.fit_one_cycle(2)
    torch.manual_seed(5)
    without.fit(1)
    without.fit_one_cycle(2)
    for a, b in zip(with_trial.model.parameters(), without.model.parameters(), strict=True): assert torch.equal(a, b)
    assert with_trial.recorder.losses == without.recorder.losses


def test_callbacks_that_decide_stay_out_and_come_back():
    learn = learner(callbacks=EarlyStopping(patience=1))
    names = [type(cb).__name__ for cb in learn.callbacks]
    with unchanged(learn): assert not learn.callbacks
    assert [type(cb).__name__ for cb in learn.callbacks] == names


def test_a_trial_within_a_fit_is_refused():
    class Tries(Callback):
        def after_step(self, learn):
            with unchanged(learn): pass

    with pytest.raises(RuntimeError, match="before or after the fit"): learner().fit(1, callbacks=[Tries()])
