"""Python calls per training step, exactly, so that they cannot creep up. Seconds are measured in
benchmarks/step_cost.py.
"""

import gc
import io
import sys
from collections import Counter
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import learnkit
from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import Progress, Recorder

HOME = {
    str(Path(learnkit.__file__).resolve().parent),
    str(Path(sys.modules["learnkit.callbacks"].__file__ or "").resolve().parent),
}
BATCH = (torch.randn(8, 16), torch.randint(2, (8,)))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@cache
def is_ours(file: str) -> bool:
    return any(str(Path(file).resolve()).startswith(home) for home in HOME)


def calls(work) -> Counter[str]:
    """The Python functions that are called (generators resumed included), those of torch and of learnkit alike."""
    names: Counter[str] = Counter()

    def see(frame, event, arg):
        if event == "call":
            names[frame.f_code.co_name if is_ours(frame.f_code.co_filename) else "others"] += 1

    gc.collect()  # what other tests have left is not collected in the middle, whose finalizers would count
    gc.disable()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return names


def model():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def per_step(fit_of_n) -> Counter[str]:
    """What ten steps more call, by ten."""
    counts = []
    for n in (4, 14):
        fit = fit_of_n(n)
        fit()
        counts.append(calls(fit))
    more = Counter({name: counts[1][name] - counts[0][name] for name in counts[1]})
    return Counter({name: n / 10 for name, n in more.items() if n})


def by_hand(n):
    net = model()

    def fit():
        opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
        for x, y in [BATCH] * n:
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()

    return fit


def learner(n, valid=None, **options):
    return Learner(
        DataBunch([BATCH] * n, valid),
        model(),
        loss_func=F.cross_entropy,
        opt_func=partial(torch.optim.SGD, momentum=0.9),
        wd=0.0,
        **options,
    )


def bare(n, callbacks=()):
    learn = learner(n, callbacks=callbacks).remove_callback(Progress).remove_callback(Recorder)
    return lambda: learn.fit(1, 0.1)


def default(n):
    learn = learner(n, valid=[BATCH], metrics=accuracy)

    def fit():
        with redirect_stdout(Terminal()):
            learn.fit_one_cycle(1, 0.1)

    return fit


def test_a_step_without_extras_makes_eleven_calls_of_ours_and_fewer_than_by_hand():
    ours, hand = per_step(bare), per_step(by_hand)
    assert ours - Counter(others=ours["others"]) == {
        "_feed": 1,
        "split_batch": 1,
        "run_layer": 4,
        "_batch": 1,
        "_forward": 1,
        "_backward": 1,
        "_step": 1,
        "zero_grad": 1,
        "decay_weights": 1,
    }
    assert sum(ours.values()) <= sum(hand.values())


def test_bar_recorder_and_one_cycle_add_eight_calls():
    added = per_step(default) - per_step(bare)
    when_the_bar_is_due = {
        "others",
        "advance",
        "loss_so_far",
        "follow_loss",
        "losses_since",
        "since",
        "fold",
        "<genexpr>",
        "<listcomp>",
        "__init__",
        "has_arrived",
        "tolist",
    }
    when_the_table_is_made = {"__call__", "_check_progress", "_cosine"}  # before the first step
    assert {name: n for name, n in added.items() if name not in when_the_bar_is_due | when_the_table_is_made} == {
        "before_step": 1,
        "set_hyper": 1,
        "after_step": 1,
        "append": 1,
        "count_samples": 1,
        "after_batch": 1,
        "call_afters": 2,
    }


def test_ten_idle_callbacks_cost_no_call():
    class Idle(Callback):
        def before_epoch(self, learn):
            pass

    assert per_step(partial(bare, callbacks=[Idle() for _ in range(10)])) == per_step(bare)


@pytest.mark.parametrize(("hook", "cost"), [("before_batch", 1), ("before_forward", 1), ("after_step", 2)])
def test_a_hook_costs_its_own_call_and_the_first_after_hook_of_a_stage_one_more(hook, cost):
    told = type("Told", (Callback,), {hook: lambda self, learn: None})
    assert sum(per_step(partial(bare, callbacks=[told()])).values()) == sum(per_step(bare).values()) + cost
