"""What `import learnkit` adds to `import torch`: modules and CPU time, in fresh processes.

    python benchmarks/import_cost.py [--rounds 11]

Goals: at most 20 modules and 0.02 s. What a script uses is imported when it names it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from measure import machine

PROBE = """
import sys, time, json, torch
before, start = set(sys.modules), time.process_time()
import learnkit
print(json.dumps([time.process_time() - start, len(set(sys.modules) - before),
                  [n for n in ("torchvision", "matplotlib", "torch._dynamo", "fastprogress") if n in sys.modules]]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout)
        for _ in range(args.rounds + 1)
    ][1:]
    seconds = [run[0] for run in runs]
    print(machine(), f"n = {args.rounds} processes", sep="\n")
    print(f"modules added {runs[0][1]}, heavy ones among all: {', '.join(runs[0][2]) or 'none'}")
    print(f"CPU {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    sys.exit(main())
