"""The communication of the Learner besides the algorithm's, counted on 2, 3 and 4 ranks and compared with a law of its
growth with the world size.

    python benchmarks/growth.py [--ranks 2 3 4]

It counts, and measures no seconds: requests to the store that the ranks share (segments that the kernel sent over a
rank's connections to it, TCP_INFO), bytes that arrive from other ranks, collectives (as the dispatcher sees them), and
bytes of a checkpoint. Each count must be within 5 % of its law, or within the law's slack, or the exit code is 1.
benchmarks/scaling.py prints the laws for 1,024 ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

WORLDS, TOLERANCE = (2, 3, 4), 0.05
N_SAMPLES, BATCH, N_STEPS, WATCHED = 960, 8, 40, 6.0  # WATCHED: seconds
SIGN = 222  # bytes of a sign of life
STATE, REST, SENT = (
    14_440,
    2_000,
    20_360,
)  # bytes: random states (torch, Python, numpy) in a file; the rest of the file; the states as sent
HEADER, MESSAGE = (
    1024,
    288,
)  # bytes: at the start of each part of a gather (learnkit.distributed.reduce); gloo's header per message


class Law(NamedTuple):
    """The growth of a count. `grows`: the same in words; `by`: which rank counts it; `slack`: allowed difference in
    addition to 5 %.
    """

    what: str
    by: str
    grows: str
    value: Callable[[int], float]
    slack: float = 0.0


def looks(w: int) -> float:
    """Return the looks of a guard per second, as in learnkit.distributed.watcher.pause_between_looks."""
    return 5 / min(4, max(1, w / 256))


def signs(w: int) -> float:
    """Return the signs of life per second: each is sent at the first look half a second after the last sign."""
    return looks(w) / ceil(0.5 * looks(w))


def ring(w: int, n_bytes: float) -> float:
    """Return the bytes that each rank sends, and receives, for an all-reduce."""
    return 2 * (w - 1) / w * n_bytes


LAWS = {
    "join": Law(
        "requests to the store until the group is there",
        "a rank",
        "3w + 16, of which PyTorch's 3w; some more while it waits",
        lambda w: 3 * w + 16,
        10,
    ),
    "connections": Law("connections of gloo", "a rank", "w − 1", lambda w: w - 1),
    "guard of rank 0": Law(
        "requests of the guard a second",
        "rank 0",
        "constant; fewer beyond 256",
        lambda w: 2 * looks(w) + 5 * signs(w),
        1.5,
    ),
    "guard of another": Law(
        "requests of the guard a second",
        "another rank",
        "constant; fewer beyond 256",
        lambda w: 2 * looks(w) + 4 * signs(w),
        1.5,
    ),
    "signs": Law(
        "bytes of signs of life that it reads a second",
        "rank 0",
        f"{SIGN} (w − 1) / 0.6",
        lambda w: SIGN * (w - 1) * signs(w),
        150,
    ),
    "step": Law("collectives of a step beside the algorithm's", "a rank", "none", lambda w: 0),
    "epoch": Law("collectives of an epoch with a validation", "a rank", "constant", lambda w: 4),
    "fit": Law("collectives at a fit's start and end", "a rank", "constant", lambda w: 9),
    "compared": Law("bytes to compare what must be equal", "a rank", "constant", lambda w: 304, 250),
    "measured": Law("bytes for a validation's loss and accuracy", "a rank", "constant", lambda w: 704, 250),
    "recorded": Law(
        f"bytes for the losses of {N_STEPS} steps",
        "a rank",
        f"{HEADER + 3 * MESSAGE:,} (w − 1), and 32 a step",
        lambda w: (HEADER + 3 * MESSAGE) * (w - 1) + ring(w, 16 * N_STEPS),
    ),
    "predicted": Law(
        f"bytes for {N_SAMPLES} predictions of 10 numbers",
        "a rank",
        "48 n (w − 1) / w, and descriptions",
        lambda w: (w - 1) / w * N_SAMPLES * 48 + (w - 1) * (HEADER + 110 * N_SAMPLES / BATCH / w),
        500,
    ),
    "states": Law("bytes of the ranks' states, at a save", "rank 0", f"{SENT:,} (w − 1)", lambda w: SENT * (w - 1)),
    "states of another": Law(
        "bytes of the ranks' states, at a save",
        "another rank",
        "240 (w − 1): their lengths",
        lambda w: 240 * (w - 1),
        500,
    ),
    "saved": Law(
        "bytes of a checkpoint, without model and optimizer",
        "rank 0",
        f"{REST:,} + {STATE:,} w",
        lambda w: REST + STATE * w,
    ),
}


def law_table(worlds: list[int]) -> str:
    lines = [
        f"| what the Learner adds | of | law | {' | '.join(f'{w:,}' for w in worlds)} |",
        f"|{' --- |' * (3 + len(worlds))}",
    ]
    for law in LAWS.values():
        lines.append(f"| {law.what} | {law.by} | {law.grows} | {' | '.join(f'{law.value(w):,.0f}' for w in worlds)} |")
    return "\n".join(lines)


# --- counting ----------------------------------------------------------------
def counted(folder: str) -> dict[str, float]:
    """Return all counts of LAWS, as this rank sees them."""
    from connections import to_ranks, to_store

    from learnkit.checkpoint import resume
    from learnkit.distributed import check_same, get_rank, init_process_group

    init_process_group()
    found: dict[str, float] = {"join": to_store().segments, "connections": len(to_ranks())}
    learn = learner(N_STEPS)
    states = {"random": resume.random_state(learn.device), "callbacks": {}}
    found |= {
        "compared": received(lambda: check_same({"a fact": 1})),
        "measured": received(lambda: learn.ranks.all_sum([1.0, 2.0, 3.0, 4.0])),
        "states of another" if get_rank() else "states": received(lambda: learn.ranks.gather_on_main(states)),
        "predicted": received(learn.get_preds),
        "recorded": received(lambda: losses_of_all(learn)),
    }
    once, twice, longer = (
        collectives_of(learner(n), epochs) for n, epochs in ((N_STEPS, 1), (N_STEPS, 2), (2 * N_STEPS, 1))
    )
    found |= {
        "step": (longer - once) / N_STEPS - 1,
        "epoch": twice - once - N_STEPS,
    }  # 1: the all-reduce of DDP's only bucket
    found["fit"] = once - found["epoch"] - N_STEPS
    save(folder)
    found["guard of another" if get_rank() else "guard of rank 0"], read = watched()
    return found | ({} if get_rank() else {"signs": read, "saved": saved(folder)})


def learner(n_steps: int) -> Any:
    import torch
    from torch import nn

    from learnkit import DataBunch, Learner, accuracy

    w = int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    x = torch.randn(max(N_SAMPLES, n_steps * BATCH * w), 4)
    y = (x[:, 0] > 0).long()
    data = DataBunch.from_tensors(
        (x[: n_steps * BATCH * w], y[: n_steps * BATCH * w]), (x[:N_SAMPLES], y[:N_SAMPLES]), bs=BATCH, seed=0
    )
    return Learner(data, nn.Linear(4, 10), metrics=accuracy).to_distributed()


def received(action: Callable[[], object]) -> float:
    """Return the bytes that arrive from other ranks during `action`."""
    from connections import to_ranks

    from learnkit.distributed import barrier

    def total() -> int:
        return sum(counts.received for counts in to_ranks().values())

    barrier()
    time.sleep(0.2)  # exclude what others still send for the barrier
    before = total()
    action()
    found = total() - before
    time.sleep(0.2)  # faster ranks must not begin the next barrier within the measurement of the others
    return found


def save(folder: str) -> None:
    from learnkit.callbacks import Checkpoint

    learn = learner(1)
    with learn.no_logging():
        learn.fit(1, callbacks=[Checkpoint(folder)])


def losses_of_all(learn: Any) -> None:
    """Do what Recorder communicates after an epoch of N_STEPS steps."""
    import torch
    from torch import nn

    from learnkit.callbacks import Recorder

    recorder = Recorder()
    recorder.counts = [BATCH] * N_STEPS
    for _ in range(N_STEPS):
        recorder.trace.append(nn.functional.mse_loss(torch.ones(1), torch.zeros(1)))
    recorder.after_train(learn)


def collectives_of(learn: Any, n_epochs: int) -> int:
    from measure import Traffic

    with Traffic() as traffic, learn.no_logging():
        learn.fit(n_epochs)
    return sum(n for name, n in traffic.counts.items() if name != "read")


def watched() -> tuple[float, float]:
    """Return (requests to the store, bytes from it) per second, while a guard watches and nothing else happens."""
    from connections import to_store

    from learnkit.distributed import barrier, guard

    with guard() as watch:
        watch.stop_together()  # as in a fit
        time.sleep(1.5)
        before = to_store()
        time.sleep(WATCHED)
        after = to_store()
        barrier()
    return (after.segments - before.segments) / WATCHED, (after.received - before.received) / WATCHED


def saved(folder: str) -> float:
    """Return the bytes of the folder's checkpoint without those of model and optimizer."""
    sizes = {path.name: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    return sum(size for name, size in sizes.items() if not name.startswith(("model", "optimizer")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(WORLDS))
    args = parser.parse_args()
    import torch
    from measure import machine

    torch.set_num_threads(1)
    print(machine())
    good = True
    for w in args.ranks:
        good = report(w, measured(w)) and good
    sys.exit(0 if good else 1)


def measured(w: int) -> dict[str, float]:
    """Return the counts of w ranks: rank 0's, and rank 1's for what is counted on another rank."""
    # optimizers import it; imported here, because the forked ranks then need not import it, which takes 2 s each
    import torch._dynamo  # noqa: F401

    from learnkit.distributed import launch

    with tempfile.TemporaryDirectory() as folder:
        first, second, *_ = launch(counted, w, folder, every_rank=True)
    return {**second, **first}


def differences(w: int, found: dict[str, float]) -> dict[str, float]:
    """Return the counts that differ from their law by more than allowed, with the difference."""
    off = {name: found[name] - law.value(w) for name, law in LAWS.items()}
    return {name: by for name, by in off.items() if abs(by) > TOLERANCE * LAWS[name].value(w) + LAWS[name].slack}


def report(w: int, found: dict[str, float]) -> bool:
    off = differences(w, found)
    print(f"\n{f'{w} ranks':55} {'counted':>10} {'law':>10}")
    for name, law in LAWS.items():
        print(
            f"{f'{law.what}, {law.by}':65} {found[name]:10,.1f} {law.value(w):10,.1f}{'   OFF' if name in off else ''}"
        )
    return not off


if __name__ == "__main__":
    main()
