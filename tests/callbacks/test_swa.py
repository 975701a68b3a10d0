"""SWA: the mean of what the last epochs end with; evaluations see it, with batch norm's statistics measured for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import SWA, Accumulate, Checkpoint, MixedPrecision, SaveBest


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 4, generator=generator) * 2 + 1, torch.randn(24, 2, generator=generator)


def learner(*callbacks: Callback, **options: Any) -> Learner:
    x, y = tensors()
    return Learner(
        DataBunch.from_tensors((x, y), (x[:9], y[:9]), bs=4),
        net(),
        callbacks=callbacks,
        **{"lr": 0.05, "seed": 3} | options,
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def average(swa: SWA) -> dict[str, Tensor]:
    assert swa.average is not None
    return {name: value.clone() for name, value in swa.average.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class Ends(Callback):
    """What the model is at the end of each epoch's training."""

    order = -300

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def after_train(self, learn: Learner) -> None:
        self.kept.append(state(learn.model))


class Within(Callback):
    order = 300

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def after_validate(self, learn: Learner) -> None:
        self.kept.append(state(learn.model))


def means(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([s[name] for s in states]).mean(0) if value.is_floating_point() else value
        for name, value in states[-1].items()
    }


@pytest.mark.parametrize("start, n_epochs, first", [(0.75, 8, 6), (0.5, 5, 2), (0.0, 3, 0), (0.99, 4, 3), (0.75, 1, 0)])
def test_it_is_the_mean_of_the_ends_of_the_last_epochs(start, n_epochs, first):
    swa, ends, within = SWA(start), Ends(), Within()
    learn = learner(swa, ends, within).fit(n_epochs)
    assert swa.n_averaged == n_epochs - first
    torch.testing.assert_close(average(swa), means(ends.kept[first:]))
    for epoch in range(n_epochs):
        expected = ends.kept[epoch] if epoch < first else means(ends.kept[first : epoch + 1])
        torch.testing.assert_close(within.kept[epoch], expected)
    assert_same(state(learn.model), ends.kept[-1])


def test_an_average_changes_nothing_of_the_training():
    for update_bn in (False, True):
        plain, averaged = learner().fit(4), learner(SWA(0.5, update_bn=update_bn)).fit(4)
        assert_same(state(plain.model), state(averaged.model))
        assert plain.recorder.losses == averaged.recorder.losses


