"""benchmarks/gpu.py runs to its end on the stand-in accelerator, so that the first minutes on a GPU are not spent on
the script.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def sections(report: str) -> dict[str, str]:
    return {part.partition("\n")[0]: part for part in report.split("\n## ")[1:]}


def test_every_part_of_gpu_py_has_figures_or_says_by_name_why_it_was_skipped(tmp_path: Path):
    before = (SCRIPT.with_suffix(".md")).read_text()
    done = run("--device", "twin", "--quick", "--output", str(tmp_path / "gpu.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = (tmp_path / "gpu.md").read_text()
    assert SCRIPT.with_suffix(".md").read_text() == before
    assert "As times, these figures mean nothing" in report and re.search(r"twin.*torch \d.*Python 3", report)
    found = sections(report)
    skipped = {
        "tests/test_cuda.py": "needs a CUDA device",
        "tests/test_cuda.py, with two devices": "needs CUDA: skipped on twin",
        'compile() and compile(mode="reduce-overhead") against eager': "needs CUDA: skipped on twin",
    }
    assert len(found) == 11 and all(why in found[title] for title, why in skipped.items())
    for title in found.keys() - skipped.keys():
        assert len(re.findall(r"^\| .* \| [\d.,]+.* \| \d+ \|$", found[title], re.MULTILINE)) >= 3, found[title]


def test_a_part_that_fails_is_reported_and_the_rest_still_runs(tmp_path: Path):
    (tmp_path / "train").mkdir()  # no pictures in it
    done = run(
        "--device",
        "twin",
        "--quick",
        "--output",
        str(tmp_path / "gpu.md"),
        "--parts",
        "speed run",
        "memory",
        "--cifar",
        str(tmp_path),
    )
    assert done.returncode == 1
    found = sections((tmp_path / "gpu.md").read_text())
    [failed], [measured] = (
        [text for name, text in found.items() if name.startswith(title)] for title in ("CIFAR", "The most memory")
    )
    assert "**speed run: ended with exit code 1" in failed and "ValueError" in failed
    assert "learnkit" in measured and "failed" not in measured


def test_what_no_time_is_left_for_is_skipped_by_name(tmp_path: Path):
    done = run("--device", "twin", "--quick", "--output", str(tmp_path / "gpu.md"), "--minutes", "0.05")
    assert done.returncode == 0 and (tmp_path / "gpu.md").read_text().count("the 0.05 minutes were used up") == 9


def test_figures_of_the_stand_in_do_not_replace_those_of_a_gpu():
    done = run("--device", "twin")
    assert done.returncode == 2 and "--output is missing" in done.stderr
