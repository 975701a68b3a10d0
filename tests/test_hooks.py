"""The hook grammar: who is told what and in which order, under every way of leaving a stage."""

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import learnkit
from learnkit import Callback, DataBunch, Learner, SkipBatch, SkipStep, StopBatch, StopEpoch, StopFit, StopTrain
from learnkit.hooks import ControlFlow

STAGES = ("fit", "epoch", "train", "validate", "batch", "forward", "backward", "step")
HOOKS = [f"{word}_{stage}" for stage in STAGES for word in ("before", "around", "after")]
# Where a hook can raise: an around_ hook before it calls run(), and after.
PLACES = ("before", "opening", "closing", "after")
SIGNALS = [(kind, stage) for kind in ("Stop", "Skip") for stage in STAGES]


def logging_hook(hook: str) -> Callable[..., None]:
    """A hook that writes down that it was called, and gives the log's owner a chance to raise."""
    word, stage = hook.split("_")

    def tell(self: Any, learn: Learner) -> None:
        self.note(word, stage)

    def own(self: Any, learn: Learner, run: Callable[[], None]) -> None:
        self.log.append(f"{self.label}.{stage}[")
        try:
            self.note("opening", stage)
            run()
            self.note("closing", stage)
        finally:
            self.log.append(f"{self.label}.{stage}]")

    return own if word == "around" else tell


class LogBase(Callback):
    label, order = "", 0

    def __init__(self, log: list[str], label: str = "", order: int = 0) -> None:
        self.log, self.label, self.order = log, label, order
        self.raising: tuple[str, str, type[Exception]] | None = None

    def note(self, place: str, stage: str) -> None:
        if place in ("before", "after"):
            self.log.append(f"{self.label}.{place}_{stage}")
        if self.raising is not None and self.raising[:2] == (place, stage):
            error, self.raising = self.raising[2], None
            raise error


Log: type[LogBase] = type("Log", (LogBase,), {hook: logging_hook(hook) for hook in HOOKS})


def make_learner(*callbacks: Callback, valid: bool = True, n_train: int = 4) -> Learner:
    """Two training batches (of 2) an epoch, and one validation batch."""
    x, y = torch.randn(n_train, 3), torch.randint(2, (n_train,))
    data = DataBunch.from_tensors((x, y), (x[:2], y[:2]) if valid else None, bs=2)
    return Learner(data, nn.Linear(3, 2), callbacks=callbacks)


def words(text: str) -> list[str]:
    return text.split()


# --- a normal fit ------------------------------------------------------------
TRAIN_BATCH = """.before_batch .batch[
    .before_forward .forward[ .forward] .after_forward
    .before_backward .backward[ .backward] .after_backward
    .before_step .step[ .step] .after_step
    .batch] .after_batch """
VALID_BATCH = ".before_batch .batch[ .before_forward .forward[ .forward] .after_forward .batch] .after_batch "
TRAIN = f".before_train .train[ {TRAIN_BATCH * 2} .train] .after_train "
VALIDATE = f".before_validate .validate[ {VALID_BATCH} .validate] .after_validate "


def test_a_fit_with_validation_calls_all_24_hooks_in_the_documented_order():
    log: list[str] = []
    make_learner(Log(log)).fit(2)
    epoch = f".before_epoch .epoch[ {TRAIN} {VALIDATE} .epoch] .after_epoch "
    assert log == words(f".before_fit .fit[ {epoch * 2} .fit] .after_fit")
    told = {entry[1:] for entry in log if "_" in entry} | {f"around_{entry[1:-1]}" for entry in log if entry[-1] == "["}
    assert told == set(HOOKS)


def test_a_fit_without_validation_data_has_no_validate_stage():
    log: list[str] = []
    make_learner(Log(log), valid=False).fit(1)
    assert log == words(f".before_fit .fit[ .before_epoch .epoch[ {TRAIN} .epoch] .after_epoch .fit] .after_fit")


