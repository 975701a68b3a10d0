"""EMA: the average by its recurrence; evaluations see it, and the model always gets its own weights back."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import EMA, Accumulate, Checkpoint, MixedPrecision, SaveBest


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *(extra or (nn.BatchNorm1d(6),)), nn.Tanh(), nn.Linear(6, 2))


def data(n: int = 26) -> DataBunch:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator)
    return DataBunch.from_tensors((x, y), (x[:9], y[:9]), bs=4, drop_last=False)


def learner(*callbacks: Callback, model: nn.Module | None = None, **options: Any) -> Learner:
    return Learner(data(), model or net(), callbacks=callbacks, **{"lr": 0.05, "seed": 3} | options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def average(ema: EMA) -> dict[str, Tensor]:
    assert ema.average is not None
    return {name: value.clone() for name, value in ema.average.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


class Follow(Callback):
    """The recurrence by hand, number by number."""

    order = 500

    def __init__(self, decay_of: Any) -> None:
        self.decay_of, self.kept, self.t = decay_of, {}, 0

    def before_fit(self, learn: Learner) -> None:
        self.kept = {k: v.double() if v.is_floating_point() else v for k, v in state(learn.model).items()}

    def after_step(self, learn: Learner) -> None:
        self.t += 1
        d = self.decay_of(self.t)
        for name, value in state(learn.model).items():
            self.kept[name] = d * self.kept[name] + (1 - d) * value.double() if value.is_floating_point() else value


@pytest.mark.parametrize(
    "options, decay_of",
    [
        ({"decay": 0.9}, lambda t: 0.9),
        ({"decay": 0.0}, lambda t: 0.0),
        ({"decay": 1.0}, lambda t: 1.0),
        ({"decay": 0.5, "warmup": True}, lambda t: min(0.5, (1 + t) / (10 + t))),
    ],
    ids=["0.9", "0: the weights", "1: the start", "warm-up"],
)
@pytest.mark.parametrize("n", [1, 3])
def test_it_is_the_recurrence_over_optimizer_steps_buffers_too(options, decay_of, n):
    ema, follow = EMA(**options), Follow(decay_of)
    learn = learner(ema, follow, Accumulate(n)).fit(2)
    assert ema.n_updates == follow.t == learn.step == 2 * -(-7 // n)
    torch.testing.assert_close(
        {k: v.double() if v.is_floating_point() else v for k, v in average(ema).items()},
        follow.kept,
        rtol=1e-5,
        atol=1e-6,
    )
    assert average(ema)["1.num_batches_tracked"] == 14


def test_an_average_changes_nothing_of_the_training():
    plain, averaged = learner().fit(3), learner(EMA(0.9)).fit(3)
    assert_same(state(plain.model), state(averaged.model))
    assert plain.recorder.losses == averaged.recorder.losses


# --- t -----------------------------------------------------------------------
class Look(Callback):
    """What the model is during a validation and beside it."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.within: dict[str, Tensor] = {}

    def after_train(self, learn: Learner) -> None:
        self.before = state(learn.model)

    def before_validate(self, learn: Learner) -> None:
        self.within = state(learn.model)


def test_validation_prediction_and_get_preds_see_the_average_and_the_weights_come_back():
    ema, look = EMA(0.9), Look()
    learn = learner(ema, look).fit(2)
    assert_same(look.within, average(ema))
    assert_same(state(learn.model), look.before)
    other = learner(model=net())
    other.model.load_state_dict(average(ema))
    assert learn.recorder.values[-1][1] == pytest.approx(other.validate()["valid_loss"])
    assert learn.validate() == other.validate()
    assert torch.equal(learn.get_preds()[0], other.get_preds()[0]) and torch.equal(
        learn.predict(torch.ones(3, 4)), other.predict(torch.ones(3, 4))
    )
    assert_same(state(learn.model), look.before)


@pytest.mark.parametrize("where", ["before_validate", "after_forward", "after_validate"])
@pytest.mark.parametrize("error", [ConnectionAbortedError, KeyboardInterrupt])
def test_the_weights_come_back_when_a_validation_raises(where, error):
    class Raise(Callback):
        def before_validate(self, learn: Learner) -> None:
            self.meet("before_validate")

        def after_validate(self, learn: Learner) -> None:
            self.meet("after_validate")

        def after_forward(self, learn: Learner) -> None:
            if not learn.training:
                self.meet("after_forward")

        def meet(self, hook: str) -> None:
            if hook == where:
                raise error

    look = Look()
    learn = learner(EMA(0.9), look)
    with pytest.raises(error):
        learn.fit(2, callbacks=[Raise()])
    assert_same(state(learn.model), look.before)
    learn.add_callback(Raise())
    with pytest.raises(error):
        learn.validate()
    assert_same(state(learn.model), look.before)


