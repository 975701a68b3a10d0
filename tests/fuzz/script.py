"""A failure as a script that needs nothing but learnkit: what the configuration uses of these files is copied into
it.
"""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

from tests.fuzz import (
    between,
    callbacks,
    compare,
    interruptions,
    isolate,
    learner_source,
    lives,
    models,
    optimizers,
    sources,
    spreads,
)
from tests.fuzz.configuration import Configuration, Interruption
from tests.fuzz.interruptions import INTERRUPTIONS
from tests.fuzz.learner_source import source

MODULES = (
    models,
    sources,
    optimizers,
    callbacks,
    spreads,
    interruptions,
    between,
    compare,
    isolate,
    learner_source,
    lives,
)
STAR = (
    "learnkit",
    "learnkit.vision",
    "learnkit.callbacks",
    "learnkit.schedule",
    "torch.utils.data",
)  # whose names the tables use
RUNTIME = '''\
def on_rank(make, fit, world, resume, interruption):
    """What a rank ends with; each process group is in the same folder."""
    learn = make(world, get_rank())
    if resume:
        seed_all(1000)
    with learn.no_logging():
        fit(learn, resume, [] if interruption is None else [interrupt(*interruption)])
    return outcome(learn)


def in_group(*args):
    init_process_group(timeout=30)
    try:
        return on_rank(*args)
    finally:
        destroy_process_group()


def life(make, fit, world, resume=False, interruption=None):
    """On `world` forked ranks: what each ends with; nothing of one that was interrupted."""
    try:
        if world == 1:
            return [isolated(on_rank, make, fit, world, resume, interruption)]
        return launch(in_group, world, make, fit, world, resume, interruption, timeout=60, every_rank=True)
    except (Crashed, RankFailed) as error:
        if interruption is None:
            raise
        print("interrupted:", str(error).strip().splitlines()[-1])


def report(expected, found, *, close=False):
    for rank, (a, b) in enumerate(zip(expected, found)):
        for line in differences(a, b, close=close):
            print(f"rank {rank}: {line}")


os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
'''
IN_NEW_FOLDER = "os.chdir(tempfile.mkdtemp())\n"


def script(c: Configuration) -> str:
    """The text: what is used, make and fit, and what is compared."""
    if c.check == "loop_by_hand":
        text = "python -m tests.fuzz --read compares this with the loop of tests/fuzz/by_hand.py."
        return f'"""{text}"""\n\nfrom tests.fuzz import *  # {c!r}\n\n{source(c)}'
    own, main = main_of(c)
    text = f"{RUNTIME}\n\n{own}\n\n{main}"
    imports, used = closure(text)
    return "\n".join([f'"""{c!r}"""', "", *imports, "", "", *(f"{part}\n\n" for part in used), text])


def main_of(c: Configuration) -> tuple[str, str]:
    """(make and fit, the script's end)."""
    own, run = source(c), f"make, fit, {c.world}"
    plain = f"{IN_NEW_FOLDER}expected = life({run})\n"
    if c.check == "resumed":
        return own, plain + chain(c, same=True) + "report(expected, found)\n"
    if c.check == "elsewhere":
        return own, plain + chain(c, same=False) + "report(expected, found, close=True)\n"
    if c.check == "worlds":
        return own, f"{plain}{IN_NEW_FOLDER}report(expected, life(make, fit, {c.other_world}), close=True)\n"
    if c.check == "traces":
        return (
            own + "\n\n" + renamed(source(c.changed(between=())), "plain_"),
            f"{IN_NEW_FOLDER}expected = life(plain_make, plain_fit, {c.world})\n{IN_NEW_FOLDER}report(expected, "
            f"life({run}))\n",
        )
    if c.check == "micro_batches":
        small = c.changed(global_bs=c.global_bs // 2, callbacks=(*c.callbacks, "Accumulate(2)"))
        parts = c.changed(callbacks=(*c.callbacks, "AutoMicrobatch(2)"))
        others = renamed(source(small), "small_") + "\n\n" + renamed(source(parts), "parts_")
        ends = [
            f"{IN_NEW_FOLDER}report(expected, life({name}_make, {name}_fit, {c.world}), close=True)\n"
            for name in ("small", "parts")
        ]
        return f"{own}\n\n{others}", plain + "".join(ends)
    return own, plain


def renamed(text: str, prefix: str) -> str:
    return text.replace("def make(", f"def {prefix}make(").replace("def fit(", f"def {prefix}fit(")


def chain(c: Configuration, *, same: bool) -> str:
    lines, world = [IN_NEW_FOLDER.strip()], c.world
    for k, i in enumerate(c.interruptions):
        lines.append(f"life(make, fit, {world}, resume={k > 0}, interruption={arguments(i)})")
        world = c.world if same else i.world
    return "\n".join([*lines, f"found = life(make, fit, {world}, resume=True)", ""])


def arguments(i: Interruption) -> str:
    """Of `interrupt`."""
    return repr((i.kind, i.hook, i.step, None if INTERRUPTIONS[i.kind].has("all") else i.rank, i.early, i.fit))


# --- what a text uses --------------------------------------------------------
def closure(text: str) -> tuple[list[str], list[str]]:
    """(import lines, definitions of this folder) that a text and these definitions need."""
    defined, imported = {}, {}
    for module in MODULES:
        read(module, defined, imported)
    wanted, found, lines = names_in(text), {}, set()
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        if name in defined:
            found[name] = defined[name]
            wanted |= names_in(defined[name][1]) - found.keys()
        elif name in imported:
            lines.add(imported[name])
        elif line := starred(name):
            lines.add(line)
    return ["from __future__ import annotations", "", *sorted(lines)], [part for _, part in sorted(set(found.values()))]


def read(module: ModuleType, defined: dict[str, tuple[tuple[int, int], str]], imported: dict[str, str]) -> None:
    """What a module defines and imports at its top."""
    text = inspect.getsource(module)
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
                if not start.startswith(("from tests.fuzz", "from __future__")):
                    imported[alias.asname or alias.name] = (
                        start + alias.name + (f" as {alias.asname}" if alias.asname else "")
                    )
            continue
        targets = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else names_assigned(node)
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        part = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
        for target in targets:
            if isinstance(getattr(module, target, None), dict) and target.isupper() and target != "STOPS":
                continue  # a table: its entries are written where they are used
            defined[target] = ((MODULES.index(module), node.lineno), part)


def names_assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def names_in(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def starred(name: str) -> str | None:
    """An import of what a table's code names."""
    import importlib

    if name == "schedulefree":
        return "import schedulefree"
    if name == "MulticlassF1Score":
        return "from torchmetrics.classification import MulticlassF1Score"
    if name in ("tempfile", "os"):
        return f"import {name}"
    if name == "ShardedStream":
        return "from learnkit.distributed import ShardedStream"
    module = next((module for module in STAR if hasattr(importlib.import_module(module), name)), None)
    return None if module is None else f"from {module} import {name}"
