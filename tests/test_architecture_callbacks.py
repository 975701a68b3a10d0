"""Callbacks are independent of each other: a callback module imports another one for its place in the order only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for path in (ROOT / "callbacks").glob("*.py") if path.stem != "__init__")

# (module, name of another callback) -> why the module may look for it among the callbacks of a fit.
PLACED = {
    ("auto_microbatch", "Distributed"): "it refuses sync_bn: a rank out of memory would leave the others waiting",
    ("progress", "Recorder"): "it draws the recorded losses and values, where a fit has a Recorder",
    ("reduce_lr_on_plateau", "ParamScheduler"): "it refuses a schedule of the rate, which would replace its rates",
    ("sam", "AutoMicrobatch"): "it is refused: the second pass needs the whole batch",
    ("sam", "MixedPrecision"): "float16 is refused: the gradients of the first pass overflow at times",
    ("sam", "ReduceAfterwards"): "it is refused: the first pass needs the gradients of all ranks",
}
# "join" is how a Learner joins the other ranks: it adds the callbacks of to_distributed and to_fsdp. "distributed"
# shows the loss of all ranks in the bar; "fully_shard" refuses other callbacks by their class.
ALLOWED_ANYTHING = {"join", "distributed", "fully_shard"}


def imported_callbacks(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name in this module, module of the callback) of every import of a callback module, also within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("learnkit.callbacks"):
            yield from ((alias.asname or alias.name, node.module or "") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                (alias.asname or alias.name, alias.name)
                for alias in node.names
                if alias.name.startswith("learnkit.callbacks")
            )


def class_names(module: str) -> set[str]:
    """The classes of a callback module that are callbacks."""
    tree = ast.parse((ROOT / "callbacks" / f"{module.rpartition('.')[2]}.py").read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["Callback"]
    }


def uses(tree: ast.Module, name: str) -> set[str]:
    """How a name is used: "order", as in Name.order; "isinstance", as a class of it; "other"."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    return {use_of(node, parents) for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name}


def use_of(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return "order" if parent.attr == "order" else "other"
    if isinstance(parent, ast.Tuple):
        node, parent = parent, parents[parent]
    is_class_of_isinstance = (
        isinstance(parent, ast.Call) and ast.unparse(parent.func) == "isinstance" and parent.args[1:] == [node]
    )
    return "isinstance" if is_class_of_isinstance else "other"


def broken_by(source: str, module: str) -> tuple[list[str], set[tuple[str, str]]]:
    """(names that are imported for something else, the isinstance checks)."""
    tree = ast.parse(source)
    wrong, placed = [], set()
    for name, origin in imported_callbacks(tree):
        found = uses(tree, name)
        if origin == "learnkit.callbacks" or name not in class_names(origin) or "other" in found:
            wrong.append(name)
        elif "isinstance" in found:
            placed.add((module, name))
    return wrong, placed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_callback_imports_another_one_for_its_order_or_to_look_for_it(path: Path):
    if path.stem in ALLOWED_ANYTHING:
        return
    wrong, placed = broken_by(path.read_text(encoding="utf-8"), path.stem)
    assert wrong == [], "move what is shared to the folder in learnkit/ that it belongs to"
    assert placed == {place for place in PLACED if place[0] == path.stem}, (
        "a reason is missing in PLACED, or not needed"
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_callback_imports_python_torch_and_learnkit_alone(path: Path):
    """Other packages are imported in the functions that need them, or for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "learnkit"}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), "imports are absolute"


@pytest.mark.parametrize(
    ("lines", "wrong", "placed"),
    [
        ("from learnkit.callbacks.ema import EMA\norder = EMA.order + 10", [], set()),
        ("from learnkit.callbacks.recorder import Recorder\nisinstance(cb, Recorder)", [], {("own", "Recorder")}),
        ("from learnkit.callbacks.ema import EMA\nfound = isinstance(cb, (int, EMA))", [], {("own", "EMA")}),
        ("def f():\n    from learnkit.callbacks.ema import EMA\n    return EMA()", ["EMA"], set()),
        ("from learnkit.callbacks.ema import EMA\nclass Own(EMA): pass", ["EMA"], set()),
        ("from learnkit.callbacks.swa import Cumulative\nx = Cumulative.order", ["Cumulative"], set()),
        ("from learnkit.callbacks import EMA\norder = EMA.order", ["EMA"], set()),
    ],
)
def test_the_rule_finds_what_breaks_it(lines: str, wrong: list[str], placed: set[tuple[str, str]]):
    assert broken_by(lines, "own") == (wrong, placed)