@pytest.mark.parametrize("method", ["fit_one_cycle", "fit_flat_cos", "fit_sgdr"])
def test_every_fit_method_runs_the_same_stages(method: str):
    logs: list[list[str]] = [[], []]
    make_learner(Log(logs[0])).fit(1)
    getattr(make_learner(Log(logs[1])), method)(1)
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "evaluate",
    [lambda learn: learn.validate(), lambda learn: learn.get_preds(), lambda learn: learn.predict(torch.randn(2, 3))],
    ids=["validate", "get_preds", "predict"],
)
def test_an_evaluation_outside_a_fit_is_a_validate_stage_alone(evaluate: Callable[[Learner], Any]):
    log: list[str] = []
    evaluate(make_learner(Log(log)))
    assert log == words(VALIDATE)


# --- order -------------------------------------------------------------------
def test_low_order_is_first_and_outermost_and_after_hooks_run_in_reverse():
    log: list[str] = []
    make_learner(Log(log, "late", 5), Log(log, "early", -5)).fit(1)
    step = [entry for entry in log if entry.endswith(("_step", "step[", "step]"))][:8]
    assert step == words(
        "early.before_step early.step[ late.before_step late.step[ "
        "late.step] late.after_step early.step] early.after_step"
    )


def test_equal_orders_keep_the_order_of_insertion_and_those_of_fit_come_last():
    log: list[str] = []
    learn = make_learner(Log(log, "a"), Log(log, "b")).add_callback(Log(log, "c"))
    learn.fit(1, callbacks=[Log(log, "d")])
    assert [entry for entry in log if entry.endswith("_fit")] == words(
        "a.before_fit b.before_fit c.before_fit d.before_fit d.after_fit c.after_fit b.after_fit a.after_fit"
    )
    assert [entry for entry in log if entry.endswith("fit[")] == words("a.fit[ b.fit[ c.fit[ d.fit[")


def test_the_callbacks_of_one_fit_are_gone_in_the_next():
    log: list[str] = []
    learn = make_learner()
    learn.fit(1, callbacks=[Log(log)])
    n = len(log)
    learn.fit(1)
    assert len(log) == n > 0


# --- around_ owns its stage --------------------------------------------------
class AroundStep(Callback):
    def __init__(self, times: int) -> None:
        self.times = times

    def around_step(self, learn: Learner, run: Callable[[], None]) -> None:
        for _ in range(self.times):
            run()


@pytest.mark.parametrize("order, told", [(-1_000, 0), (1_000, 2)], ids=["outermost", "innermost"])
def test_an_around_hook_that_does_not_call_run_leaves_out_the_stage_and_all_further_in(order: int, told: int):
    log: list[str] = []
    never = AroundStep(0)
    never.order = order
    learn = make_learner(never, Log(log))
    before = learn.model.get_parameter("weight").clone()
    learn.fit(1)
    assert torch.equal(learn.model.get_parameter("weight"), before) and learn.step == 0
    assert [log.count(f".{name}") for name in ("before_step", "step[", "step]", "after_step")] == [told] * 4
    assert log.count(".after_batch") == 3


@pytest.mark.parametrize("order, times", [(-1_000, 4), (1_000, 2)], ids=["outermost", "innermost"])
def test_an_around_hook_that_calls_run_twice_repeats_the_stage_and_all_further_in(order: int, times: int):
    log: list[str] = []
    twice = AroundStep(2)
    twice.order = order
    assert make_learner(twice, Log(log)).fit(1).step == 4
    assert [log.count(f".{name}") for name in ("before_step", "step[", "step]", "after_step")] == [times] * 4


