"""The files around the code agree with it: CI's Pythons, pre-commit's commands, versions, and the folders that
CONTRIBUTING.md names.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import learnkit

ROOT = Path(__file__).parents[1]
NEWEST = 14  # of Python 3, that CI runs


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def found(pattern: str, name: str) -> str:
    """The group of the one place in a file that matches."""
    [match] = re.findall(pattern, read(name), re.MULTILINE)
    return match


def test_ci_runs_every_python_from_the_oldest_supported_one():
    oldest = int(found(r'^requires-python = ">=3\.(\d+)"$', "pyproject.toml"))
    matrix = found(r"^ +python: \[(.*)\]$", ".github/workflows/ci.yml")
    assert re.findall(r'"([^"]+)"', matrix) == [f"3.{minor}" for minor in range(oldest, NEWEST + 1)]


def test_ci_calls_the_script_that_contributors_call():
    assert found(r"^ +run: (bash .*)$", ".github/workflows/ci.yml") == "bash .ci/run"
    target = found(r"^ +run: make (.*)$", ".github/workflows/ci.yml")
    assert f"\n$(VENV)/{target.removeprefix('.venv/')}:" in read("Makefile")


def test_the_hooks_of_pre_commit_are_the_commands_of_make_lint():
    recipe = read("Makefile").partition("\nlint:")[2].partition("\n\n")[0].splitlines()[1:]
    commands = [line.strip().replace("$(python)", ".venv/bin/python") for line in recipe]
    assert len(commands) == 3
    assert re.findall(r"^ +entry: (.*)$", read(".pre-commit-config.yaml"), re.MULTILINE) == commands
    assert set(re.findall(r"repo: (.*)$", read(".pre-commit-config.yaml"), re.MULTILINE)) == {"local"}


def test_the_version_is_the_same_wherever_it_stands():
    version = found(r'^version = "(.*)"$', "pyproject.toml")
    assert found(r"^version: (.*)$", "CITATION.cff") == version == learnkit.__version__


def test_contributing_names_every_folder_of_the_package_and_no_other():
    named = set(re.findall(r"^\| `learnkit/(\w+)/` \|", read("CONTRIBUTING.md"), re.MULTILINE))
    assert named == {path.parent.name for path in ROOT.glob("learnkit/*/__init__.py")} - {"callbacks"}


def imported(path: Path) -> Iterator[str]:
    """The parts of learnkit that a module imports when it is imported itself."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("learnkit."):
            yield statement.module.split(".")[1]


def test_imports_point_down_the_layers_that_contributing_names():
    [text] = re.findall(r"`(devices .*? vision)`", read("CONTRIBUTING.md").replace("\n ", ""))
    layer = {name: i for i, names in enumerate(text.split("<-")) for name in names.split()}
    wrong = []
    for path in (*ROOT.glob("learnkit/**/*.py"), *ROOT.glob("callbacks/*.py")):
        place = path.relative_to(ROOT).with_suffix("").parts
        part = place[0] if place[0] == "callbacks" else place[1]
        if part in layer:  # and not __init__ or __main__
            wrong += [
                (path.name, part, other) for other in imported(path) if other != part and layer[other] >= layer[part]
            ]
    assert wrong == []


def test_contributing_names_files_that_exist():
    paths = re.findall(r"`((?:learnkit|tests|benchmarks|docs|examples|callbacks)/[\w/.-]+)`", read("CONTRIBUTING.md"))
    examples = {"callbacks/your_callback.py", "tests/callbacks/test_your_callback.py"}
    assert [path for path in paths if path not in examples and not (ROOT / path).exists()] == []


def test_links_of_the_pages_beside_the_readme_lead_to_files():
    for page in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(page)):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page}: {target}"
