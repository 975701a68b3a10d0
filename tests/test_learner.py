"""The Learner: what hooks may rely on, and that it is as it was after any error or Ctrl-C."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, StopFit, accuracy
from learnkit.callbacks import Progress, Recorder

STAGES = ("fit", "epoch", "train", "validate", "batch", "forward", "backward", "step")
# An around_ hook can fail before it calls run(), and after.
PLACES = [f"{word}_{stage}" for stage in STAGES for word in ("before", "opening", "closing", "after")]
N_STEPS = 3  # in an epoch


def make_tensors(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3), torch.randint(2, (n,))


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def make_learner(*callbacks: Callback, **options: Any) -> Learner:
    """Three batches (of 4) in training, one in validation."""
    x, y = make_tensors()
    train_dl = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    return Learner(
        (train_dl, DataLoader(TensorDataset(x[:4], y[:4]), batch_size=4)), make_model(), callbacks=callbacks, **options
    )


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


class Boom(Exception): ...


class At:
    """Whether a hook is to fail now: once, in the second epoch, in the second batch of a pass that has one."""

    def __init__(self, place: str, error: BaseException) -> None:
        self.place, self.error = place, error

    def __call__(self, learn: Learner, place: str) -> None:
        if place != self.place or (not place.endswith("_fit") and learn.epoch != 1):
            return
        if place.endswith(("_batch", "_forward", "_backward", "_step")) and learn.batch_index != 1:
            return
        self.place = "nowhere"
        raise self.error


def failing(name: str, at: At) -> Callback:
    def teller(place: str) -> Callable[..., None]:
        def tell(self: Any, learn: Learner) -> None:
            at(learn, place)

        tell.__name__ = place
        return tell

    def owner(stage: str) -> Callable[..., None]:
        def around(self: Any, learn: Learner, run: Callable[[], None]) -> None:
            at(learn, f"opening_{stage}")
            run()
            at(learn, f"closing_{stage}")

        around.__name__ = f"around_{stage}"
        return around

    hooks = {f"{word}_{stage}": teller(f"{word}_{stage}") for stage in STAGES for word in ("before", "after")}
    return type(name, (Callback,), hooks | {f"around_{stage}": owner(stage) for stage in STAGES})()


def bracket(order: int) -> Any:
    """A callback that counts how often each of its around_ hooks was entered and cleaned up."""

    def owner(stage: str) -> Callable[..., None]:
        def around(self: Any, learn: Learner, run: Callable[[], None]) -> None:
            self.entered[stage] += 1
            try:
                run()
            finally:
                self.left[stage] += 1

        return around

    callback: Any = type("Bracket", (Callback,), {f"around_{stage}": owner(stage) for stage in STAGES})()
    callback.entered, callback.left, callback.order = Counter(), Counter(), order
    return callback


# --- errors ------------------------------------------------------------------
@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_any_hook_surfaces_with_its_place_everything_is_cleaned_up_and_fit_works_again(
    place: str, kind: type[BaseException]
):
    error = kind("it broke")
    brackets = [bracket(-9), bracket(9)]
    learn = make_learner(brackets[0], failing("Fragile", At(place, error)), brackets[1])
    learn.model.get_submodule("1").eval()
    modes = [module.training for module in learn.model.modules()]
    if place in ("closing_validate", "after_validate"):
        batch = "validation"
    else:
        batch = "training" if place.endswith(("_batch", "_forward", "_backward", "_step")) else ""
    with pytest.raises(kind, match="it broke") as caught:
        learn.fit(2)

    assert caught.value is error
    word, _, stage = place.partition("_")
    hook = place if word in ("before", "after") else f"around_{stage}"
    epoch = 0 if place in ("before_fit", "opening_fit") else 1
    [note] = [line for line in notes(error).splitlines() if "learnkit" in line]
    assert f"Fragile.{hook}" in note and f"epoch {epoch}" in note
    if batch == "training":
        assert "training batch 1" in note
    if batch == "validation":
        assert "validation batch 0" in note

    for b in brackets:
        assert b.entered == b.left
    assert brackets[0].entered["fit"] == 1
    assert [module.training for module in learn.model.modules()] == modes
    for loader in (learn.data.train_dl, learn.data.valid_dl):
        assert loader.generator is None and getattr(loader.sampler, "generator", None) is None  # type: ignore
    assert all(p.grad is None for p in learn.model.parameters())
    assert not learn.training and learn.pred is None and learn.loss is None
    assert learn.fit(1).step == N_STEPS and len(learn.recorder.losses) == N_STEPS


@pytest.mark.parametrize(
    "place", ["before_batch", "closing_forward", "after_backward", "before_step", "after_validate"]
)
def test_a_fit_after_an_error_equals_a_first_one(place: str):
    x, y = make_tensors()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]
    model, fresh = make_model(), make_model()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    learn = Learner((batches, batches[:1]), model, callbacks=failing("Fragile", At(place, Boom())))
    with pytest.raises(Boom):
        learn.fit_one_cycle(2)
    model.load_state_dict(start)
    learn.opt = None  # type: ignore
    learn.fit_one_cycle(2)
    fresh.load_state_dict(start)
    expected = Learner((batches, batches[:1]), fresh).fit_one_cycle(2)
    assert learn.recorder.losses == expected.recorder.losses and learn.recorder.values == expected.recorder.values
    for key, value in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize(
    "place", ["before_fit", "opening_fit", "before_epoch", "opening_epoch", "before_train", "opening_train"]
)
def test_an_error_between_two_passes_is_not_said_to_be_in_a_batch_of_the_last_one(place: str):
    learn = make_learner(failing("Fragile", At(place, error := Boom())))
    with pytest.raises(Boom):
        learn.fit(2)
    assert "training batch 2" not in notes(error) and "validation batch" not in notes(error), notes(error)


def test_a_function_that_serves_several_hooks_is_named_by_the_hook_that_failed():
    class Reports(Callback):
        def report(self, learn: Learner) -> None:
            if learn.step == N_STEPS:
                raise Boom("no paper")

        before_epoch = after_epoch = report

    with pytest.raises(Boom, match="no paper") as caught:
        make_learner(Reports()).fit(1)
    assert "Reports.after_epoch, epoch 0" in notes(caught.value)


def test_the_note_of_an_error_in_validation_names_the_validation_batch():
    class InValidation(Callback):
        def after_forward(self, learn):
            if not learn.training:
                raise Boom("here")

    with pytest.raises(Boom, match="here") as caught:
        make_learner(InValidation()).fit(1)
    assert "InValidation.after_forward, epoch 0, validation batch 0" in notes(caught.value)


def test_an_error_in_the_models_forward_is_blamed_on_the_stage_and_on_no_callback():
    class Bad(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise Boom("bad model")

    x, y = make_tensors()
    learn = Learner(([(x, y)], None), Bad(3, 2), callbacks=[bracket(-1), bracket(1)])
    with pytest.raises(Boom, match="bad model") as caught:
        learn.fit(1)
    assert "the stage forward, epoch 0, training batch 0" in notes(caught.value)
    assert "Bracket" not in notes(caught.value) and "Progress" not in notes(caught.value)


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt])
def test_an_error_of_the_loader_is_blamed_on_the_train_stage_after_the_last_good_batch(kind: type[BaseException]):
    class Loader:
        good = False

        def __iter__(self) -> Iterator[Any]:
            yield x, y
            if not self.good:
                raise kind("bad file")

    x, y = make_tensors()
    learn = Learner((loader := Loader(), None), make_model())
    with pytest.raises(kind, match="bad file") as caught:
        learn.fit(1)
    assert "the stage train, epoch 0, training batch 0" in notes(caught.value)
    loader.good = True
    assert learn.fit(1).step == 1


def test_an_error_of_a_metric_names_the_metric():
    def broken(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise Boom("no metric")

    with pytest.raises(Boom, match="no metric") as caught:
        make_learner(metrics=broken).fit(1)
    assert "broken" in notes(caught.value) and "epoch 0, validation batch 0" in notes(caught.value)


class FailsToClean(Callback):
    order = -3

    def __init__(self, stage: str = "fit") -> None:
        self.stage = stage

    def clean(self, stage: str) -> None:
        if stage == self.stage:
            raise OSError("disk full")

    def around_fit(self, learn: Learner, run: Callable[[], None]) -> None:
        try:
            run()
        finally:
            self.clean("fit")

    def around_batch(self, learn: Learner, run: Callable[[], None]) -> None:
        try:
            run()
        finally:
            self.clean("batch")


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["fit", "batch"])
def test_where_the_clean_up_fails_too_the_first_error_surfaces_and_tells_of_the_other(
    stage: str, kind: type[BaseException]
):
    error, brackets = kind("first"), [bracket(-9), bracket(9)]
    learn = make_learner(*brackets, FailsToClean(stage), failing("Fragile", InFirstBatch(error)))
    with pytest.raises(kind, match="first") as caught:
        learn.fit(2)
    assert caught.value is error
    assert "Fragile.before_step" in notes(error) and "OSError: disk full" in notes(error)
    for b in brackets:
        assert b.entered == b.left


class InFirstBatch(At):
    def __init__(self, error: BaseException) -> None:
        super().__init__("before_step", error)

    def __call__(self, learn: Learner, place: str) -> None:
        if place == self.place:
            raise self.error


def test_a_clean_up_that_fails_alone_is_the_error_and_names_its_hook():
    with pytest.raises(OSError, match="disk full") as caught:
        make_learner(FailsToClean()).fit(1)
    assert "FailsToClean.around_fit" in notes(caught.value)


def test_a_clean_up_that_fails_after_stop_fit_is_the_error():
    class StopsAtOnce(Callback):
        def before_batch(self, learn):
            raise StopFit

    with pytest.raises(OSError, match="disk full"):
        make_learner(FailsToClean(), StopsAtOnce()).fit(1)


def test_a_hook_may_translate_an_error_with_raise_from():
    class Explains(Callback):
        def around_fit(self, learn, run):
            try:
                run()
            except Boom as error:
                raise LookupError("the third file is broken") from error

    with pytest.raises(LookupError, match="third file") as caught:
        make_learner(Explains(), failing("Fragile", At("before_batch", error := Boom()))).fit(2)
    assert caught.value.__cause__ is error


def test_an_around_hook_may_swallow_an_error_and_try_again():
    class Retry(Callback):
        def around_batch(self, learn, run):
            try:
                run()
            except Boom:
                run()

    learn = make_learner(Retry(), failing("Fragile", At("before_forward", Boom())))
    assert learn.fit(2).step == 2 * N_STEPS


def test_an_error_after_a_swallowed_one_is_named_by_its_own_place():
    class Swallow(Callback):
        def around_batch(self, learn, run):
            with suppress(Boom):
                run()

    class Later(Callback):
        def after_epoch(self, learn):
            if learn.epoch == 1:
                raise LookupError("later")

    learn = make_learner(Swallow(), failing("Fragile", At("before_forward", Boom())), Later())
    with pytest.raises(LookupError, match="later") as caught:
        learn.fit(2)
    assert "Later.after_epoch, epoch 1" in notes(caught.value)


def test_autocast_opened_by_a_callback_is_closed_after_an_error():
    class Cast(Callback):
        def around_fit(self, learn, run):
            with torch.autocast("cpu", torch.bfloat16):
                run()

    with pytest.raises(Boom):
        make_learner(Cast(), failing("Fragile", At("before_step", Boom()))).fit(2)
    assert not torch.is_autocast_enabled("cpu")


def test_a_generator_loader_is_closed_when_a_fit_breaks():
    closed: list[bool] = []

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            try:
                yield from [make_tensors()] * 3
            finally:
                closed.append(True)

    learn = Learner((Loader(), None), make_model(), callbacks=failing("Fragile", InFirstBatch(Boom())))
    with pytest.raises(Boom):
        learn.fit(1)
    assert closed == [True]


# --- what hooks may rely on --------------------------------------------------
class Asserts(Callback):
    """The promises in the docstrings of Callback's hooks, and how often each was checked."""

    order = 1_000

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def before_fit(self, learn: Learner) -> None:
        self.seen["fit"] += 1
        assert learn.n_epochs == 2 and learn.n_steps == 2 * N_STEPS and isinstance(learn.opt, torch.optim.Optimizer)

    def before_epoch(self, learn: Learner) -> None:
        assert learn.epoch == self.seen["epoch"]
        self.seen["epoch"] += 1

    def before_train(self, learn: Learner) -> None:
        assert learn.training and learn.model.training and torch.is_grad_enabled() and learn.dl is learn.data.train_dl

    def before_validate(self, learn: Learner) -> None:
        assert not learn.training and not learn.model.training

    def before_batch(self, learn: Learner) -> None:
        assert learn.training == learn.model.training == torch.is_grad_enabled()
        assert isinstance(learn.inputs, tuple) and len(learn.inputs[0]) == len(learn.target) == 4

    def after_forward(self, learn: Learner) -> None:
        assert learn.pred.shape == (4, 2) and learn.loss.shape == () and learn.loss.requires_grad == learn.training
        torch.testing.assert_close(learn.loss, nn.functional.cross_entropy(learn.pred, learn.target))

    def before_backward(self, learn: Learner) -> None:
        assert all(p.grad is None for p in learn.model.parameters())

    def before_step(self, learn: Learner) -> None:
        assert learn.step == self.seen["step"] and all(p.grad is not None for p in learn.model.parameters())

    def after_step(self, learn: Learner) -> None:
        self.seen["step"] += 1
        assert learn.step == self.seen["step"] and all(p.grad is None for p in learn.model.parameters())

    def after_train(self, learn: Learner) -> None:
        assert learn.batch_index == N_STEPS - 1

    def after_validate(self, learn: Learner) -> None:
        assert {"valid_loss", "accuracy"} <= learn.values.keys()

    def after_epoch(self, learn: Learner) -> None:
        assert tuple(learn.values) == ("train_loss", "valid_loss", "accuracy")

    def after_fit(self, learn: Learner) -> None:
        self.seen["end"] += 1


