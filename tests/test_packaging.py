"""What is installed is what is in the tree, under the name learnkit and no other, however the tree was checked out."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, build_wheel, copy_source, make_environment, run_python


def modules_in_the_tree() -> set[str]:
    """Where each module lies in an installation: callbacks/ is read itself, and not through the link to it."""
    own = [path.relative_to(ROOT) for path in ROOT.glob("learnkit/**/*.py")]
    linked = [Path("learnkit") / path.relative_to(ROOT) for path in ROOT.glob("callbacks/**/*.py")]
    return {path.as_posix() for path in (*own, *linked) if path.parts[1] != "callbacks" or path in linked}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def without_links(source: Path) -> Path:
    """The tree as git checks it out where core.symlinks is false: a link is a file that names its target."""
    link = source / "learnkit" / "callbacks"
    target = link.readlink().as_posix() if link.is_symlink() else link.read_text()
    assert target == "../callbacks"
    link.unlink()
    link.write_text(target)
    return source


def test_the_wheel_holds_every_module_of_the_tree_once_and_nothing_beside_learnkit(wheel: Path):
    assert set(contents(wheel)) == modules_in_the_tree() | {"learnkit/py.typed"}
    assert any(name.startswith("learnkit/callbacks/") for name in contents(wheel))


def test_every_package_in_the_tree_has_an_init():
    """Packages are listed by hand: a folder that is missing from the list, or has no __init__, would not be shipped."""
    folders = {path.rpartition("/")[0] for path in modules_in_the_tree()}
    assert {f"{folder}/__init__.py" for folder in folders} <= modules_in_the_tree()


def test_a_checkout_without_symbolic_links_gives_the_same_wheel(wheel: Path, tmp_path: Path):
    assert contents(build_wheel(without_links(copy_source(tmp_path)), "--wheel")) == contents(wheel)


DECOY_SCRIPT = """
import callbacks, learnkit, learnkit.callbacks
from learnkit.callbacks import Progress
print(callbacks.who, Progress.__module__, learnkit.__file__, learnkit.callbacks.__file__, sep="\\n")
"""


def run_beside_a_decoy(folder: Path, python: Path) -> list[str]:
    folder.mkdir()
    (folder / "callbacks.py").write_text("who = 'the decoy'\n")
    (folder / "script.py").write_text("import sys\n" + DECOY_SCRIPT)
    return run_python(folder, "script.py", python=python).splitlines()


def test_an_installed_learnkit_leaves_the_name_callbacks_to_the_user(installed_python: Path, tmp_path: Path):
    who, module, *files = run_beside_a_decoy(tmp_path / "scripts", installed_python)
    assert who == "the decoy"
    assert module.startswith("learnkit.callbacks.")
    assert all(installed_python.parents[1] in Path(file).parents for file in files)


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_an_editable_install_runs_the_tree_itself(links: bool, tmp_path: Path):
    (tmp_path / "tree").mkdir()
    source = copy_source(tmp_path / "tree") if links else without_links(copy_source(tmp_path / "tree"))
    python = make_environment(tmp_path, "--no-build-isolation", "--editable", str(source))
    who, module, *files = run_beside_a_decoy(tmp_path / "scripts", python)
    assert who == "the decoy"
    assert module.startswith("learnkit.callbacks.")
    assert [Path(file).resolve().parent for file in files] == [source / "learnkit", source / "callbacks"]


def test_a_stray_import_of_the_folder_gives_the_same_classes():
    stray, proper = run_python(
        ROOT, "-c", "import callbacks, learnkit.callbacks as proper\nprint(id(callbacks.Progress), id(proper.Progress))"
    ).split()
    assert stray == proper


IMPORTS = """
import json, sys, torch
before = sorted(sys.modules)
import learnkit
print(json.dumps([before, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def modules() -> tuple[set[str], set[str]]:
    """Those in memory after `import torch`, and those that `import learnkit` adds to them."""
    before, after = json.loads(run_python(ROOT, "-c", IMPORTS))
    return set(before), set(after) - set(before)


def test_import_learnkit_adds_one_module_to_torch(modules: tuple[set[str], set[str]]):
    _, added = modules
    assert added == {"learnkit"}


def test_all_names_that_learnkit_has_add_at_most_60_modules_to_torch():
    before, after = json.loads(run_python(ROOT, "-c", IMPORTS.replace("import learnkit", "from learnkit import *")))
    added = set(after) - set(before)
    assert "learnkit.learner" in added and len(added) <= 60, sorted(added)
    known = {name.partition(".")[0] for name in before} | sys.stdlib_module_names | {"learnkit"}
    assert {name for name in added if name.partition(".")[0] not in known} == set()


def test_what_is_imported_when_it_is_used_is_what_type_checkers_see():
    """One name each, from the same module; and submodules, which other libraries' users expect as attributes."""
    import learnkit

    source = Path(learnkit.__file__).read_text()
    seen = re.findall(r"^    from (\S+) import (\w+) as \w+$", source, flags=re.M)
    assert {name: module for module, name in seen} == learnkit.HOMES and sorted(learnkit.HOMES) == sorted(
        learnkit.__all__
    )
    assert all(getattr(learnkit, name).__name__ == name for name in learnkit.__all__)
    assert learnkit.distributed.__name__ == "learnkit.distributed" and {"Learner", "__version__"} <= set(dir(learnkit))
    with pytest.raises(AttributeError, match="module 'learnkit' has no attribute 'Lerner'"):
        learnkit.Lerner  # noqa: B018


def test_import_learnkit_adds_only_modules_of_its_own_of_torch_and_of_the_standard_library(
    modules: tuple[set[str], set[str]],
):
    before, added = modules
    known = {name.partition(".")[0] for name in before} | sys.stdlib_module_names | {"learnkit"}
    assert {name for name in added if name.partition(".")[0] not in known} == set()


@pytest.mark.parametrize("heavy", ["torch._dynamo", "torchvision", "matplotlib", "fastprogress", "torchmetrics", "ray"])
def test_a_script_that_uses_learnkit_does_not_import(heavy: str):
    before, after = json.loads(run_python(ROOT, "-c", IMPORTS.replace("import learnkit", "from learnkit import *")))
    added = set(after) - set(before)
    assert {name for name in added if name == heavy or name.startswith(f"{heavy}.")} == set()


INSTALLS_THE_NAME = re.compile(r"(pip3? install|uv add)\b[^\n@]*[\s'\"`]learnkit\b(?!\s*@)")


def test_nothing_tells_anyone_to_install_the_name_from_the_index():
    """On the package index the name learnkit is somebody else's."""
    files = [
        path
        for pattern in ("*.md", "docs/**/*.md", "examples/**/*.py", "learnkit/**/*.py", "callbacks/**/*.py")
        for path in ROOT.glob(pattern)
    ]
    assert [str(path) for path in files if INSTALLS_THE_NAME.search(path.read_text(encoding="utf-8"))] == []
