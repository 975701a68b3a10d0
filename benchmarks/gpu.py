"""Everything that only a GPU can show, within ten minutes on one GPU: tests/test_cuda.py, where the host waits, and the
cost of learnkit.

    make gpu                                    writes benchmarks/gpu.md
    python benchmarks/gpu.py [--device cuda] [--output FILE] [--minutes 10] [--parts step epoch] [--cifar FOLDER]
                             [--quick]
    python benchmarks/gpu.py --device twin --output FILE --quick
                                                checks that the script runs, on the stand-in accelerator of the tests

Each part runs in its own process with its own time limit; the figures that it has found by then are kept. A part that
fails is reported with its last lines, and the other parts still run; the exit code is then 1. When the minutes are used
up, the report names the remaining parts as skipped. Times on the stand-in mean nothing. Nothing is downloaded: without
CIFAR-10 on this machine its speed run uses generated pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPORT = HERE / "gpu.md"
AT_LEAST = 10.0  # seconds that must be left to start a part: importing torch takes half of them


@dataclass(frozen=True)
class Part:
    """One process. `limit`: seconds."""

    name: str
    title: str
    limit: float
    needs_cuda: bool = False
    n_devices: int = 1


PARTS = (  # the most important first
    Part("tests", "tests/test_cuda.py", 270),
    Part("tests of two", "tests/test_cuda.py, with two devices", 240, needs_cuda=True, n_devices=2),
    Part("two devices", "Two devices: NCCL, each algorithm, to_fsdp", 150, n_devices=2),
    Part("waits", "Where the host waits for the device: what one more of each adds", 60),
    Part("step", "A step of a bare Learner against the loop by hand, batches on the device", 120),
    Part("speed run", "CIFAR-10: the recipe of examples/06_speedrun.py in bfloat16, channels last", 120),
    Part("epoch", "An epoch with bar, losses, schedule, accuracy and validation against the loop by hand", 60),
    Part("compile", 'compile() and compile(mode="reduce-overhead") against eager', 150, needs_cuda=True),
    Part("memory", "The most memory that is allocated in an epoch, ResNet-18, batch 128", 45),
    Part("data path", "From the host to the device", 90),
    Part("checkpoint", "How long training waits for a save", 120),
)


@dataclass
class Result:
    """The result of a part: its figures, and the reason if it was skipped or failed."""

    part: Part
    lines: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    failed: str = ""
    seconds: float = 0.0

    @property
    def is_bad(self) -> bool:
        return bool(self.failed) or any("failed" in line for line in self.lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cuda", help="cuda, another accelerator of torch, or twin, the stand-in of the tests"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"the report; the default is {REPORT.name} next to this script, on a real device only",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit of the whole script")
    parser.add_argument(
        "--parts", nargs="+", choices=[part.name for part in PARTS], default=[part.name for part in PARTS]
    )
    parser.add_argument("--cifar", type=Path, help="a folder with train/<class>/… and test/<class>/… of CIFAR-10")
    parser.add_argument("--quick", action="store_true", help="small sizes, which only show that everything runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the part, in the process that was started for it
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_here(args)
    if args.output is None and (args.device == "twin" or args.quick):
        parser.error(
            "--output is missing: with --device twin and with --quick the times mean nothing and are not written to "
            f"{REPORT.name}. Give another file."
        )
    if args.cifar is not None and not (args.cifar / "train").is_dir():
        parser.error(f"--cifar {args.cifar}: expected a folder that has train/<class>/… and test/<class>/….")
    begin = time.monotonic()
    device = run_part(Part("machine", "", 120), args, 120)
    if device.is_bad:
        print(device.failed, file=sys.stderr)
        return 2
    facts, results = device.lines[0], []
    for part in PARTS:
        if part.name not in args.parts:
            continue
        results.append(result_of(part, args, facts, 60 * args.minutes - (time.monotonic() - begin)))
        print("\n".join(section(results[-1])), flush=True)
        write(args.output or REPORT, report(args, facts, results, time.monotonic() - begin))
    return int(any(result.is_bad for result in results))


def run_here(args: argparse.Namespace) -> int:
    import gpu_parts

    gpu_parts.run_part(
        args.one, gpu_parts.Run(args.device, args.lines, quick=args.quick, limit=args.limit, cifar=args.cifar)
    )
    return 0


# --- parts -------------------------------------------------------------------
def result_of(part: Part, args: argparse.Namespace, facts: dict[str, Any], left: float) -> Result:
    if part.needs_cuda and facts["cuda"] is None:
        return Result(part, skipped=f"needs CUDA: skipped on {args.device}")
    if facts["n_devices"] < part.n_devices:
        return Result(part, skipped=f"needs {part.n_devices} devices, and here is {facts['n_devices']}")
    if left < AT_LEAST:
        return Result(part, skipped=f"the {args.minutes:g} minutes were used up")
    return run_part(part, args, left)


def run_part(part: Part, args: argparse.Namespace, left: float) -> Result:
    """Run a part in a process, which is killed with all processes that it started when its time is over."""
    limit = min(part.limit, left)
    with tempfile.TemporaryDirectory(prefix="learnkit-gpu-") as folder:
        lines, log = Path(folder, "lines"), Path(folder, "log")
        command = [
            sys.executable,
            __file__,
            "--one",
            part.name,
            "--device",
            args.device,
            "--lines",
            str(lines),
            "--limit",
            str(limit),
            *(["--quick"] if args.quick else []),
            *(["--cifar", str(args.cifar.resolve())] if args.cifar else []),
        ]
        begin = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        result = Result(part, seconds=time.monotonic() - begin)
        if lines.exists():
            result.lines = [json.loads(line) for line in lines.read_text().splitlines()]
        if code is None and limit < part.limit:
            result.skipped = f"the {args.minutes:g} minutes were over before its end"
        elif code is None:
            result.failed = f"still running after its {limit:.0f} s; its last lines:\n{last_lines(log)}"
        elif code:
            result.failed = f"ended with exit code {code}; its last lines:\n{last_lines(log)}"
        return result


def environment() -> dict[str, str]:
    """Return the environment of each process. cuBLAS reads its variable, which deterministic sums need, at its first
    use.
    """
    path = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all others in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path, n: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-n:])


# --- the report --------------------------------------------------------------
def report(args: argparse.Namespace, facts: dict[str, Any], results: list[Result], seconds: float) -> str:
    versions = {
        "torch": facts["torch"],
        "CUDA": facts["cuda"],
        "cuDNN": facts["cudnn"],
        "driver": driver() if facts["cuda"] else None,
        "Python": platform.python_version(),
    }
    command = f"python benchmarks/gpu.py --device {args.device}" + (" --quick" if args.quick else "")
    lines = [
        "# On a GPU",
        "",
        f"{time.strftime('%Y-%m-%d')}, {facts['device']} ({facts['n_devices']} of them, {facts['memory'] / 2**30:.0f} "
        f"GiB each), {processor()}, {os.cpu_count()} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        + f"; commit {commit()}.",
        f"`{command}`, {seconds / 60:.1f} minutes. Figures are medians, with the middle half in brackets; ratios are "
        f"taken round by round.",
        "",
    ]
    if args.device == "twin" or args.quick:
        lines += ["**This shows that the script runs. As times, these figures mean nothing.**", ""]
    for result in results:
        lines += section(result)
    return "\n".join(lines)


def section(result: Result) -> list[str]:
    part, (failure, *log) = result.part, result.failed.splitlines() or [""]
    lines = [f"## {part.title}", ""]
    if result.lines:
        lines += ["| figure | | n |", "| --- | --- | --- |", *map(row, result.lines), ""]
    if result.skipped:
        lines += [f"{part.name}: {result.skipped}.", ""]
    if result.failed:
        lines += [f"**{part.name}: {failure}**", "", "```text", *log, "```", ""]
    if result.seconds:
        lines += [f'`--parts "{part.name}"`, {result.seconds:.0f} s.', ""]
    return lines


def row(line: dict[str, Any]) -> str:
    name = cell(line["figure"])
    if "skipped" in line:
        return f"| {name} | skipped: {cell(line['skipped'])} | |"
    if "failed" in line:
        return f"| {name} | **failed**: {cell(line['failed'])} | |"
    value = cell(" ".join([spread(line["values"], line["digits"]), line["unit"], line["note"]]))
    return f"| {name} | {value} | {len(line['values'])} |"


def cell(text: str) -> str:
    return text.replace("|", "\\|").strip().replace("\n", "<br>")


def spread(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:,.{digits}f}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def write(path: Path, text: str) -> None:
    """Write the report, after each part, so that it is there whatever ends this process."""
    path.write_text(text)


def driver() -> str:
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown (no nvidia-smi)"
    done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.strip().partition("\n")[0] or "unknown"


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