def test_measured_statistics_are_those_of_the_training_data_under_the_average():
    swa, within = SWA(0.5, update_bn=True), Within()
    learn = learner(swa, within).fit(4)
    hand, (x, _) = net(), tensors()
    hand.load_state_dict(average(swa))
    hidden = hand[0](x).detach()
    torch.testing.assert_close(within.kept[-1]["1.running_mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert within.kept[-1]["1.num_batches_tracked"] == 6  # batches of 4, each alike
    assert learn.model[1].momentum == 0.1 and not within.kept[-1]["1.running_mean"].equal(
        state(learn.model)["1.running_mean"]
    )
    value = learn.validate()
    assert value["valid_loss"] == pytest.approx(learn.recorder.values[-1][1])


@pytest.mark.parametrize("where", ["measuring", "validating"])
@pytest.mark.parametrize("error", [ConnectionAbortedError, KeyboardInterrupt])
def test_weights_and_batch_norm_come_back_after_an_error(where, error):
    class Raise(Callback):
        def before_validate(self, learn: Learner) -> None:
            if where == "validating" and learn.epoch:
                raise error

        def after_forward(self, learn: Learner) -> None:
            if where == "measuring" and not learn.training and learn.epoch:
                raise error

    ends = Ends()
    learn = learner(SWA(0.5, update_bn=True), ends)
    with pytest.raises(error):
        learn.fit(2, callbacks=[Raise()])
    assert_same(state(learn.model), ends.kept[-1])
    assert learn.model[1].momentum == 0.1


def test_measuring_goes_well_with_batches_of_callbacks_that_change_them():
    """Nothing of the measuring pass is left in the learner."""
    swa = SWA(0.5, update_bn=True)
    learn = learner(swa, Accumulate(2), MixedPrecision()).fit(4)
    assert learn.step == 12 and swa.is_measured and learn.n_held == 0 and not torch.is_autocast_enabled("cpu")
    assert {v.dtype for v in average(swa).values()} == {torch.float32, torch.int64}


def test_apply_and_swapped():
    swa = SWA(0.5)
    learn = learner(swa)
    with pytest.raises(RuntimeError, match="there is no average yet: fit with this SWA first, beyond its start"):
        swa.apply(learn)
    learn.fit(3)
    own = state(learn.model)
    with swa.swapped(learn):
        assert_same(state(learn.model), average(swa))
    assert_same(state(learn.model), own)
    swa.apply(learn)
    assert_same(state(learn.model), average(swa))


def written(name: str) -> dict[str, Tensor]:
    return torch.load(Path("models") / f"{name}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("saves", [False, True])
def test_what_is_saved_is_the_average_from_its_first_epoch_where_that_was_asked_for(saves):
    class Save(Callback):
        def after_epoch(self, learn: Learner) -> None:
            learn.save(f"epoch-{learn.epoch}")

    swa, ends = SWA(0.5, saves=saves), Ends()
    learner(swa, ends, Save(), SaveBest("train_loss", "max")).fit(4)
    for epoch in range(4):
        expected = means(ends.kept[2 : epoch + 1]) if saves and epoch >= 2 else ends.kept[epoch]
        torch.testing.assert_close(written(f"epoch-{epoch}"), expected)


def test_a_later_fit_saves_the_weights_until_it_has_an_average_of_its_own():
    learn = learner().fit(2, callbacks=[SWA(0.0, saves=True)])
    learn.fit(1, callbacks=[SWA(0.9)]).save("last")
    assert_same(written("last"), state(learn.model))


class Die(Callback):
    order = Checkpoint.order - 10

    def __init__(self, *at: int) -> None:
        self.at = at

    def after_batch(self, learn: Learner) -> None:
        if learn.training and (learn.epoch, learn.batch_index) == self.at:
            raise ConnectionAbortedError


@pytest.mark.parametrize("update_bn", [False, True])
@pytest.mark.parametrize("at", [(1, 2), (2, 0), (2, 5), (3, 3), (4, 1)])
def test_a_resumed_fit_has_and_saves_the_average_of_one_that_was_not_interrupted(at, update_bn):
    def make(folder: str) -> tuple[Learner, SWA]:
        swa = SWA(0.4, update_bn=update_bn, saves=True)
        return learner(swa, Checkpoint(folder, every_n_steps=2), Accumulate(2)), swa

    plain, expected = make("a")
    plain.fit(5).save("expected")
    with pytest.raises(ConnectionAbortedError):
        make("b")[0].fit(5, callbacks=[Die(*at)])
    learn, swa = make("b")
    learn.fit(5, resume=True)
    assert_same(average(swa), average(expected))
    assert_same(state(learn.model), state(plain.model))
    assert learn.recorder.values == plain.recorder.values and swa.n_averaged == expected.n_averaged == 3
    learn.save("last")
    assert_same(written("last"), written("expected"))


def test_a_finished_fit_that_is_resumed_has_and_saves_its_average():
    def make() -> tuple[Learner, SWA]:
        swa = SWA(0.4, saves=True)
        return learner(swa, Checkpoint("kept")), swa

    plain, expected = make()
    plain.fit(3)
    learn, swa = make()
    learn.fit(3, resume=True).save("last")
    assert_same(average(swa), average(expected))
    assert_same(written("last"), average(expected))
    assert learn.validate() == plain.validate()


@pytest.mark.parametrize("start", [-0.1, 1.0, 3])
def test_a_start_that_is_none_is_refused(start):
    with pytest.raises(ValueError, match=rf"start={start}: expected a share of the fit, from 0 to below 1"):
        SWA(start)
