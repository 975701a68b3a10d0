"""What is tried out on a Learner leaves it bit-identical."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import EMA, SWA, EarlyStopping, Lookahead
from learnkit.trials.trial import unchanged


class Counts(Callback):
    def __init__(self):
        self.steps, self.n = [], torch.zeros(1)

    def after_step(self, learn):
        self.steps.append(learn.step)
        self.n += 1


def learner(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    data = DataBunch.from_tensors(
        (torch.randn(40, 4), torch.randint(3, (40,))), (torch.randn(10, 4), torch.randint(3, (10,))), bs=8
    )
    return Learner(data, model, metrics=accuracy, **options)


def everything(learn):
    tensors = {f"model {k}": v for k, v in learn.model.state_dict().items()} | {"rng": torch.get_rng_state()}
    if learn.opt is not None:
        tensors |= {f"opt {i} {k}": v for i, state in learn.opt.state_dict()["state"].items() for k, v in state.items()}
    plain = [
        random.getstate(),
        learn.epochs_trained,
        learn.n_fits,
        learn.values,
        learn.recorder.losses,
        learn.data.train_dl.sampler.epoch,
        [(vars(cb)["steps"][:], vars(cb)["n"].tolist()) for cb in learn.callbacks if isinstance(cb, Counts)],
        None if learn.opt is None else [{k: v for k, v in g.items() if k != "params"} for g in learn.opt.param_groups],
        [m.training for m in learn.model.modules()],
        [p.requires_grad for p in learn.model.parameters()],
    ]
    return {k: v.clone() for k, v in tensors.items()}, plain


def assert_same(learn, before):
    tensors, plain = everything(learn)
    assert plain == before[1] and tensors.keys() == before[0].keys()
    for name, value in tensors.items():
        assert torch.equal(value, before[0][name]), name


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_no_trace(fitted, fails):
    learn = learner(callbacks=Counts())
    if fitted:
        learn.fit_one_cycle(1)
    before = everything(learn)
    try:
        with unchanged(learn):
            learn.fit(2, 1.0)
            learn.model[0].requires_grad_(False)
            learn.validate()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert_same(learn, before)
    assert (learn.opt is not None) == fitted


def test_a_fit_after_a_trial_equals_the_fit_without_one():
    with_trial, without = learner(), learner()
    torch.manual_seed(5)
    with_trial.fit(1)
    with unchanged(with_trial):
        with_trial.fit(1, 10.0)
    with_trial.fit_one_cycle(2)
    torch.manual_seed(5)
    without.fit(1)
    without.fit_one_cycle(2)
    for a, b in zip(with_trial.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert with_trial.recorder.losses == without.recorder.losses


def test_callbacks_that_decide_stay_out_and_come_back():
    learn = learner(callbacks=EarlyStopping(patience=1))
    names = [type(cb).__name__ for cb in learn.callbacks]
    with unchanged(learn):
        assert not learn.callbacks
    assert [type(cb).__name__ for cb in learn.callbacks] == names


def test_a_trial_within_a_fit_is_refused():
    class Tries(Callback):
        def after_step(self, learn):
            with unchanged(learn):
                pass

    with pytest.raises(RuntimeError, match="before or after the fit"):
        learner().fit(1, callbacks=[Tries()])


class Count:
    """A number in an object that nobody but its callback knows."""

    n = 0


class Keeps(Callback):
    """What a callback may keep outside of its attributes: another optimizer and model, a scheduler, a weight, a
    counter.
    """

    def __init__(self):
        torch.manual_seed(8)
        self.net, self.weight, self.count = (
            nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1)),
            torch.zeros(3, requires_grad=True),
            Count(),
        )
        self.opt = torch.optim.Adam([*self.net.parameters(), self.weight], 1e-2)
        self.many = {"schedulers": [torch.optim.lr_scheduler.ExponentialLR(self.opt, 0.5)]}

    def after_forward(self, learn):
        if not learn.training:
            return
        self.opt.zero_grad()
        (self.net(learn.inputs[0]).square().mean() + (self.weight - 1).square().sum()).backward()
        self.opt.step()
        self.many["schedulers"][0].step()
        self.count.n += 1

    def state_dict(self):
        return {"opt": self.opt.state_dict(), "n": self.count.n}

    def load_state_dict(self, state):
        self.opt.load_state_dict(state["opt"])
        self.count.n = state["n"]


class MadeInAFit(Keeps):
    """All of it is made when a fit begins: before there is nothing that could be kept."""

    def __init__(self):
        pass

    def before_fit(self, learn):
        super().__init__()


class Center(nn.Module):
    """A loss that counts in a buffer, and has a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("n", torch.zeros(()))

    def forward(self, pred, target):
        self.n += 1
        return nn.functional.cross_entropy(pred * self.weight, target)


def kept(cb):
    if "count" not in vars(cb):
        return vars(cb).copy()
    moments = [v.tolist() for state in cb.opt.state_dict()["state"].values() for v in state.values()]
    return (
        cb.count.n,
        moments,
        [v.tolist() for v in cb.net.state_dict().values()],
        cb.net.training,
        cb.weight.tolist(),
        cb.many["schedulers"][0].state_dict(),
        [group["lr"] for group in cb.opt.param_groups],
        id(cb.opt),
        id(cb.count),
    )


@pytest.mark.parametrize(
    "trial",
    [
        lambda learn: learn.fast_run(),
        lambda learn: learn.lr_find(num_it=12),
        lambda learn: learn.overfit_batches(steps=3),
        lambda learn: learn.batch_size_find(16),
    ],
    ids=["fast_run", "lr_find", "overfit_batches", "batch_size_find"],
)
@pytest.mark.parametrize("cls", [Keeps, MadeInAFit])
@pytest.mark.parametrize("fitted", [False, True])
def test_what_callbacks_and_losses_keep_in_objects_is_put_back(trial, cls, fitted):
    learn = learner(callbacks=[cb := cls(), *(made() for made in (EMA, Lookahead, SWA))], loss_func=Center())
    if fitted:
        learn.fit(1)
    before, loss = kept(cb), {k: v.clone() for k, v in learn.loss_func.state_dict().items()}
    state = everything(learn)
    trial(learn)
    assert kept(cb) == before
    assert all(torch.equal(v, loss[k]) for k, v in learn.loss_func.state_dict().items())
    assert_same(learn, state)


class Drawing(torch.utils.data.Dataset):
    """Draws from a generator of its own, as its sampler does."""

    def __init__(self) -> None:
        self.rng = random.Random(1)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int):
        return torch.full((4,), self.rng.random()), torch.tensor(i % 3)


class OwnOrder(torch.utils.data.Sampler):
    def __init__(self) -> None:
        self.numbers = np.random.default_rng(2)

    def __len__(self) -> int:
        return 8

    def __iter__(self):
        return iter(self.numbers.permutation(8).tolist())


@pytest.mark.parametrize(
    "look",
    [lambda learn: learn.fast_run(), lambda learn: learn.lr_find(num_it=3), lambda learn: learn.data.one_batch()],
)
def test_generators_of_samplers_and_datasets_go_on_where_they_were(look):
    def fit(before):
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(Drawing(), 4, sampler=OwnOrder())
        learn = Learner((loader, None), nn.Linear(4, 3))
        with learn.no_logging():
            before(learn)
            learn.fit(2)
        return learn.recorder.losses

    assert fit(look) == fit(lambda learn: None)
