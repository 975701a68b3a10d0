"""README.md shows nothing that is not run: its blocks run in order, in one namespace, in an empty folder; warnings are
errors.

A text block after a python block, with no more than a line between them, is what that block prints, but for the digits
of numbers with a point, for clock times, for where lines are broken, and for the plain lines of epochs.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot

import learnkit
import learnkit.callbacks
from learnkit import Callback, DataBunch, Learner, hooks
from tests.pages import ROOT, Block, Page, form

PAGE = Page("README.md")
README = PAGE.text


def blocks() -> list[Block]:
    return PAGE.blocks


def test_every_python_block_runs_and_prints_what_the_page_shows():
    PAGE.run(but=first().line)
    assert {p.name for p in Path().iterdir()} == {
        "losses.png",
        "history.csv",
        "models",
        "checkpoints",
        "log.csv",
        "circles.pt2",
    }
    pyplot.close("all")


@pytest.mark.parametrize("name", ["docs/devices.md", "docs/distributed.md", "docs/pictures.md"])
def test_the_blocks_of_other_pages_run_and_print_what_they_show(name):
    Page(name).run()
    pyplot.close("all")


def test_the_script_that_learnkit_exists_for_is_the_example():
    [script] = [block.code for block in blocks() if block.language == "py"]
    assert (ROOT / "examples" / "04_cifar.py").read_text(encoding="utf-8").endswith(script)


# --- the first block, as a user runs it --------------------------------------
def first() -> Block:
    return next(block for block in blocks() if block.language == "python")


def run_first(stdout: int) -> subprocess.Popen[bytes]:
    """The first block alone, as a script of its own, with all warnings as errors."""
    Path("first.py").write_text(first().code, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "first.py"],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
    )


def screen(output: str) -> list[str]:
    """What is left on a terminal's screen: a carriage return goes back, and what comes then overwrites."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


def test_the_first_block_alone_shows_its_table_in_a_terminal():
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    ours, theirs = pty.openpty()
    process = run_first(theirs)
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break  # Linux's way of saying that the other end was closed
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait() == 0, output.decode()
    table = PAGE.outputs()[first().line].code.splitlines()
    assert [form(line) for line in screen(output.decode())] == [form(line) for line in table]
    assert b"Epoch 1/5" in output and b"%" in output, "no bar was drawn"


def test_the_first_block_alone_prints_plain_lines_into_a_pipe():
    process = run_first(subprocess.PIPE)
    printed = process.communicate()[0].decode()
    assert process.returncode == 0, printed
    [line] = re.findall(r"^```text\n(epoch 1/5 .*)\n```$", README, re.MULTILINE)
    assert [form(shown) for shown in printed.splitlines()] == [form(line).replace("1/5", f"{i}/5") for i in range(1, 6)]
    values = [float(value) for value in re.findall(r"accuracy (\S+)", printed)]
    assert values[-1] >= 0.95


# --- what the page says about the code ---------------------------------------
@pytest.mark.parametrize(
    "line",
    [
        line.split("#")[0].strip()
        for block in blocks()
        if block.language == "sh"
        for line in block.code.splitlines()
        if line.strip()
    ],
)
def test_every_shell_command_exists(line):
    program, *arguments = line.split()
    if program == "make":
        for target in arguments:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif program in ("python", "torchrun", "srun"):  # tests/distributed/test_scripts.py runs the launchers
        assert (ROOT / arguments[-1]).is_file()
    elif program == "learnkit":
        assert arguments[0] in ("info", "predict")  # tests/test_export.py runs them
    else:
        assert (program, arguments[0]) == ("pip", "install"), f"nothing checks {line!r}"
        extras = re.fullmatch(r"'?\.(?:\[(\w+)\])?'?", arguments[1])
        assert extras, "the name on the package index is somebody else's: install from the folder"
        if extras[1]:
            assert re.search(rf"^{extras[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_nobody_is_told_to_install_the_name_from_the_package_index():
    for page in [README, *(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))]:
        assert not re.search(r"(pip|uv)\s+(install|add)\s+['\"]?learnkit", page)


def test_links_lead_to_files():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    table = README[README.index(f"\n| {head}") :].lstrip("\n").split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def test_the_table_of_callbacks_is_complete_and_its_orders_are_true():
    there = {
        name: cls
        for name, cls in vars(learnkit.callbacks).items()
        if isinstance(cls, type) and issubclass(cls, Callback)
    }
    listed = {re.match(r"`(\w+)\((.*)\)`", name): int(order) for name, _, order in rows("name | what it does")}
    assert {match[1]: order for match, order in listed.items() if match} == {
        name: cls.order for name, cls in there.items()
    }
    for match in filter(None, listed):
        parameters = inspect.signature(there[match[1]]).parameters
        for argument in filter(None, match[2].split(", ")):
            name, _, default = argument.partition("=")
            assert name in parameters, f"{match[1]} has no {name}"
            if default not in ("", "…"):
                assert parameters[name].default == eval(default), f"{match[1]}: {argument}"


def test_the_tree_the_stage_and_the_table_of_endings_are_those_of_hooks():
    own = [line.strip() for line in (hooks.__doc__ or "").splitlines()]
    shown = [block.code for block in blocks() if block.code.startswith(("fit\n", "cb.before_X"))]
    assert len(shown) == 2
    for text in shown:
        assert all(line.strip() in own for line in text.splitlines()), text
    table = [
        line for line in README.splitlines() if line.startswith(("| StopX", "| SkipX", "| any other", "| raised while"))
    ]
    assert len(table) == 4 and all(line in own for line in table)
    loop = next(block.code for block in blocks() if block.code.startswith("fit   "))
    assert {line.split()[0] for line in loop.splitlines()} == set(hooks.STAGES)


def test_every_attribute_and_method_that_the_page_names_exists():
    learn = Learner(DataBunch([(learnkit.hooks, 0)]), learnkit.learner.nn.Linear(1, 1))
    for name in set(re.findall(r"\blearn\.(\w+)", README)) - {"recorder"}:
        assert hasattr(learn, name), f"learn.{name}"
    for name in set(re.findall(r"\blearn\.recorder\.(\w+)", README)):
        assert hasattr(learn.recorder, name), f"recorder.{name}"
    for name, arguments in re.findall(r"^\| `(fit\w*|fine_tune)\(([^)]*)\)`", README, re.MULTILINE):
        parameters = inspect.signature(getattr(Learner, name)).parameters
        assert set(re.findall(r"(\w+)(?:=\d+)?(?:, |$)", arguments)) <= set(parameters), name