def test_an_around_hook_may_repeat_its_stage():
    class Twice(Callback):
        def around_batch(self, learn, run):
            run()
            if learn.training:
                run()

    x, y = torch.randn(4, 3), torch.randn(4, 1)
    model = nn.Linear(3, 1)
    hand = nn.Linear(3, 1)
    hand.load_state_dict(model.state_dict())
    learn = Learner(
        ([(x[:2], y[:2]), (x[2:], y[2:])], None), model, opt_func=torch.optim.SGD, wd=0.0, lr=0.1, callbacks=Twice()
    ).fit(1)
    for i in (0, 0, 2, 2):
        nn.functional.mse_loss(hand(x[i : i + 2]), y[i : i + 2]).backward()
        with torch.no_grad():
            for p in hand.parameters():
                p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]
        hand.zero_grad()
    assert learn.step == 4
    for p, q in zip(model.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_an_around_hook_may_replace_the_forward_pass():
    class Constant(Callback):
        def around_forward(self, learn, run):
            learn.pred = learn.model(*learn.inputs) * 0 + 3.0
            learn.loss = nn.functional.mse_loss(learn.pred, torch.full_like(learn.pred, 5.0))

    x = torch.randn(4, 3)
    learn = Learner(([(x, x[:, :1])], [(x, x[:, :1])]), nn.Linear(3, 1)).fit(1, callbacks=[Constant()])
    assert learn.recorder.losses == [4.0] and learn.values["valid_loss"] == 4.0


def test_the_innermost_around_hook_of_a_stage_runs_inside_the_others():
    depth: list[int] = []

    class Bracket(Callback):
        n = 0

        def around_backward(self, learn, run):
            Bracket.n += 1
            depth.append(Bracket.n)
            try:
                run()
            finally:
                Bracket.n -= 1

    make_learner(Bracket(), Bracket(), Bracket()).fit(1)
    assert depth == [1, 2, 3] * 2 and Bracket.n == 0


# --- Stop* and Skip* ---------------------------------------------------------
class Leave(Exception):
    def __init__(self, kind: str, stage: str) -> None:
        self.kind, self.stage = kind, stage


def repeat(run: Callable[[], None]) -> None:
    for _ in range(2):
        run()


class Table:
    """The table of learnkit.hooks once more, for three callbacks a, r, b of which r raises once."""

    def __init__(self, place: str, stage: str, leave: Leave) -> None:
        self.raising: tuple[str, str] | None = (place, stage)
        self.leave, self.log = leave, []

    def note(self, label: str, place: str, stage: str) -> None:
        if place in ("before", "after"):
            self.log.append(f"{label}.{place}_{stage}")
        if label == "r" and self.raising == (place, stage):
            self.raising = None
            raise self.leave

    def stage(self, stage: str, body: Callable[[], None]) -> None:
        waiting: list[Leave] = []
        try:
            self.layers("arb", stage, body, waiting)
        except Leave as leave:
            if leave.stage != stage:
                raise
        if waiting:
            raise waiting[0]

    def layers(self, labels: str, stage: str, body: Callable[[], None], waiting: list[Leave]) -> None:
        if not labels:
            return body()
        label, inner = labels[0], labels[1:]
        try:
            self.note(label, "before", stage)
            self.log.append(f"{label}.{stage}[")
            try:
                self.note(label, "opening", stage)
                self.layers(inner, stage, body, waiting)
                self.note(label, "closing", stage)
            finally:
                self.log.append(f"{label}.{stage}]")
        except Leave as leave:
            if (leave.kind, leave.stage) == ("Stop", stage):
                self.tell(label, stage, waiting)  # those further in that were never reached are not called
            raise
        self.tell(label, stage, waiting)

    def tell(self, labels: str, stage: str, waiting: list[Leave]) -> None:
        for label in labels:
            try:
                self.note(label, "after", stage)
            except Leave as leave:
                if leave.stage != stage:
                    waiting.append(leave)

    def fit(self) -> None:
        self.stage("fit", lambda: repeat(lambda: self.stage("epoch", self.epoch)))

    def epoch(self) -> None:
        self.stage("train", lambda: repeat(lambda: self.stage("batch", lambda: self.batch(True))))
        self.stage("validate", lambda: self.stage("batch", lambda: self.batch(False)))

    def batch(self, training: bool) -> None:
        computed: list[bool] = []
        self.stage("forward", lambda: computed.append(True))
        if training and computed:  # without a prediction there is nothing to learn from
            self.stage("backward", lambda: None)
            self.stage("step", lambda: None)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind, stage", SIGNALS, ids=[kind + stage.title() for kind, stage in SIGNALS])
def test_leaving_a_stage_early_follows_the_table(kind: str, stage: str, place: str):
    """From hooks of every stage: an inner one, its own, or one outside of it, where the signal is an error."""
    signal = getattr(learnkit, kind + stage.title())
    for raised_in in STAGES:
        if (kind, raised_in, stage, place) == ("Skip", "forward", "forward", "closing"):
            continue  # has its own test
        table, log = Table(place, raised_in, Leave(kind, stage)), []
        learn = make_learner(raiser := Log(log, "r"), Log(log, "b", 5), Log(log, "a", -5))
        raiser.raising = (place, raised_in, signal)
        try:
            table.fit()
        except Leave:
            with pytest.raises(RuntimeError, match=f"{signal.__name__} was raised where no {stage} stage is under way"):
                learn.fit(2)
        else:
            assert learn.fit(2) is learn
        assert log == table.log, f"{signal.__name__} from {place}_{raised_in}"


def test_stop_batch_before_the_forward_pass_is_told_and_the_next_batch_runs():
    log: list[str] = []
    raiser = Log(log)
    raiser.raising = ("before", "forward", StopBatch)
    make_learner(raiser, valid=False).fit(1)
    assert log == words(
        f".before_fit .fit[ .before_epoch .epoch[ .before_train .train[ "
        f".before_batch .batch[ .before_forward .batch] .after_batch {TRAIN_BATCH} "
        ".train] .after_train .epoch] .after_epoch .fit] .after_fit"
    )


def test_skip_batch_is_not_told_and_the_next_batch_runs():
    log: list[str] = []
    raiser = Log(log)
    raiser.raising = ("before", "backward", SkipBatch)
    make_learner(raiser, valid=False).fit(1)
    forward = ".before_forward .forward[ .forward] .after_forward"
    assert log == words(
        f".before_fit .fit[ .before_epoch .epoch[ .before_train .train[ "
        f".before_batch .batch[ {forward} .before_backward .batch] {TRAIN_BATCH} "
        ".train] .after_train .epoch] .after_epoch .fit] .after_fit"
    )


def test_a_stop_raised_by_an_after_hook_waits_until_the_other_after_hooks_were_told():
    log: list[str] = []
    first, second = Log(log, "first"), Log(log, "second")
    second.raising = ("after", "batch", StopFit)  # told before `first`
    make_learner(first, second).fit(3)
    assert [
        entry for entry in log if "after" in entry and not entry.endswith(("forward", "backward", "step"))
    ] == words("second.after_batch first.after_batch second.after_fit first.after_fit")


def test_of_two_signals_of_after_hooks_the_first_one_counts_and_nobody_is_left_out():
    log: list[str] = []
    first, second, third = (Log(log, label) for label in ("first", "second", "third"))
    third.raising, second.raising = ("after", "train", StopEpoch), ("after", "train", StopFit)
    make_learner(first, second, third).fit(2)
    assert log.count("first.after_train") == 2 and log.count("first.after_epoch") == 2


def test_skip_step_leaves_the_weights_and_the_count_of_steps():
    class Never(Callback):
        def before_step(self, learn):
            raise SkipStep

    learn = make_learner(Never())
    before = learn.model.get_parameter("weight").clone()
    learn.fit(1)
    assert torch.equal(learn.model.get_parameter("weight"), before) and learn.step == 0 and learn.recorder.losses == []


def test_skipping_every_second_step_accumulates_gradients():
    class EverySecond(Callback):
        def before_step(self, learn):
            if learn.batch_index % 2 == 0:
                raise SkipStep

    x, y = torch.randn(4, 3), torch.randn(4, 1)
    model = nn.Linear(3, 1)
    start = [p.detach().clone() for p in model.parameters()]
    Learner(
        ([(x[:2], y[:2]), (x[2:], y[2:])], None),
        model,
        opt_func=torch.optim.SGD,
        lr=0.1,
        wd=0.0,
        callbacks=EverySecond(),
    ).fit(1)
    w, b = (p.requires_grad_() for p in start)
    grads = torch.autograd.grad(2 * nn.functional.mse_loss(x @ w.T + b, y), (w, b))
    for p, s, g in zip(model.parameters(), start, grads, strict=True):
        torch.testing.assert_close(p, s - 0.1 * g)


def test_a_skipped_forward_pass_is_not_learned_from_even_after_it_ran():
    class Late(Callback):
        def around_forward(self, learn, run):
            run()
            raise learnkit.SkipForward

    learn = make_learner(Late(), valid=False)
    before = learn.model.get_parameter("weight").clone()
    learn.fit(1)
    assert torch.equal(learn.model.get_parameter("weight"), before)


def test_stop_fit_leaves_a_learner_that_fits_again():
    class StopAtOnce(Callback):
        def before_batch(self, learn):
            raise StopFit

    learn = make_learner()
    learn.fit(5, callbacks=[StopAtOnce()])
    assert learn.step == 0
    assert learn.fit(2).step == 4


def test_stop_train_goes_on_with_validation_and_the_next_epoch():
    class Short(Callback):
        def after_batch(self, learn):
            if learn.training:
                raise StopTrain

    learn = make_learner()
    learn.fit(3, callbacks=[Short()])
    assert learn.step == 3 and len(learn.recorder.values) == 3


@pytest.mark.parametrize("kind, stage", SIGNALS, ids=[kind + stage.title() for kind, stage in SIGNALS])
def test_every_signal_is_exported_and_a_signal_of_no_stage_under_way_is_an_error_outside_a_fit_too(
    kind: str, stage: str
):
    signal = getattr(learnkit, kind + stage.title())

    class Raises(Callback):
        def before_forward(self, learn):
            raise signal

    learn = make_learner(Raises())
    if stage in ("validate", "batch", "forward"):
        learn.validate()
    else:
        with pytest.raises(RuntimeError, match=rf"{signal.__name__} .*no {stage} stage"):
            learn.validate()
    assert learn.model.training


# --- definition --------------------------------------------------------------
def define(name: str, value: Any) -> None:
    type("Mine", (Callback,), {name: value})


@pytest.mark.parametrize(
    "name, near",
    [
        ("before_bacth", "before_batch"),
        ("after_epcoh", "after_epoch"),
        ("around_fti", "around_fit"),
        ("before_forwrad", "before_forward"),
        ("after_batches", "after_batch"),
        ("before_epochs", "before_epoch"),
        ("after_validation", "after_validate"),
        ("around_steps", "around_step"),
        ("before_training", "before_train"),
        ("befor_epoch", "before_epoch"),
        ("beforebatch", "before_batch"),
        ("after_Batch", "after_batch"),
        ("arround_batch", "around_batch"),
    ],
)
def test_a_misspelt_hook_is_refused_when_the_class_is_defined_with_the_near_name(name: str, near: str):
    with pytest.raises(TypeError, match=rf"Mine\.{name} is not a hook: did you mean {near}\?"):
        define(name, lambda self, learn: None)


@pytest.mark.parametrize("name", ["before_lunch", "after_all", "around_the_world"])
def test_a_method_that_begins_like_a_hook_and_is_none_is_refused_with_the_list_of_stages(name: str):
    with pytest.raises(
        TypeError, match=rf"Mine\.{name} is not a hook.*fit, epoch, train, validate, batch, forward, backward, step"
    ):
        define(name, lambda self, learn: None)


def generator(self: Any, learn: Any, run: Any):
    yield


async def coroutine(self: Any, learn: Any): ...
async def async_generator(self: Any, learn: Any):
    yield


NEVER_CALLABLE = {
    "no learn": ("before_fit", lambda self: None, r"cannot be called as a hook: expected before_fit\(self, learn\)"),
    "no self": ("before_fit", lambda: None, r"expected before_fit\(self, learn\)"),
    "run for a teller": ("after_step", lambda self, learn, run: None, r"expected after_step\(self, learn\)"),
    "no run": ("around_batch", lambda self, learn: None, r"expected around_batch\(self, learn, run\)"),
    "one too many": ("around_batch", lambda self, learn, run, more: None, r"expected around_batch\(self, learn, run\)"),
    "run by keyword only": (
        "around_batch",
        lambda self, learn, *, run: None,
        r"expected around_batch\(self, learn, run\)",
    ),
    "generator": ("around_epoch", generator, r"generator.*around_epoch\(self, learn, run\).*run\(\)"),
    "coroutine": ("after_epoch", coroutine, r"coroutine.*after_epoch\(self, learn\)"),
    "async generator": ("after_epoch", async_generator, r"generator or coroutine"),
    "static": (
        "before_batch",
        staticmethod(lambda learn: None),
        r"staticmethod.*plain method before_batch\(self, learn\)",
    ),
    "class method": (
        "before_batch",
        classmethod(lambda cls, learn: None),
        r"classmethod.*plain method before_batch\(self, learn\)",
    ),
    "property": ("before_batch", property(lambda self: None), r"property.*plain method before_batch\(self, learn\)"),
    "None": ("before_batch", None, r"before_batch\(self, learn\)"),
    "number": ("after_fit", 3, r"after_fit\(self, learn\)"),
}


@pytest.mark.parametrize("name, value, complaint", NEVER_CALLABLE.values(), ids=NEVER_CALLABLE)
def test_a_hook_that_could_never_be_called_is_refused_when_the_class_is_defined(name: str, value: Any, complaint: str):
    with pytest.raises(TypeError, match=rf"Mine\.{name}.*{complaint}"):
        define(name, value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("before_fit", lambda self, learn, extra=None: None),
        ("around_fit", lambda self, *args: args[1]()),
        ("after_fit", lambda self, learner, **options: None),
        ("_before_anything", lambda self: None),
        ("reset", lambda self: None),
        ("on_epoch_end", lambda self: None),
        ("before_counts", 0),
        ("batch", lambda self: None),
        ("fit", lambda self: None),
    ],
)
def test_what_can_be_called_as_a_hook_and_names_unlike_hooks_are_accepted(name: str, value: Any):
    define(name, value)


