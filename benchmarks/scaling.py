"""Estimates of the time of communication on 8 to 1,024 GPUs, from the bytes of benchmarks/wire.py (which
benchmarks/algorithms.py measures on 2 to 4 ranks) and a model of bandwidth and latency. Nothing here is measured; every
assumption is a number below. Prints the tables of benchmarks/scaling.md.

    python benchmarks/scaling.py [--overlap 0.8] [--share 0.8]

A message takes alpha seconds plus its bytes / beta. An all-reduce is the fastest of a ring, a tree, and rings within
and between machines.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import ceil, log2, prod
from typing import NamedTuple

from growth import WORLDS as SMALL_WORLDS
from growth import law_table
from wire import FLOAT, HALF, ROUNDS, Collective, Settings, Shape, collectives

WORLDS = (8, 32, 128, 512, 1024)
BUCKET = 25 * 2**20  # bytes; DistributedDataParallel's default
BACKWARD = 2 / 3  # share of a step's computing: twice as much as the forward pass
BASE = (
    8.4e-6  # seconds a collective takes to start: NCCL's own model, src/graph/tuning.cc, baseLat, ring and Simple (2.8)
)
TREE = 0.9  # share of a ring's bandwidth that a tree reaches: the same file, busBw
MEMORY = 1555e9  # bytes per second of an A100's memory (its data sheet, 40 GB)
SETTINGS = Settings(period=4, rank=4)


class Link(NamedTuple):
    name: str
    alpha: float  # seconds per message
    beta: float  # bytes per second in one direction, nominal


class Cluster(NamedTuple):
    """Machines of m GPUs; `inner` is each GPU's link to the others, `outer` all ports of a machine together."""

    name: str
    m: int
    inner: Link
    outer: Link
    speed: float = 1.0  # of computing, relative to an A100


class Work(NamedTuple):
    """A model, and the seconds that a step's computing takes on an A100."""

    name: str
    shapes: list[Shape]
    seconds: float
    n_blocks: int  # to_fsdp gathers one block at a time

    @property
    def n(self) -> int:
        return sum(map(prod, self.shapes))


class Row(NamedTuple):
    """A row of the tables: a word and its settings; `hides`, the share of a step's computing during which gradients are
    sent.
    """

    name: str
    word: str
    settings: Settings = SETTINGS
    hides: float = 0.0
    touched: float = 0.0  # bytes of GPU memory read and written for each weight, in addition to all-reduce's
    touched_by_rank: float = 0.0
    exact: bool = False


# Seconds per message: NCCL's model (src/graph/tuning.cc, hwLat, ring and Simple); for Ethernet with TCP an assumption.
# NVLink: data sheets of A100 and H100, 600 and 900 GB/s in both directions.
NVLINK_3, NVLINK_4 = Link("NVLink 3", 3.4e-6, 300e9), Link("NVLink 4", 3.4e-6, 450e9)
PCIE_4 = Link("PCIe 4", 5.7e-6, 32e9)


def network(kind: str, gigabits: float, ports: int = 1) -> Link:
    alpha = {"InfiniBand": 9.6e-6, "RoCE": 9.6e-6, "Ethernet": 30e-6}[kind]
    return Link(f"{ports if ports > 1 else 'one'} × {gigabits:g} Gb/s {kind}", alpha, ports * gigabits / 8 * 1e9)


H100 = Cluster(
    "8 H100 a machine, NVLink 4, a port of 400 Gb/s InfiniBand each",
    8,
    NVLINK_4,
    network("InfiniBand", 400, 8),
    989 / 312,
)
DGX = Cluster(
    "8 A100 a machine, NVLink 3, a port of 200 Gb/s InfiniBand each", 8, NVLINK_3, network("InfiniBand", 200, 8)
)
ROCE = Cluster("8 A100 a machine, NVLink 3, one port of 100 Gb/s RoCE a machine", 8, NVLINK_3, network("RoCE", 100))
OFFICE = Cluster("4 A100 a machine, PCIe 4, one port of 25 Gb/s Ethernet a machine", 4, PCIE_4, network("Ethernet", 25))
SINGLE = Cluster("1 A100 a machine, 10 Gb/s Ethernet", 1, PCIE_4, network("Ethernet", 10))

# `touched`: counted in torch's hooks (2.15). To float16 and back: 4 + 2 + 2 + 4. powersgd: the error is added, a copy
# kept, two products computed, their results and the new error written. bytegrad: for each rank a byte is read, a float
# written, two read and their sum written.
ROWS = (
    Row("allreduce", "allreduce", hides=BACKWARD, exact=True),
    Row("fp16, bf16", "fp16", hides=BACKWARD, touched=12),
    Row("powersgd, rank 4", "powersgd", touched=44),
    Row("bytegrad", "bytegrad", touched=9, touched_by_rank=17),
    Row("local_sgd, period 4", "local_sgd", hides=BACKWARD),
    Row("hierarchical, period 4", "hierarchical"),
    Row("decentralized, period 4", "decentralized"),
    Row("to_fsdp", "to_fsdp", hides=1.0, exact=True),
    Row("to_fsdp, bfloat16", "to_fsdp", SETTINGS._replace(gathered=HALF), hides=1.0),
)


