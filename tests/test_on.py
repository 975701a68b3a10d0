"""learn.on: a function becomes a callback, is called when it is due, and can be taken off again."""

import pytest
import torch
from torch import nn

from learnkit import Callback, DataBunch, Learner, StopFit
from learnkit.callbacks import Checkpoint


def learner(*callbacks: Callback) -> Learner:
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    return Learner(DataBunch.from_tensors((x, y), (x, y), bs=4, seed=1), nn.Linear(3, 2), callbacks=callbacks)


@pytest.mark.parametrize(
    "hook, every, expected",
    [
        ("after_step", 4, [4, 8, 12]),
        ("before_step", 4, [3, 7, 11]),
        ("after_epoch", 2, [10]),
        ("after_batch", 5, [5, 5, 10, 10, 15, 15]),
        ("after_train", 1, [5, 10, 15]),
        ("before_fit", 1, [0]),
    ],
)
def test_a_function_is_called_at_each_so_manieth(hook, every, expected):
    learn, steps = learner(), []

    @learn.on(hook, every=every)
    def note(learn):
        steps.append(learn.step)

    learn.fit(3)
    assert steps == expected


def test_it_owns_a_stage_at_each_so_manieth_and_lets_the_others_pass():
    learn, log = learner(), []

    @learn.on("around_step", every=2)
    def owned(learn, run):
        log.append(learn.step)
        run()

    learn.fit(1)
    assert log == [1, 3] and learn.step == 5


def test_a_handle_can_be_called_and_removed_once():
    learn, calls = learner(), []

    @learn.on("after_epoch")
    def note(learn):
        calls.append(1)

    note(learn)
    assert "note" in str(learn.hooks())
    learn.fit(1)
    note.remove()
    learn.fit(1)
    assert len(calls) == 2 and "note" not in str(learn.hooks())
    with pytest.raises(ValueError, match="there is no note to remove"):
        note.remove()


def test_it_may_stop_the_fit_and_is_blamed_by_its_name():
    learn = learner()

    @learn.on("after_step")
    def stop(learn):
        if learn.step == 3:
            raise StopFit

    assert learn.fit(9).step == 3
    stop.remove()

    @learn.on("after_step")
    def fails(learn):
        raise LookupError("lost")

    with pytest.raises(LookupError) as caught:
        learn.fit(1)
    assert "raised in fails.after_step" in "".join(caught.value.__notes__)


def test_its_order_and_part_in_trials_can_be_chosen():
    learn, log = learner(), []
    for name, order in (("second", 5), ("first", -5)):
        learn.on("before_epoch", order=order)(lambda learn, name=name: log.append(name))
    learn.on("after_step", in_trials=False)(lambda learn: log.append("step"))
    learn.lr_find(num_it=2)
    assert log == ["first", "second"]


def test_a_resumed_fit_calls_it_at_the_same_steps():
    def run(*callbacks, resume=False):
        learn, steps = learner(Checkpoint("kept", every_n_steps=2), *callbacks), []
        learn.on("after_step", every=3)(lambda learn: steps.append(learn.step))
        learn.fit(2, resume=resume)
        return steps

    class Dies(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn):
            if learn.training and learn.step == 4:
                raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        run(Dies())
    assert run(resume=True) == [6, 9]


def test_wrong_hooks_and_functions_are_refused_at_once():
    learn = learner()
    with pytest.raises(ValueError, match=r"'after_steps' is not a hook: did you mean after_step\?"):
        learn.on("after_steps")
    with pytest.raises(ValueError, match="every=0"):
        learn.on("after_step", every=0)
    with pytest.raises(TypeError, match=r"note\(\) cannot be called as a hook: expected note\(learn\)"):

        @learn.on("after_step")
        def note(): ...

    with pytest.raises(TypeError, match=r"expected owns\(learn, run\)"):

        @learn.on("around_step")
        def owns(learn): ...