def test_a_misspelt_hook_of_a_mixin_is_refused_where_it_joins_a_callback():
    class Mixin:
        def befor_step(self, learn): ...

    with pytest.raises(TypeError, match=r"Mixin\.befor_step is not a hook: did you mean before_step\?"):
        type("Mine", (Mixin, Callback), {})


def test_hooks_of_mixins_and_of_base_classes_are_called_once():
    calls: list[str] = []

    class Mixin:
        def before_fit(self, learn):
            calls.append("mixin")

    class Base(Callback):
        def after_fit(self, learn):
            calls.append("base")

    class Mine(Mixin, Base):
        def before_epoch(self, learn):
            calls.append("mine")

    make_learner(Mine()).fit(1)
    assert calls == ["mixin", "mine", "base"]


# --- who runs when -----------------------------------------------------------
class Early(Callback):
    order = -50

    def before_fit(self, learn): ...
    def after_fit(self, learn): ...


class Late(Callback):
    order = Early.order + 500

    def before_fit(self, learn): ...
    def after_fit(self, learn): ...
    def around_step(self, learn, run):
        run()


def test_hooks_shows_for_each_hook_the_callbacks_in_the_order_of_their_calls():
    table = make_learner(Late(), Early()).hooks()
    assert [name for name in table["before_fit"] if name in ("Early", "Late")] == ["Early", "Late"]
    assert [name for name in table["after_fit"] if name in ("Early", "Late")] == ["Late", "Early"]
    assert table["around_step"] == ["Late"]
    assert "around_backward" not in table
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines] == [hook for hook in HOOKS if hook in table]
    assert next(line for line in lines if line.startswith("around_step")).split() == ["around_step", "Late"]


