"""Several optimizers as one."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from learnkit import Callback, DataBunch, Learner, Together
from learnkit.callbacks import Accumulate, Checkpoint


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def both(model):
    return Together(
        SGD(model[0].parameters(), lr=0.1, momentum=0.9), AdamW(model[2].parameters(), lr=1e-2, weight_decay=0.0)
    )


def batches():
    return [
        (torch.randn(6, 4, generator=g), torch.randint(3, (6,), generator=g))
        for g in [torch.Generator().manual_seed(1)]
        for _ in range(4)
    ]


def learner(**options):
    model = net()
    return Learner(DataBunch(batches()), model, opt_func=both(model), **options)


def weights(learn):
    return [p.detach().clone() for p in learn.model.parameters()]


def test_a_fit_equals_the_loop_in_which_each_one_steps():
    model = net()
    opts = (SGD(model[0].parameters(), lr=0.1, momentum=0.9), AdamW(model[2].parameters(), lr=1e-2, weight_decay=0.0))
    for _ in range(2):
        for x, y in batches():
            F.cross_entropy(model(x), y).backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()
    learn = learner().fit(2)
    for own, by_hand in zip(learn.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, by_hand)


def test_a_schedule_sets_the_rates_and_momenta_of_all_by_their_own():
    learn = learner()
    seen = []

    class See(Callback):
        def after_step(self, learn):
            seen.append([group["lr"] for group in learn.opt.param_groups])

    learn.fit_one_cycle(1, callbacks=[See()])
    assert [first / second for first, second in seen] == pytest.approx([10.0] * 4)
    assert max(first for first, _ in seen) == pytest.approx(0.1)


def test_its_state_goes_into_checkpoints_and_files_and_comes_back(tmp_path):
    class Stop(Callback):
        def before_batch(self, learn):
            if learn.training and learn.step == 5:
                raise KeyError

    whole = learner().fit_one_cycle(3)
    with pytest.raises(KeyError):
        learner(callbacks=Checkpoint(tmp_path, every_n_steps=1)).fit_one_cycle(3, callbacks=[Stop()])
    resumed = learner(callbacks=Checkpoint(tmp_path)).fit_one_cycle(3, resume=True)
    assert resumed.resumed is not None
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)
    whole.save("all")
    other = learner(path=whole.path).load("all")
    assert str(other.opt.state_dict()) == str(whole.opt.state_dict())


def test_in_float16_an_overflow_skips_all_of_them():
    learn = learner(callbacks=Accumulate(2)).to_fp16(init_scale=2.0**127)
    before = weights(learn)
    with learn.no_logging():
        learn.fit(1)
    assert learn.step == 0 and all(torch.equal(a, b) for a, b in zip(before, weights(learn), strict=True))


@pytest.mark.skipif(getattr(torch.optim, "Muon", None) is None, reason="this PyTorch has no Muon")
def test_muon_for_matrices_and_adamw_for_the_rest_learns():
    model = net()
    opt = Together(
        torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02),
        AdamW([p for p in model.parameters() if p.ndim != 2], lr=3e-3),
    )
    learn = Learner(DataBunch(batches()), model, opt_func=opt).fit_one_cycle(30)
    assert learn.recorder.values[-1][0] < learn.recorder.values[0][0] - 0.15  # random labels: it learns them by heart


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Together(), ValueError, "no optimizer"),
        (lambda: Together(partial(SGD)), TypeError, "expected a torch.optim.Optimizer"),
        (lambda: both(net()).step(lambda: 0.0), ValueError, "cannot take a closure"),
    ],
)
def test_misuse_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_same_parameter_twice_is_refused():
    model = net()
    with pytest.raises(ValueError, match="more than one parameter group"):
        Together(SGD(model.parameters(), lr=0.1), SGD(model[0].parameters(), lr=0.1))