# --- models ------------------------------------------------------------------
def resnet50() -> list[Shape]:
    """Return the shapes of ResNet-50 (He et al., 2015); 25,557,032 weights in 161 parameters, as in torchvision."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width, n in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(n):
            shortcut = [(4 * width, before, 1, 1)] if i == 0 else []
            for shape in ((width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1), *shortcut):
                shapes += [shape, shape[:1], shape[:1]]
            before = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer(n_blocks: int = 24, d: int = 2048, n_words: int = 50257, n_places: int = 2048) -> list[Shape]:
    """Return the shapes of GPT-3 XL (Brown et al., 2020), whose output matrix is the embedding."""
    block: list[Shape] = [
        (d,),
        (d,),
        (3 * d, d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (4 * d, d),
        (4 * d,),
        (d, 4 * d),
        (d,),
    ]
    return [(n_words, d), (n_places, d), *block * n_blocks, (d,), (d,)]


# ResNet-50: 2,470 images per second, the figure of NVIDIA's DeepLearningExamples for one A100 in mixed precision; 256
# images per GPU and step. The transformer: 6 operations per weight and token, 16,384 tokens per GPU and step, at 40 %
# of an A100's 312 TFLOP/s (an assumption).
RESNET = Work("ResNet-50", resnet50(), 256 / 2470, 17)
GPT = Work(
    "a transformer of 1.3 billion weights",
    transformer(),
    6 * sum(map(prod, transformer())) * 16384 / (0.4 * 312e12),
    25,
)
PLANS = [(RESNET, cluster) for cluster in (DGX, ROCE, OFFICE, SINGLE)] + [
    (GPT, cluster) for cluster in (H100, DGX, ROCE, OFFICE)
]


# --- the model ---------------------------------------------------------------
def reduced(n_bytes: float, w: int, cluster: Cluster, share: float) -> tuple[float, str]:
    """Return (seconds, kind) of the fastest all-reduce of `n_bytes` over w ranks."""
    m, n_machines, inner, outer = places(w, cluster)
    found = {"ring": travelled("all_reduce", n_bytes, w, cluster, share)}
    narrow = share * min(inner.beta if m > 1 else outer.beta, outer.beta if n_machines > 1 else inner.beta)
    found["tree"] = BASE + 2 * ((m - 1) * inner.alpha + log2(n_machines) * outer.alpha) + 2 * n_bytes / (TREE * narrow)
    if m > 1 and n_machines > 1:
        found["rings in rings"] = BASE + sum(
            2 * ((g - 1) * link.alpha + (g - 1) / g * n_bytes / (share * link.beta))
            for g, link in ((m, inner), (n_machines, outer))
        )
    kind = min(found, key=lambda k: found[k])
    return found[kind], kind


def travelled(kind: str, n_bytes: float, w: int, cluster: Cluster, share: float) -> float:
    """Return the seconds of a ring over w ranks, in which the ports of each machine are one edge."""
    if w == 1:
        return 0.0
    m, n_machines, inner, outer = places(w, cluster)
    between = n_machines - 1
    narrow = share * min(inner.beta if m > 1 else outer.beta, outer.beta if between else inner.beta)
    return BASE + ROUNDS[kind] * (
        (w - 1 - between) * inner.alpha + between * outer.alpha + (w - 1) / w * n_bytes / narrow
    )


def places(w: int, cluster: Cluster) -> tuple[int, int, Link, Link]:
    m = min(cluster.m, w)
    return m, ceil(w / m), cluster.inner, cluster.outer


def communication(row: Row, work: Work, w: int, cluster: Cluster, share: float) -> tuple[float, float]:
    """Return the mean seconds per step in which gradients (or shards of a model) are sent, and in which weights are
    averaged.
    """
    parts = collectives(row.word, work.shapes, w, min(cluster.m, w), row.settings)
    seconds = [(part.every == 1, duration(part, row, work, w, cluster, share)) for part in parts]
    return sum(s for each_step, s in seconds if each_step), sum(s for each_step, s in seconds if not each_step)


def duration(part: Collective, row: Row, work: Work, w: int, cluster: Cluster, share: float) -> float:
    n_calls = n_calls_of(row.word, part, work)
    n_bytes, g = part.n_bytes / n_calls, min(cluster.m, w) if part.group == "machine" else w
    one = (
        reduced(n_bytes, g, cluster, share)[0]
        if part.kind == "all_reduce"
        else travelled(part.kind, n_bytes, g, cluster, share)
    )
    return n_calls * one / part.every


def n_calls_of(word: str, part: Collective, work: Work) -> int:
    """Return the number of calls: weights are averaged in one piece, gradients bucket by bucket, a sharded model block
    by block.
    """
    if part.every > 1:
        return 1
    return work.n_blocks if word == "to_fsdp" else ceil(FLOAT * work.n / BUCKET)


def step(row: Row, work: Work, w: int, cluster: Cluster, overlap: float, share: float) -> tuple[float, float]:
    """Return (seconds of communication, efficiency: computing divided by the whole step). The last piece does not
    overlap with computing.
    """
    (travels, averages), computing = communication(row, work, w, cluster, share), work.seconds / cluster.speed
    hidden = min(overlap * row.hides * computing, travels * (1 - 1 / n_pieces(row, work)))
    touched = (row.touched + row.touched_by_rank * w) * work.n / MEMORY / cluster.speed
    return travels + averages, computing / (computing + touched + travels - hidden + averages)


def n_pieces(row: Row, work: Work) -> int:
    return work.n_blocks if row.word == "to_fsdp" else ceil(FLOAT * work.n / BUCKET)


# --- tables ------------------------------------------------------------------
def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def plan(work: Work, cluster: Cluster, overlap: float, share: float) -> str:
    def cell(row: Row, w: int) -> str:
        seconds, efficiency = step(row, work, w, cluster, overlap, share)
        return f"{seconds * 1e3:,.1f} ms, {efficiency:.0%}"

    milliseconds = work.seconds / cluster.speed * 1e3
    title = f"**{work.name}** ({work.n:,} weights, {milliseconds:.0f} ms of computing a step); {cluster.name}"
    return f"{title}\n\n" + table(
        ["word", *(f"{w:,}" for w in WORLDS)], [[row.name, *(cell(row, w) for w in WORLDS)] for row in ROWS]
    )


def choices(overlap: float, share: float) -> str:
    """Return a table of the best word that changes no number, and of the best of all words."""

    def best(work: Work, cluster: Cluster, w: int) -> str:
        found = {row.name: round(step(row, work, w, cluster, overlap, share)[1], 2) for row in ROWS}
        names = (
            max((row.name for row in ROWS if row.exact), key=lambda name: found[name]),
            max(found, key=lambda name: found[name]),
        )
        return "; ".join(f"{name} {found[name]:.0%}" for name in dict.fromkeys(names))

    rows = [
        [
            f"{'ResNet-50' if work is RESNET else '1.3 billion'}, {cluster.outer.name}",
            *(best(work, cluster, w) for w in (8, 128, 1024)),
        ]
        for work, cluster in PLANS
    ]
    return table(["", "8", "128", "1,024"], rows)


def reductions(share: float) -> str:
    """Return a table of the fastest all-reduce, for a bucket and for a number."""

    def cell(n_bytes: float, cluster: Cluster, w: int) -> str:
        seconds, kind = reduced(n_bytes, w, cluster, share)
        return f"{seconds * 1e3:,.2f} ms, {kind}"

    rows = [
        [f"{what}, {cluster.outer.name}", *(cell(n, cluster, w) for w in WORLDS)]
        for what, n in (("25 MiB", BUCKET), ("16 bytes", 16))
        for cluster in (H100, DGX, ROCE, OFFICE, SINGLE)
    ]
    return table(["", *(f"{w:,}" for w in WORLDS)], rows)


def bytes_of_rank() -> str:
    """Return a table of what one rank sends per step, in multiples of 4n."""

    def cell(row: Row, w: int, m: int) -> str:
        shapes: list[Shape] = RESNET.shapes
        total = sum(
            ROUNDS[c.kind] * (g - 1) / g * c.n_bytes / c.every
            for c in collectives(row.word, shapes, w, m, row.settings)
            for g in [m if c.group == "machine" else w]
        )
        return f"{total / (FLOAT * RESNET.n):.3f}"

    return table(
        ["word", *(f"{w:,}" for w in WORLDS)], [[row.name, *(cell(row, w, 8) for w in WORLDS)] for row in ROWS]
    )


def sections(overlap: float = 0.8, share: float = 0.8) -> Iterator[str]:
    yield (
        "What one rank sends per step, in multiples of the gradients' bytes (4n), ResNet-50, 8 ranks a machine\n\n"
        + bytes_of_rank()
    )
    yield "The quickest all-reduce, and its time\n\n" + reductions(share)
    for work, cluster in PLANS:
        yield plan(work, cluster, overlap, share)
    yield (
        "The highest efficiency: of the words that change no number; and of all, where another's is higher\n\n"
        + choices(overlap, share)
    )
    yield law_table([*SMALL_WORLDS, 1024])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.8,
        help="share of the backward pass (to_fsdp: of the step) that overlaps with communication",
    )
    parser.add_argument("--share", type=float, default=0.8, help="share of a link's nominal bandwidth that is reached")
    args = parser.parse_args()
    print("\n\n".join(sections(args.overlap, args.share)))


if __name__ == "__main__":
    main()
