"""Every numbered example runs as it stands, in an empty folder and without a display, and does what its header
claims.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def run_example(path: Path, *launcher: str) -> str:
    """What the example prints: with warnings as errors, and two threads in all, as its header says."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1" if launcher else "2",
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, *(launcher or ("-W", "error")), str(path)],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert launcher or not done.stderr
    return done.stdout


def is_picture(name: str) -> bool:
    data = Path(name).read_bytes()
    return data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5_000


def test_digits_reach_98_percent_and_leave_two_pictures():
    printed = run_example(ROOT / "examples/01_digits.py")
    assert float(re.findall(r"^accuracy (\S+);", printed, re.MULTILINE)[0]) >= 0.98
    assert {p.name for p in Path().iterdir()} == {"loss.png", "lr.png"}
    assert is_picture("loss.png") and is_picture("lr.png")
    epochs = re.findall(
        r"^epoch (\d+)/12  train_loss \S+  valid_loss \S+  accuracy \S+  time \d\d:\d\d$", printed, re.MULTILINE
    )
    assert epochs == [str(i) for i in range(1, 13)], "not a plain line per epoch"
    assert len(printed.splitlines()) == 13, "more than the lines of the epochs and the result"


def test_diabetes_is_learned_better_with_the_callback_than_without():
    printed = run_example(ROOT / "examples/02_diabetes.py")
    with_noise, without = map(float, re.findall(r"\d\.\d\d", printed))
    assert with_noise >= 0.44 and with_noise >= without + 0.03
    assert len(printed.splitlines()) == 1 and not list(Path().iterdir())


def test_two_processes_have_the_valid_loss_of_one_to_12_digits():
    path = ROOT / "examples/03_processes.py"
    alone = run_example(path)
    together = run_example(path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert len(together.splitlines()) == 4, "not one line an epoch and one for the result, by one process"
    results = [re.findall(r"valid_loss (\d\.\d{12}), accuracy (.*)", printed) for printed in (alone, together)]
    assert results[0] == results[1] and float(results[0][0][1]) > 0.95


def small_pictures(folder: Path, size: int, *, n: int, n_test: int) -> None:
    """train/ and test/ with two classes of `n` and `n_test` pictures: bright ones and dark ones, with noise."""
    import torch
    from PIL import Image

    for part, n_part in (("train", n), ("test", n_test)):
        for label, name in enumerate(("bright", "dark")):
            (folder / part / name).mkdir(parents=True)
            for i in range(n_part):
                pixels = torch.randint(0, 156, (size, size, 3), dtype=torch.uint8) + 100 * (1 - label)
                Image.fromarray(pixels.numpy()).save(folder / part / name / f"{i}.png")


def smaller(path: Path, *changes: tuple[str, str]) -> Path:
    """A copy of an example in the working folder, with less to do; its pictures are those of `small_pictures`."""
    text = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    copy = Path(path.name)
    copy.write_text(text, encoding="utf-8")
    return copy


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pictures(tmp_path / "pictures", 8, n=24, n_test=6)
    monkeypatch.setenv("LEARNKIT_DATA", str(tmp_path / "pictures"))
    monkeypatch.setenv("LEARNKIT_CACHE", str(tmp_path / "cache"))


def test_the_cifar_script_runs_alone_and_on_two_processes(pictures):
    """On pictures of 8×8, for one epoch."""
    path = smaller(
        ROOT / "examples/04_cifar.py", ("(4, 32)", "(2, 8)"), ("bs=128", "bs=16"), ("one_cycle(10, ", "one_cycle(1, ")
    )
    for launcher in ((), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")):
        printed = run_example(path, *launcher)
        assert [line[:9] for line in printed.splitlines()] == ["epoch 1/1"], "not one line an epoch, by one process"


def test_transfer_learns_more_from_few_pictures_than_a_new_network(tmp_path, monkeypatch):
    monkeypatch.setenv("LEARNKIT_CACHE", str(tmp_path / "cache"))
    printed = run_example(ROOT / "examples/05_transfer.py")
    transferred, fresh = map(float, re.findall(r"\d\.\d{3}", printed))
    assert transferred >= fresh + 0.15 and len(printed.splitlines()) == 1


def test_the_speed_run_runs_and_is_short(pictures):
    """On pictures of 8×8, with a narrow network, for twelve short epochs."""
    path = ROOT / "examples/06_speedrun.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    copy = smaller(
        path,
        ("(2, 32)", "(2, 8)"),
        ("bs=512", "bs=8"),
        ("resnet9()", "resnet9(width=4)"),
        ("one_cycle(10, 0.4", "one_cycle(12, 0.01"),
    )
    printed = run_example(copy)
    assert float(re.findall(r"^accuracy (\S+) with mirror images$", printed, re.MULTILINE)[0]) > 0.7
    assert len(printed.splitlines()) == 13


def test_text_is_predicted_better_than_by_frequencies():
    printed = run_example(ROOT / "examples/07_text.py")
    model, frequencies = map(float, re.findall(r"(\d\.\d\d) b", printed.splitlines()[-1]))
    assert model < 0.65 * frequencies and len(printed.splitlines()) == 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_it_is_run_what_it_claims_and_on_how_many_seeds(path):
    header = path.read_text(encoding="utf-8").split('"""')[1]
    assert f"python examples/{path.name}" in header
    assert re.search(r"^Claim: .*\bn = \d+ seeds", header, re.MULTILINE)


def test_every_example_is_run_by_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert f"examples/{path.name}" in source
    assert [path.name[:2] for path in EXAMPLES] == [f"{i:02}" for i in range(1, len(EXAMPLES) + 1)]