def test_within_swapped_the_model_is_the_average_also_twice_and_when_it_raises():
    ema = EMA(0.9)
    learn = learner(ema).fit(1)
    own = state(learn.model)

    def fail_within() -> None:
        with ema.swapped(learn):
            assert_same(state(learn.model), average(ema))
            with ema.swapped(learn):
                assert_same(state(learn.model), average(ema))
            assert_same(state(learn.model), average(ema))
            raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        fail_within()
    assert_same(state(learn.model), own)


def test_the_average_has_storage_of_its_own():
    ema = EMA(0.9)
    learn = learner(ema).fit(1)
    kept = average(ema)
    with torch.no_grad():
        for value in learn.model.state_dict().values():
            value.zero_()
    assert_same(average(ema), kept)


def test_a_step_after_a_validation_trains_the_weights_and_not_the_average():
    """The optimizer holds on to the parameters themselves, and its step writes where they are then."""

    class Validate(Callback):
        def after_step(self, learn: Learner) -> None:
            learn.validate()

    plain, checked = learner().fit(2), learner(EMA(0.9), Validate()).fit(2)
    assert_same(state(plain.model), state(checked.model))


@pytest.mark.parametrize(
    "make",
    [lambda: net(), lambda: torch.compile(net(), backend="eager"), lambda: nn.DataParallel(net())],
    ids=["plain", "compiled by hand", "in a wrapper"],
)
def test_apply_makes_the_average_the_weights_for_good(make):
    ema = EMA(0.5)
    learn = learner(ema, model=make()).fit(1)
    own, kept = [p.detach().clone() for p in learn.model.parameters()], average(ema)
    ema.apply(learn)
    assert not any(torch.equal(p, q) for p, q in zip(learn.model.parameters(), own, strict=True))
    assert [v.tolist() for v in learn.model.state_dict().values()] == [v.tolist() for v in kept.values()]
    before = learn.validate()
    assert learn.remove_callback(ema).validate() == before


def test_before_a_first_fit_there_is_nothing_to_apply_and_evaluations_see_the_weights():
    ema = EMA()
    learn = learner(ema)
    assert learn.validate() == learner().validate()
    with pytest.raises(RuntimeError, match="there is no average yet: fit with this EMA first"):
        ema.apply(learn)


def test_tied_weights_and_half_precision_weights_are_averaged_once_and_in_float32():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("short", torch.ones(3, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))[:, :2]

    ema, model = EMA(0.5), Tied()
    learn = learner(ema, model=model).fit(1)
    assert average(ema)["short"].dtype == torch.float32 and sum("weight" in name for name in average(ema)) == 1
    assert model.short.dtype == torch.bfloat16
    learn.validate()
    assert model.b.weight is model.a.weight
    own = model.a.weight.detach().clone()
    ema.apply(learn)
    assert model.b.weight is model.a.weight and not torch.equal(model.a.weight, own)


