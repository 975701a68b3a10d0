"""What each word of `to_distributed(algorithm=…)`, and `to_fsdp`, sends in a step, as a list of collectives.

Two scripts use this formula: benchmarks/algorithms.py measures it, benchmarks/scaling.py makes estimates with it. `w`
is the number of ranks, `m` the number of ranks on one machine. Bytes are those of all ranks together; a ring over g
ranks sends (g − 1) n bytes for an all-gather or a reduce-scatter of n, and twice that for an all-reduce, for any g.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import NamedTuple

Shape = tuple[int, ...]
WORDS = ("allreduce", "fp16", "bf16", "powersgd", "bytegrad", "local_sgd", "hierarchical", "decentralized", "to_fsdp")
ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
GLOO_ROUNDS = {
    **ROUNDS,
    "reduce_scatter": 2,
}  # gloo has no reduce-scatter: PyTorch does an all-reduce, and keeps a part (torch 2.15)
FLOAT, HALF, BYTE = 4, 2, 1


class Settings(NamedTuple):
    """The options of an algorithm; for to_fsdp the bytes of a gathered weight, and whether the whole model is in
    blocks.
    """

    period: int = 4
    rank: int = 1
    gathered: int = FLOAT
    in_blocks: bool = True


DEFAULT = Settings()


class Collective(NamedTuple):
    """A collective of a step. `n_bytes`: of its result, or, for a reduce-scatter, of each rank's input. It takes place
    every `every` steps on average.
    """

    kind: str
    n_bytes: float
    group: str = "world"  # or "machine"
    every: float = 1.0


def collectives(word: str, shapes: Sequence[Shape], w: int, m: int, settings: Settings = DEFAULT) -> list[Collective]:
    """Return the collectives of one step after the warm-up, for a model with parameters of these shapes."""
    n, period = sum(map(prod, shapes)), settings.period
    weights = Collective("all_reduce", FLOAT * n, every=period)
    alone = m in (1, w)  # machines matter only if there are several, with several ranks each
    if word == "allreduce":
        return [Collective("all_reduce", FLOAT * n)]
    if word in ("fp16", "bf16"):
        return [Collective("all_reduce", HALF * n)]
    if word == "powersgd":
        return powersgd(shapes, settings.rank)
    if word == "bytegrad":
        return [Collective("all_gather", BYTE * n * w)]
    if word == "decentralized" or (word in ("local_sgd", "hierarchical") and alone):
        return [weights]
    if word == "local_sgd":
        return [Collective("all_reduce", FLOAT * n, "machine"), weights]
    if word == "hierarchical":
        return [
            Collective("all_reduce", FLOAT * n, "machine", every=period * 4 / 3),
            weights._replace(every=4 * period),
        ]
    if word == "to_fsdp":
        spread = sum(padded(shape, w) for shape in shapes)
        gathers = [Collective("all_gather", settings.gathered * spread)] * (2 if settings.in_blocks else 1)
        return [*gathers, Collective("reduce_scatter", FLOAT * spread)]
    raise ValueError(f"{word!r}: expected one of {', '.join(WORDS)}.")


def powersgd(shapes: Sequence[Shape], rank: int) -> list[Collective]:
    """Return the collectives of PowerSGD: two matrices for each compressed one, and the others uncompressed."""
    matrices = [as_matrix(shape) for shape in shapes]
    compressed = [
        (rows, columns)
        for rows, columns in matrices
        if 2 * (rows + columns) * min(rows, columns, rank) < rows * columns
    ]
    rest = sum(map(prod, matrices)) - sum(map(prod, compressed))
    ranks = [min(rows, columns, rank) for rows, columns in compressed]
    sides = zip(*[(r * rows, r * columns) for r, (rows, columns) in zip(ranks, compressed, strict=True)], strict=True)
    return [Collective("all_reduce", FLOAT * n) for n in (rest, *map(sum, sides))]


def as_matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], prod(shape[1:]) if len(shape) > 1 else 1


def padded(shape: Shape, w: int) -> int:
    """Return the size of a parameter sharded over w ranks by its rows, with padding to equal shards."""
    return ceil(shape[0] / w) * w * prod(shape[1:])


def sent(collective: Collective, w: int, m: int, rounds: dict[str, int] = ROUNDS) -> float:
    """Return the bytes that all ranks together send for a collective per step, on average."""
    g = m if collective.group == "machine" else w
    return w / g * rounds[collective.kind] * (g - 1) * collective.n_bytes / collective.every


def crossing(collective: Collective, w: int, m: int, rounds: dict[str, int] = ROUNDS) -> float:
    """Return those of these bytes that go between machines: in a ring in rank order, each machine has one edge to the
    next one.
    """
    return 0.0 if collective.group == "machine" or m == w else sent(collective, w, m, rounds) / m