def test_hooks_find_what_their_docstrings_promise():
    checks = Asserts()
    learn = make_learner(checks, metrics=accuracy)
    assert learn.fit(2) is learn
    assert checks.seen == {"fit": 1, "epoch": 2, "step": 2 * N_STEPS, "end": 1}


def test_a_hook_may_change_the_batch():
    class Zero(Callback):
        def before_batch(self, learn):
            learn.inputs = (learn.inputs[0] * 0,)  # type: ignore

    x, y = torch.randn(4, 3), torch.randn(4, 1)
    model = nn.Linear(3, 1)
    weight, bias = model.weight.clone(), model.bias.clone()
    Learner(([(x, y)], None), model, opt_func=torch.optim.SGD, wd=0.0, callbacks=Zero()).fit(1)
    assert torch.equal(model.weight, weight) and not torch.equal(model.bias, bias)


def test_a_hook_may_change_the_loss():
    class Double(Callback):
        def after_forward(self, learn):
            learn.loss = 2 * learn.loss

    x, y = torch.randn(4, 3), torch.randn(4, 1)
    models = [nn.Linear(3, 1), nn.Linear(3, 1)]
    models[1].load_state_dict(models[0].state_dict())
    for model, lr, callbacks in ((models[0], 0.1, [Double()]), (models[1], 0.2, [])):
        Learner(([(x, y)], None), model, opt_func=torch.optim.SGD, wd=0.0, callbacks=callbacks).fit(1, lr)
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_nothing_of_a_batch_is_kept_after_a_fit():
    class Refs(Callback):
        def after_forward(self, learn):
            refs.extend([weakref.ref(learn.pred), weakref.ref(learn.loss)])

    refs: list[weakref.ref[Any]] = []
    make_learner(Refs()).fit(1)
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []


# --- construction and callbacks ----------------------------------------------
def test_every_learner_has_a_recorder_and_a_progress_and_a_given_one_takes_their_place():
    own = Progress(bar=False)
    learn = make_learner(own)
    assert [type(cb) for cb in make_learner().callbacks] == [Recorder, Progress]
    assert [cb for cb in learn.callbacks if isinstance(cb, Progress)] == [own]


def test_one_callback_may_be_given_without_a_list_to_the_learner_and_to_fit():
    class Count(Callback):
        n = 0

        def before_batch(self, learn):
            Count.n += learn.training

    x, y = make_tensors(4)
    learn = Learner(([(x, y)], None), make_model(), callbacks=Count()).fit(1)
    learn.remove_callback(Count).fit(1, callbacks=Count())  # type: ignore[arg-type]
    assert Count.n == 2


def test_a_learner_trains_on_the_given_device_and_moves_model_and_batches_there():
    learn = make_learner(device="cpu")
    assert learn.device == torch.device("cpu")
    assert all(p.device == learn.device for p in learn.model.parameters())


def test_a_data_bunch_and_a_pair_of_loaders_are_the_same_to_a_learner():
    x, y = make_tensors()
    batches = [(x, y)]
    model = make_model()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    values = []
    for data in ((batches, batches), [batches, batches], DataBunch(batches, batches)):
        model.load_state_dict(start)
        values.append(Learner(data, model).fit(2).recorder.values)
    assert values[0] == values[1] == values[2]


