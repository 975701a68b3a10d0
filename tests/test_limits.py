"""One batch of everything, the same batches again, and deterministic algorithms: nothing is left of any."""

import os

import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner, accuracy


class Counts(Callback):
    n: list[str] = []

    def after_forward(self, learn):
        self.n.append("train" if learn.training else "valid")

    def after_step(self, learn):
        self.n.append("step")


def learner(*callbacks) -> Learner:
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randint(2, (40,))
    model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    return Learner(DataBunch.from_tensors((x, y), (x, y), bs=8), model, metrics=accuracy, callbacks=callbacks, seed=1)


def assert_untouched(learn: Learner) -> None:
    other = learner()
    for a, b in zip(learn.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert learn.opt is None and learn.epochs_trained == learn.n_fits == 0
    learn.fit(1)
    assert learn.recorder.losses == other.fit(1).recorder.losses


def test_a_fast_run_is_one_step_and_one_batch_of_validation(capsys):
    learn = learner(counts := Counts())
    counts.n.clear()
    values = learn.fast_run()
    assert counts.n == ["train", "step", "valid"] and list(values) == ["train_loss", "valid_loss", "accuracy"]
    assert all(0 <= value < 9 for value in values.values()) and capsys.readouterr().out == ""
    assert_untouched(learn)


def test_a_fast_run_finds_what_would_fail_at_the_epochs_end():
    class Misspelt(Callback):
        def after_epoch(self, learn):
            learn.values["acuracy"]

    learn = learner(Misspelt())
    with pytest.raises(KeyError):
        learn.fast_run()
    learn.remove_callback(Misspelt)
    assert_untouched(learn)


def test_a_model_that_can_learn_overfits_its_batch():
    learn = learner()
    losses = learn.overfit_batches(1, 60, 3e-2)
    assert len(losses) == 60 and losses[-1] < 0.05 < losses[0]
    assert_untouched(learn)


def test_overfitting_equals_a_fit_on_these_batches():
    learn, same = learner(), learner()
    batches = [batch for batch, _ in zip(same.data.train_dl, range(2), strict=False)]
    assert (
        learn.overfit_batches(2, 6, 0.1) == Learner(DataBunch(batches), same.model, seed=1).fit(3, 0.1).recorder.losses
    )


def test_more_batches_than_there_are_are_refused():
    with pytest.raises(ValueError, match="train_dl has 5 batches, expected 6"):
        learner().overfit_batches(6)


def test_deterministic_switches_are_on_within_and_as_before_after(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark

    def fails():
        with learner().deterministic():
            assert torch.are_deterministic_algorithms_enabled() and cudnn.deterministic and not cudnn.benchmark
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fails()
    assert not torch.are_deterministic_algorithms_enabled() and (cudnn.deterministic, cudnn.benchmark) == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with learner().deterministic(warn_only=True):
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_what_has_no_deterministic_algorithm_is_refused_within():
    x = torch.zeros(4)
    with learner().deterministic(), pytest.raises(RuntimeError, match="deterministic"):
        x.put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
