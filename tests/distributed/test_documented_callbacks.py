"""The ten examples of docs/callbacks.md train on two processes as on one."""

import io
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch

from learnkit import Learner
from learnkit.devices.dtensor import whole
from learnkit.distributed import get_world_size
from tests.pages import Block, Page, form

PAGE = Page("docs/callbacks.md")
START, END = PAGE.text.index("## Ten examples"), PAGE.text.index("## When something is wrong")
SETTING, *EXAMPLES = [block for block in PAGE.blocks if block.language == "python" and block.start < END]


def run(how: str) -> list[Any]:
    """Of each example what it prints, the losses, and the weights at the end."""
    torch.set_default_dtype(torch.float64)
    learners: list[Learner] = []
    namespace: dict[str, Any] = {"__name__": "__main__"}
    source = SETTING.code.replace("bs=50", f"bs={50 // get_world_size()}")
    assert source != SETTING.code or get_world_size() == 1
    exec(source, namespace)
    new = namespace["new_learner"]

    def new_learner(*args: Any, **options: Any) -> Learner:
        learn = new(*args, **options)
        learners.append(learn if how == "alone" else getattr(learn, how)())
        return learners[-1]

    namespace["new_learner"] = new_learner
    return [
        None if how == "to_fsdp" and "LBFGS" in example.code else result(example, namespace, learners)
        for example in EXAMPLES
    ]


def result(example: Block, namespace: dict[str, Any], learners: list[Learner]) -> Any:
    learners.clear()
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(example.code, f"docs/callbacks.md:{example.line}", "exec"), namespace)
    [learn] = learners
    weights = torch.cat([whole(p.detach()).flatten() for p in learn.model.parameters()]).tolist()
    return form(printed.getvalue()), [float(loss) for loss in learn.recorder.losses], weights


def test_there_are_ten_and_the_setting():
    assert len(EXAMPLES) == 10 and SETTING.start < START < EXAMPLES[0].start


@pytest.fixture(scope="module")
def alone() -> Any:
    try:
        return run("alone")
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["to_distributed", "to_fsdp"])
def test_each_example_trains_on_two_processes_as_on_one(how, alone, ranks):
    first, second = ranks(2, run, how, timeout=120)
    assert all(a == b or a[2] == b[2] for a, b in zip(first, second, strict=True))
    for rank, share in enumerate((first, second)):
        for number, (ours, theirs) in enumerate(zip(share, alone, strict=True), 1):
            if ours is None:
                continue  # what test_spread.py shows to be refused
            (printed, losses, weights), (printed_alone, losses_alone, weights_alone) = ours, theirs
            assert rank or printed == printed_alone, number
            assert losses == pytest.approx(losses_alone, abs=1e-6), number  # which are kept as float32
            assert weights == pytest.approx(weights_alone, rel=1e-6, abs=1e-6), (
                number
            )  # L-BFGS makes 1e-7 of a rounding
