"""The house: which wing may import which, which imports wait for their use, and one home for each name."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a wing imports those before it, and its own files.
FLOORS = (
    "hooks",
    "schedule",
    "devices",
    "data",
    "metrics",
    "optim",
    "distributed",
    "checkpoint",
    "logs",
    "loop",
    "export",
    "learner",
    "callbacks",
    "trials",
    "vision",
    "ray",
)
# Outside of the order: names handed on, and the command line.
FACES = ("learnkit", "loggers", "shards", "__main__")

# Imports that point up wait inside a function until they are used: {file: what it imports}.
DOORS = {
    "learner": {
        "callbacks.channels_last",
        "callbacks.compiled",
        "callbacks.join",
        "callbacks.mixed_precision",
        "callbacks.progress",
        "callbacks.recorder",
        "trials.batch_size",
        "trials.fast_run",
        "trials.lr_find",
        "trials.summary",
        "vision.augmented",
        "vision.interpretation",
    },
    "loop.fit": {"callbacks.optimizer_modes", "callbacks.param_scheduler", "callbacks.stop_after"},
    "data.loaders": {"distributed.world"},  # which device and how many processes this machine has, as launchers say
    "export.picture": {"vision.decode"},
    "export.write": {"learnkit"},  # its version
}


class Import(NamedTuple):
    of: str  # the module that imports, without "learnkit."
    what: str
    for_types: bool
    waits: bool  # inside a function
    line: int


def files() -> dict[str, Path]:
    """{module: file} of the package, callbacks/ among them."""
    found = {}
    for folder in ("learnkit", "callbacks"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] == ("learnkit", "callbacks"):
                continue  # the link
            parts = parts if parts[0] == "learnkit" else ("learnkit", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = files()


def short(module: str) -> str:
    return module.removeprefix("learnkit.")


def wing(module: str) -> str:
    return short(module).partition(".")[0]


def module_of(name: str) -> str:
    while name not in FILES:
        name = name.rpartition(".")[0]
    return name


def imports() -> Iterator[Import]:
    for module, path in FILES.items():
        yield from imports_in(module, ast.parse(path.read_text()), for_types=False, waits=False)


def imports_in(module: str, node: ast.AST, *, for_types: bool, waits: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module} has a relative import in line {child.lineno}"
            whole = [f"{child.module}.{alias.name}" for alias in child.names]
        elif isinstance(child, ast.Import):
            whole = [alias.name for alias in child.names]
        else:
            types = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            inside = waits or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports_in(module, child, for_types=types, waits=inside)
            continue
        for name in whole:
            if name.partition(".")[0] == "learnkit":
                yield Import(short(module), short(module_of(name)), for_types, waits, child.lineno)


IMPORTS = [one for one in imports() if one.of != one.what]


def test_every_wing_has_a_floor():
    assert {wing(module) for module in FILES} == {*FLOORS, *FACES}


def test_imports_point_down_or_are_listed_as_doors():
    up = defaultdict(set)
    for one in IMPORTS:
        of, what = wing(one.of), wing(one.what)
        if one.for_types or of in FACES or of == what:
            continue
        if what in FACES or FLOORS.index(what) > FLOORS.index(of):
            assert one.waits, f"{one.of} imports {one.what} in line {one.line}, which is above it: see DOORS"
            up[one.of].add(one.what)
    assert dict(up) == DOORS


def test_no_files_import_each_other_in_a_circle():
    """Doors and imports for types excepted."""
    below = defaultdict(set)
    for one in IMPORTS:
        if not one.for_types and not (one.waits and one.what in DOORS.get(one.of, ())) and wing(one.of) not in FACES:
            below[one.of].add(one.what)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join([*above[above.index(module) :], module])}"
        if module not in done:
            for other in below[module]:
                visit(other, (*above, module))
            done.add(module)

    for module in list(below):
        visit(module, ())


def test_at_most_eighty_arrows_lead_from_one_room_to_another():
    """Rooms are the wings; faces, which hand names on, and imports for types are none."""
    arrows = {
        (wing(one.of), wing(one.what))
        for one in IMPORTS
        if not one.for_types and wing(one.of) != wing(one.what) and not {wing(one.of), wing(one.what)} & {*FACES}
    }
    assert len(FLOORS) <= 18 and len(arrows) <= 80, (len(FLOORS), len(arrows))


def names_of(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def test_a_top_level_name_exists_once():
    homes = defaultdict(list)
    for module, path in FILES.items():
        for name in names_of(path):
            homes[name].append(short(module))
    shared = {"__all__", "T"}  # T: the type variable of whoever needs one
    assert {name: found for name, found in homes.items() if len(found) > 1 and name not in shared} == {}
