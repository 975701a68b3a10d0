"""What must hold of a draw. Each check is a function of a configuration that gives what is wrong, one line each;
nothing is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.fuzz.compare import differences
from tests.fuzz.configuration import Configuration
from tests.fuzz.learner_source import compiled
from tests.fuzz.lives import History, Life, history
from tests.fuzz.refusals import Refused, known

Places = dict[tuple[int, int, int], list[list[int]]]


class Failed(Exception):
    """A life ended as none should."""


def told(c: Configuration, *lives: Life) -> History:
    """A history without an unexplained failure. Raises Refused for one that is known, Failed for any other."""
    found = history(c, *lives)
    last = found.last
    if last.how == "failed":
        reason = known(last.reason, c)
        if (
            reason is not None
            and last.before_first_step
            and last.alike
            and (len(found.lives) == 1 or lives[len(found.lives) - 1].world != lives[0].world)
        ):
            raise Refused(reason)
        late = (
            ""
            if last.before_first_step
            else " (not before the first step, or not on all ranks alike)"
            if reason
            else ""
        )
        raise Failed(f"life {len(found.lives)} of {len(lives)} failed{late}: {last.reason}")
    return found


# --- what holds of every history ---------------------------------------------
def what_is_wrong(c: Configuration, found: History) -> list[str]:
    """Files, the order of samples, and whether all ranks end with the same."""
    wrong = [f"files: {line}" for line in found.litter]
    ranks = found.last.ranks
    for key in ("weights", "measured", "history", "validated", "predicted", "optimizer", "step"):
        if not ranks or key not in ranks[0] or (c.has("own weights") and key in ("optimizer", "weights")):
            continue
        for rank in range(1, len(ranks)):
            wrong += [
                f"ranks: rank {rank} {line}"
                for line in differences(shared(c, ranks[0][key]), shared(c, ranks[rank][key]), at=key)[:3]
            ]
    if not c.has("repeats") and not (c.world > 1 and c.has("own order")) and c.source != "DistributedSampler":
        for places in found.seen:
            wrong += twice(places)
    if len(found.lives) == 1:
        wrong += missing(c, found.seen[0])
    return wrong


def without_places(logs: Any) -> Any:
    """Of logs, the rows of numbers: what a run is tells the number of ranks too."""
    return (
        {name: [row for row in rows if "config" not in row] for name, rows in logs.items()}
        if isinstance(logs, dict)
        else logs
    )


def shared(c: Configuration, value: Any) -> Any:
    """Without the losses of an epoch that was left within: "of all ranks, once the epoch is over" (Recorder)."""
    is_left = c.stop is not None and c.stop[0] != "StopTrain"
    return {k: v for k, v in value.items() if k != "losses"} if is_left and isinstance(value, dict) else value


def twice(places: Places) -> list[str]:
    """Samples that an epoch has more than once."""
    epochs: dict[tuple[int, int], Counter[int]] = {}
    for (fit, epoch, _), ranks in places.items():
        epochs.setdefault((fit, epoch), Counter()).update(number for own in ranks for number in own)
    return [
        f"order: fit {fit}, epoch {epoch} has {sorted(k for k, n in counts.items() if n > 1)} more than once"
        for (fit, epoch), counts in epochs.items()
        if max(counts.values()) > 1
    ]


def missing(c: Configuration, places: Places) -> list[str]:
    """Samples that a whole epoch lacks, beyond a last batch that is left out."""
    if c.max_steps is not None or c.stop is not None or c.has("repeats", "stops") or c.source == "DistributedSampler":
        return []
    left_out = c.n % c.global_bs if c.drop_last or c.has("drops", "dealt") else min(c.n % c.global_bs, c.world - 1)
    if c.has("dealt") and c.has("own order"):  # whole batches, in any order: the last round may lack any of them
        bs = c.global_bs // c.world
        left_out = max(left_out, -(-c.n // bs) % c.world * bs)
    epochs = Counter((fit, epoch) for (fit, epoch, _), ranks in places.items() for own in ranks for _ in own)
    return [
        f"order: fit {fit}, epoch {epoch} has {n} of {c.n} samples"
        for (fit, epoch), n in epochs.items()
        if n < c.n - left_out
    ]


def same_order(c: Configuration, expected: Places, found: list[Places], *, exactly: bool) -> list[str]:
    """Whether each batch that was seen is the expected one: rank by rank, or as a set of all ranks together."""
    if not exactly and c.has("own order"):
        return []

    def of(ranks: list[list[int]]) -> Any:
        return ranks if exactly else sorted(number for own in ranks for number in own)

    def begun(ranks: list[list[int]], whole: list[list[int]]) -> list[list[int]]:
        """Of ranks some of which were ended before they had this batch, what they would have had."""
        return [own or expected for own, expected in zip(ranks, whole, strict=False)]

    for life, places in enumerate(found):
        for place, ranks in places.items():
            if place not in expected:
                return [f"order: life {life + 1} has a batch at fit, epoch, batch {place}, where none is expected"]
            if life < len(found) - 1 and not all(ranks):
                if not exactly:
                    continue
                ranks = begun(ranks, expected[place])
            if of(ranks) != of(expected[place]):
                return [
                    f"order: life {life + 1} at fit, epoch, batch {place} has {of(ranks)}, expected "
                    f"{of(expected[place])}"
                ]
    lost = expected.keys() - {place for places in found for place in places}
    return [f"order: nobody had fit, epoch, batch {sorted(lost)[:4]}"] if lost else []


def compared(
    c: Configuration, a: History, b: History, *, close: bool = False, without: tuple[str, ...] = ()
) -> list[str]:
    """Rank by rank where they have as many, else of rank 0."""
    wrong = []
    if close:
        for rank in (*a.last.ranks, *b.last.ranks):
            rank["logs"] = without_places(rank.get("logs"))
    pairs = zip(a.last.ranks, b.last.ranks, strict=False)
    for rank, (x, y) in enumerate(pairs):
        for key in x.keys() | y.keys():
            if key not in without:
                wrong += [
                    f"{line} (rank {rank})"
                    for line in differences(
                        *(shared(c, v.get(key)) if close else v.get(key) for v in (x, y)), close=close, at=key
                    )
                ]
        if len(a.last.ranks) != len(b.last.ranks):
            break
    return wrong


# --- the checks --------------------------------------------------------------
def lives_of(c: Configuration) -> list[Life]:
    lives, world = [], c.world
    for k, interruption in enumerate(c.interruptions):
        lives.append(Life(world, k > 0, interruption))
        world = interruption.world
    return [*lives, Life(world, bool(c.interruptions))]


def resumed(c: Configuration) -> list[str]:
    """A fit that was interrupted, any number of times, and resumed on as many ranks, is to the last bit one that never
    was.
    """
    c = c.changed(interruptions=tuple(replace(i, world=c.world) for i in c.interruptions))
    never_stopped, again = told(c, Life(c.world)), told(c, *lives_of(c))
    wrong = what_is_wrong(c, never_stopped) + what_is_wrong(c, again)
    wrong += same_order(c, never_stopped.seen[0], again.seen, exactly=True)
    return wrong + [f"resumed: {line}" for line in compared(c, never_stopped, again)]


def elsewhere(c: Configuration) -> list[str]:
    """Resumed on another number of ranks, with as many samples in a step: the same batches, and where nothing else
    depends on ranks the same numbers, but for the order of sums.
    """
    again = told(c, *lives_of(c))
    wrong = what_is_wrong(c, again)
    worlds = {c.world, *(i.world for i in c.interruptions)}
    reference = told(c, Life(c.world))
    if c.has("dealt"):  # a loader's own batches, as large in any world: steps are of other ones
        return wrong
    if all(size % world == 0 for world in worlds for size in (c.n % c.global_bs, c.global_bs)) and not c.has("drops"):
        wrong += same_order(c, reference.seen[0], again.seen, exactly=False)
        if c.changed(other_world=max(worlds)).is_exact_in_any_world:
            wrong += [
                f"elsewhere: {line}"
                for line in compared(c, reference, again, close=True, without=("random", "callbacks"))
            ]
    return wrong


def worlds(c: Configuration) -> list[str]:
    """The same batches on another number of ranks, and the same numbers but for the order of sums: float64, so 1e-9 is
    generous.
    """
    other = c.changed(world=c.other_world)
    a, b = told(c, Life(c.world)), told(other, Life(c.other_world))
    wrong = what_is_wrong(c, a) + what_is_wrong(other, b)
    if c.is_exact_in_any_world or not c.has("stops"):
        wrong += same_order(c, a.seen[0], b.seen, exactly=False)
    if c.is_exact_in_any_world:
        wrong += [f"worlds: {line}" for line in compared(c, a, b, close=True, without=("random", "callbacks"))]
    return wrong


def traces(c: Configuration) -> list[str]:
    """What is called between, or amid a fit, changes nothing of what follows."""
    plain, with_calls = told(c.changed(between=()), Life(c.world)), told(c, Life(c.world))
    wrong = same_order(c, plain.seen[0], with_calls.seen, exactly=True)
    return wrong + [f"traces: {line}" for line in compared(c, plain, with_calls)]


def micro_batches(c: Configuration) -> list[str]:
    """k batches of a k-th of the samples are one step: of Accumulate(k), and of AutoMicrobatch."""
    k = 2
    small = c.changed(global_bs=c.global_bs // k, callbacks=(*c.callbacks, f"Accumulate({k})"))
    parts = c.changed(callbacks=(*c.callbacks, "AutoMicrobatch(2)"))
    whole = told(c, Life(c.world))
    wrong = []
    for name, other in (("Accumulate", small), ("AutoMicrobatch", parts)):
        found = told(other, Life(c.world))
        wrong += [f"{name}: {line}" for line in compared(c, whole, found, close=True, without=("random", "callbacks"))]
    return wrong


def loop_by_hand(c: Configuration) -> list[str]:
    """The same weights, optimizer state and losses as of a loop in plain PyTorch over the same batches, to the last
    bit; the rates but for rounding, as they are written otherwise.
    """
    from tests.fuzz import by_hand
    from tests.fuzz.isolate import isolated

    found = told(c, Life(c.world))
    [rank] = found.last.ranks
    history = rank["history"]
    hand = isolated(by_hand.by_hand, c, compiled(c), found.seen[0], history)
    fit = {"weights": rank["weights"], "optimizer": rank["optimizer"]["state"], "losses": history["losses"]}
    wrong = [f"by hand: {line}" for key in hand for line in differences(hand[key], fit[key], at=key)]
    n = len(history["lrs"])
    if c.fits[0] in by_hand.RATES and not c.has("own schedule"):
        wrong += [
            f"by hand: {line}"
            for line in differences(by_hand.expected_rates(c, n), list(history["lrs"]), close=True, at="rates")
        ]
    return wrong + what_is_wrong(c, found)


def stops(c: Configuration) -> list[str]:
    """What one rank stops, all stop, after the same step, which may be one or two later: no other run has the same
    numbers.
    """
    return what_is_wrong(c, told(c, Life(c.world)))


def refusal(c: Configuration) -> list[str]:
    """What does not go together is refused before the first step, on all ranks alike, and within the time."""
    told(c, Life(c.world))  # raises Refused
    return ["refusal: this was not refused"]


CHECKS: dict[str, Callable[[Configuration], list[str]]] = {
    "resumed": resumed,
    "elsewhere": elsewhere,
    "worlds": worlds,
    "traces": traces,
    "micro_batches": micro_batches,
    "loop_by_hand": loop_by_hand,
    "refusal": refusal,
    "stops": stops,
}


def check(c: Configuration) -> tuple[str, list[str]]:
    """("right" | "refused" | "wrong", what is wrong or why it is refused)."""
    try:
        wrong = CHECKS[c.check](c)
    except Refused as refused:
        return "right" if c.check == "refusal" else "refused", [str(refused)]
    except Failed as failed:
        return "wrong", [str(failed)]
    return ("wrong", wrong) if wrong else ("right", [])
