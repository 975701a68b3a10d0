"""Every test begins in the same world (seed 0, one thread, an empty folder) and must leave it as it was."""

import os

os.environ["MPLBACKEND"] = "Agg"  # plots are drawn into files; children inherit it
os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, here and in children, so that numbers can be compared exactly

import random
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


# Files of minutes, longest first: of processes that run one file at a time, none is left alone with one of these in the
# end.
LONG = (
    "test_examples.py",
    "test_elastic.py",
    "test_faults.py",
    "test_scripts.py",
    "test_learner_stops.py",
    "test_processes.py",
    "test_composition.py",
    "test_fully_shard.py",
    "test_learner_faults.py",
    "test_coming_from.py",
    "test_readme.py",
    "test_in_parts.py",
    "test_hosts.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def switches() -> dict[str, object]:
    """torch's process-wide switches, which a fit may borrow but must give back."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast on the CPU": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def same_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # Learner(path='.') writes here, not into the checkout
    before, python_state = switches(), random.getstate()
    kind = torch.accelerator.current_accelerator() or torch.device("cuda")
    with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind.type):
        torch.manual_seed(0)
        random.seed(0)
        yield
    random.setstate(python_state)
    assert switches() == before


def run_python(cwd: Path, *arguments: str, python: Path | str = sys.executable) -> str:
    """What a Python process prints, which must succeed. It sees what is installed and what is in `cwd`."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"python {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_source(folder: Path) -> Path:
    """A copy of what a build reads, so that building leaves nothing in the checkout."""
    for package in ("learnkit", "callbacks"):
        shutil.copytree(ROOT / package, folder / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    return folder


def build_wheel(source: Path, *options: str) -> Path:
    """The wheel made from a source tree, without a network; without options by way of the sdist, as a release is."""
    run_python(source.parent, "-m", "build", "--no-isolation", *options, str(source))
    [wheel] = (source / "dist").glob("*.whl")
    return wheel


def make_environment(folder: Path, *install: str) -> Path:
    """The interpreter of a new environment where `pip install` was told `install`; dependencies are this one's."""
    run_python(folder, "-m", "venv", "--without-pip", "env")
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(run_python(folder, "-c", "import site; print(site.getsitepackages()[0])", python=python).strip())
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    run_python(folder, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", *install)
    return python


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(copy_source(tmp_path_factory.mktemp("source")))


@pytest.fixture(scope="session")
def installed_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter for which the wheel is installed, and this checkout is not."""
    return make_environment(tmp_path_factory.mktemp("installed"), str(wheel))