def test_hooks_lists_what_every_learner_has_and_add_and_remove_change_it():
    learn = make_learner()
    assert "Recorder" in learn.hooks()["after_step"]
    callback = Late()
    assert "Late" in learn.add_callback(callback).hooks()["before_fit"]
    assert "Late" not in learn.remove_callback(callback).hooks()["before_fit"]
    learn.add_callback(callback)
    assert "around_step" not in learn.remove_callback(Late).hooks()


# --- cost --------------------------------------------------------------------
def calls_of_a_fit(n_batches: int, n_idle: int, idle: type[Callback]) -> int:
    """Python functions called by a fit of so many batches."""
    learn = make_learner(*(idle() for _ in range(n_idle)), n_train=2 * n_batches)
    learn.fit(1)
    n = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal n
        n += event == "call"

    gc.collect()  # else a collection that falls into the fit calls what earlier tests have left
    gc.disable()
    with learn.no_logging():
        sys.setprofile(count)
        try:
            learn.fit(1)
        finally:
            sys.setprofile(None)
            gc.enable()
    return n


class Idle(Callback): ...


class OncePerFit(Callback):
    def before_fit(self, learn): ...


@pytest.mark.parametrize("callback", [Idle, OncePerFit])
def test_hooks_that_nobody_uses_cost_no_call_per_step(callback: type[Callback]):
    calls_of_a_fit(12, 10, callback)  # what is called once a process, such as checks of types that are then remembered
    per_step = [calls_of_a_fit(12, n, callback) - calls_of_a_fit(4, n, callback) for n in (0, 10)]
    assert per_step[0] == per_step[1] > 0