def test_fit_inside_a_fit_is_refused_and_says_what_to_do():
    class Nested(Callback):
        def after_epoch(self, learn):
            learn.fit(1)

    with pytest.raises(RuntimeError, match="while this Learner runs: let the fit under way end first"):
        make_learner(Nested()).fit(1)


@pytest.mark.parametrize("change", [lambda learn: learn.add_callback(Asserts())], ids=["add"])
def test_callbacks_cannot_be_added_while_the_hooks_are_resolved(change: Callable[[Learner], Any]):
    class Changes(Callback):
        def before_epoch(self, learn):
            change(learn)

    learn = make_learner(Changes())
    n = len(learn.callbacks)
    with pytest.raises(RuntimeError, match=r"Asserts was added while this Learner runs.*fit\(…, callbacks=\[…\]\)"):
        learn.fit(1)
    assert len(learn.callbacks) == n


# --- seeds -------------------------------------------------------------------
class Dropout(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))


def losses_with_dropout(seed: int | None, global_seed: int) -> list[float]:
    x, y = make_tensors()
    model = Dropout()
    torch.manual_seed(global_seed)
    return Learner(DataBunch.from_tensors((x, y), (x, y), bs=4), model, seed=seed).fit(2).recorder.losses


@pytest.mark.parametrize("seed, global_seeds, equal", [(7, (1, 2), True), (None, (1, 1), True), (None, (1, 2), False)])
def test_a_seed_makes_two_fits_equal_and_without_one_torchs_own_decides(
    seed: int | None, global_seeds: tuple[int, int], equal: bool
):
    runs = []
    for global_seed in global_seeds:
        torch.manual_seed(0)
        runs.append(losses_with_dropout(seed, global_seed))
    assert (runs[0] == runs[1]) is equal


def test_two_fits_of_one_seeded_learner_see_different_orders_and_masks():
    learn = make_learner(seed=3)
    orders = []

    class Order(Callback):
        def after_forward(self, learn):
            orders.append(learn.inputs[0][:, 0].tolist())  # type: ignore

    learn.fit(1, callbacks=[Order()])
    learn.fit(1, callbacks=[Order()])
    assert orders[:N_STEPS] != orders[N_STEPS + 1 : -1]


def test_a_file_of_a_float32_model_loads_into_a_float64_one_with_its_optimizer(tmp_path):
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    torch.manual_seed(0)
    single = Learner(([(x, y)], None), nn.Linear(3, 2), opt_func=torch.optim.NAdam, path=tmp_path).fit(1)
    single.save("single")
    double = Learner(
        ([(x.double(), y.double())], None), nn.Linear(3, 2).double(), opt_func=torch.optim.NAdam, path=tmp_path
    )
    kept = next(iter(double.load("single").fit(1).opt.state.values()))
    assert kept["exp_avg"].dtype == torch.float64 and kept["mu_product"].dtype == torch.float32