# --- -------------------------------------------------------------------------
def written(name: str) -> dict[str, Tensor]:
    return torch.load(Path("models") / f"{name}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("saves", [False, True])
def test_what_is_saved_is_the_average_where_that_was_asked_for_else_the_weights(saves):
    ema = EMA(0.9, saves=saves)
    learn = learner(ema, SaveBest()).fit(1)
    learn.save("last")
    for name in ("best", "last"):
        assert_same(written(name), average(ema) if saves else state(learn.model))
    own, kept = state(learn.model), average(ema)
    learn.load("last")
    assert_same(state(learn.model), kept if saves else own)


def test_a_validation_after_the_fit_has_the_value_of_what_was_saved():
    learn = learner(EMA(0.9, saves=True), SaveBest()).fit(2)
    best = min(row[1] for row in learn.recorder.values)
    assert learner().load("best").validate()["valid_loss"] == pytest.approx(best)


def test_after_a_fit_without_it_the_weights_are_saved_again():
    """The average of an earlier fit is of weights that are no more."""
    learn = learner().fit(1, callbacks=[EMA(0.9, saves=True)])
    learn.fit(1).save("last")
    assert_same(written("last"), state(learn.model))


# --- skips, resume, ----------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pure", [False, True])
def test_beside_mixed_precision_and_accumulation_the_average_is_of_the_float32_weights(dtype, pure):
    ema, follow = EMA(0.8), Follow(lambda t: 0.8)
    learner(ema, follow, Accumulate(2), MixedPrecision(dtype, pure=pure, init_scale=64.0)).fit(2)
    torch.testing.assert_close(
        {k: v.double() if v.is_floating_point() else v for k, v in average(ema).items()},
        follow.kept,
        rtol=1e-5,
        atol=1e-6,
    )
    assert {v.dtype for v in average(ema).values()} == {torch.float32, torch.int64}


def resumable(folder: str, *extra: Callback, **options: Any) -> tuple[Learner, EMA]:
    ema = EMA(0.8, **options)
    return learner(ema, Accumulate(2), Checkpoint(folder, every_n_steps=1), SaveBest(), *extra), ema


class Die(Callback):
    order = Checkpoint.order - 10

    def __init__(self, *at: int) -> None:
        self.at = at

    def after_batch(self, learn: Learner) -> None:
        if learn.training and (learn.epoch, learn.batch_index) == self.at:
            raise ConnectionAbortedError


@pytest.mark.parametrize("options", [{}, {"warmup": True}, {"saves": True}])
@pytest.mark.parametrize("at", [(0, 2), (0, 5), (1, 0), (1, 3), (2, 6)])
def test_a_resumed_fit_has_the_average_of_one_that_was_not_interrupted(at, options):
    plain, expected = resumable("a", **options)
    plain.fit(3)
    with pytest.raises(ConnectionAbortedError):
        resumable("b", **options)[0].fit(3, callbacks=[Die(*at)])
    learn, ema = resumable("b", **options)
    learn.fit(3, resume=True)
    assert_same(average(ema), average(expected))
    assert_same(state(learn.model), state(plain.model))
    assert ema.n_updates == expected.n_updates and learn.recorder.values == plain.recorder.values
    learn.save("last")
    assert_same(written("last"), average(ema) if "saves" in options else state(learn.model))


def test_a_checkpoint_that_is_still_being_written_has_the_weights_and_not_the_average():
    """The validation changes places of the two while a thread reads."""
    with pytest.raises(ConnectionAbortedError):
        learner(EMA(0.8), Checkpoint("b", async_write=True, every_n_steps=7)).fit(3, callbacks=[Die(1, 0)])
    resumed = learner(again := EMA(0.8), Checkpoint("b")).fit(3, resume=True)
    plain = learner(expected := EMA(0.8)).fit(3)
    assert_same(state(resumed.model), state(plain.model))
    assert_same(average(again), average(expected))


def test_a_fit_that_is_told_to_leave_during_a_validation_saves_the_weights_beside_the_average():
    class Terminate(Callback):
        def after_forward(self, learn: Learner) -> None:
            if not learn.training and learn.epoch == 1 and learn.batch_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    plain, expected = resumable("a")
    plain.fit(3)
    with pytest.raises(SystemExit):
        resumable("b", Terminate())[0].fit(3)
    learn, ema = resumable("b")
    learn.fit(3, resume=True)
    assert_same(state(learn.model), state(plain.model))
    assert_same(average(ema), average(expected))


def test_a_finished_fit_that_is_resumed_has_its_average():
    plain, expected = resumable("a", saves=True)
    plain.fit(2)
    learn, ema = resumable("a", saves=True)
    learn.fit(2, resume=True)
    assert_same(average(ema), average(expected))
    assert learn.validate() == plain.validate()


def test_a_second_fit_begins_with_the_weights_as_they_are():
    ema = EMA(1.0)
    learn = learner(ema).fit(1)
    own = state(learn.model)
    learn.fit(1)
    assert_same(
        {k: v for k, v in average(ema).items() if "tracked" not in k},
        {k: v for k, v in own.items() if "tracked" not in k},
    )


@pytest.mark.parametrize("decay", [-0.1, 1.1, 999])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay={decay}: expected a number from 0 to 1, such as 0.999"):
        EMA(decay)