def test_a_told_hook_costs_one_call_per_step():
    class Told(Callback):
        def before_step(self, learn): ...

    per_step = [calls_of_a_fit(12, n, Told) - calls_of_a_fit(4, n, Told) for n in (0, 1, 2)]
    assert [per_step[1] - per_step[0], per_step[2] - per_step[1]] == [8, 8]


class BatchLog(Callback):
    """Writes down what it is told of a batch."""

    def __init__(self, name, log, order):
        self.name, self.log, self.order = name, log, order

    def after_batch(self, learn):
        self.log.append(f"{self.name} {learn.batch_index}")


class Owner(Callback):
    """Sees what comes out of a batch, and may do something about it."""

    order = -100

    def __init__(self, instead=None):
        self.seen, self.instead = [], instead

    def around_batch(self, learn, run):
        try:
            run()
        except ControlFlow as signal:
            self.seen.append(type(signal))
            if self.instead is not None:
                raise self.instead from None


class StopsAfterwards(Callback):
    order = 5

    def after_batch(self, learn):
        if learn.training and learn.batch_index == 1:
            raise StopEpoch


@pytest.mark.parametrize("instead, n_batches", [(None, 4), (StopTrain(), 2), (StopFit(), 2)])
def test_a_signal_of_an_after_hook_reaches_owners_further_out_once_all_further_in_were_told(instead, n_batches):
    log, owner = [], Owner(instead)
    callbacks = [BatchLog("inner", log, 10), StopsAfterwards(), BatchLog("outer", log, -10), owner]
    learn = Learner(
        DataBunch.from_tensors((torch.randn(8, 2), torch.randn(8, 2)), bs=2), nn.Linear(2, 2), callbacks=callbacks
    )
    with learn.no_logging():
        learn.fit(1)
    assert owner.seen == [StopEpoch]
    assert log == [f"{name} {i}" for i in range(n_batches) for name in ("inner", "outer")]


class ValidatesAfterwards(Callback):
    order = -50  # told after the one that wants to stop

    def after_batch(self, learn):
        if learn.training:
            learn.validate()


def test_a_stop_that_waits_does_not_leak_into_an_evaluation_of_a_later_hook():
    data = DataBunch.from_tensors((torch.randn(8, 2), torch.randn(8, 2)), (torch.randn(6, 2), torch.randn(6, 2)), bs=2)
    log = []
    learn = Learner(
        data, nn.Linear(2, 2), callbacks=[StopsAfterwards(), ValidatesAfterwards(), BatchLog("seen", log, 10)]
    )
    with learn.no_logging():
        learn.fit(1)
    assert log == ["seen 0", *(f"seen {i}" for i in range(3)), "seen 1", *(f"seen {i}" for i in range(3))]
