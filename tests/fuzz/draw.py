"""From a number to a configuration."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tests.fuzz.between import BETWEEN
from tests.fuzz.by_hand import can_be_written
from tests.fuzz.callbacks import CALLBACKS
from tests.fuzz.configuration import OF_CODE, SIMPLEST, Configuration, Interruption
from tests.fuzz.fits import FITS, METRICS
from tests.fuzz.interruptions import HOOKS, INTERRUPTIONS
from tests.fuzz.models import MODELS
from tests.fuzz.optimizers import OPTIMIZERS
from tests.fuzz.part import Part
from tests.fuzz.refusals import CONFLICTS
from tests.fuzz.sources import SOURCES, VALID
from tests.fuzz.spreads import PRECISIONS, SPREADS

CHECK_WEIGHTS = {
    "resumed": 50,
    "elsewhere": 16,
    "worlds": 14,
    "traces": 12,
    "micro_batches": 4,
    "loop_by_hand": 10,
    "refusal": 4,
    "stops": 3,
}
WORLD_WEIGHTS = {1: 40, 2: 45, 3: 15}


# Orders of samples that are cut into batches: a batch of k samples is the next two of k / 2.
SPLITS = (
    "from_tensors",
    "from_tensors, seed",
    "TensorLoader",
    "create",
    "DataLoader",
    "DataLoader, shuffle",
    "RandomSampler, generator",
    "SequentialSampler",
    "own sampler",
    "own sampler, set_epoch",
    "list of batches",
    "generator class",
)


class Draw:
    """A stream of choices, the same for the same number."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(f"draw {number}")

    def weighted(self, weights: Mapping[Any, float]) -> Any:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def of(self, table: Mapping[str, Part], *avoid: str) -> str:
        return self.weighted(
            {name: part.weight for name, part in table.items() if not any(part.has(trait) for trait in avoid)}
        )

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


def draw(number: int) -> Configuration:
    d = Draw(number)
    check = d.weighted(CHECK_WEIGHTS)
    world = d.weighted(WORLD_WEIGHTS)
    other_world = d.one(*({1, 2, 3} - {world}))
    c = Configuration(
        check=check,
        world=world,
        other_world=other_world if check == "worlds" else 1,
        epochs=d.one(1, 2, 2, 3),
        metrics=d.of(METRICS),
        seed=d.one(None, None, 1),
        bn_wd=d.chance(0.8),
        **of_data(d, check),
        **of_training(d, check, world, other_world),
    )
    c = c.changed(callbacks=of_callbacks(d, c, d.weighted({0: 3, 1: 4, 2: 3, 3: 2, 4: 1})))
    if d.chance(0.25) and not c.has("two fits"):
        c = c.changed(
            fits=(
                *c.fits,
                d.of(
                    FITS,
                    *(["length"] if c.has("unsized") else []),
                    *([] if c.has("groups") else ["groups"]),
                    "two fits",
                ),
            )
        )
        if d.chance(0.4):
            c = c.changed(
                own_callbacks=tuple(
                    o for o in of_callbacks(d, c, 1) if o.split("(")[0] not in {b.split("(")[0] for b in c.callbacks}
                )
            )
    if d.chance(0.12):
        c = c.changed(max_steps=d.random.randint(1, 5))
    if d.chance(0.12):
        c = c.changed(stop=(d.one("StopFit", "StopFit", "StopEpoch", "StopTrain"), d.random.randint(1, 4)))
    c = c.changed(checkpoint=of_checkpoint(d))
    if check == "refusal":
        c = c.changed(max_steps=None, stop=None, own_callbacks=(), fits=("fit",), callbacks=())
        return fitting(c).changed(**d.one(*CONFLICTS.values()))
    if check in ("resumed", "elsewhere"):
        c = c.changed(interruptions=of_interruptions(d, c))
    if check == "traces":
        c = c.changed(between=of_calls(d, c))
    elif d.chance(0.1):
        c = c.changed(between=of_calls(d, c)[:1])
    return fitting(c)


MICRO = (
    "Accumulate",
    "AutoMicrobatch",
    "SAM",
    "CutMix",
    "MixUp",
    "ActivationStats",
    "GradientNoise",
    "Smooth",
    "ParamScheduler",
    "Logger",
    "GradientStats",
    "SecondOptimizer",
    "EarlyStopping",
    "ReduceLR",
)


def of_data(d: Draw, check: str) -> dict[str, Any]:
    n, global_bs = d.one((24, 12), (36, 12), (30, 12), (18, 6), (29, 6), (25, 12), (36, 6))
    avoid = ["alone"] if d.chance(0.9) else []
    return {
        "n": n,
        "global_bs": global_bs,
        "drop_last": d.chance(0.4),
        "source": d.of(SOURCES, *avoid),
        "valid": d.of(VALID),
    }


def of_training(d: Draw, check: str, world: int, other_world: int) -> dict[str, Any]:
    by_numbers = check in ("worlds", "elsewhere", "micro_batches")
    spread = d.of(SPREADS, *([] if not by_numbers or d.chance(0.2) else ["own weights", "float32"]))
    if max(world, other_world if by_numbers else 1) > 1 and spread == "alone":
        spread = "to_distributed"
    model = d.of(MODELS, *([] if not by_numbers or d.chance(0.15) else ["dropout"]))
    if by_numbers and MODELS[model].has("batch norm") and d.chance(0.8):
        spread = "sync_bn"
    if SPREADS[spread].has("blocks"):
        model = d.one("blocks", "blocks", "blocks, dropout") if not by_numbers else "blocks"
    if (
        model == "unused" and not SPREADS[spread].has("unused") and not SPREADS[spread].has("fsdp") and d.chance(0.8)
    ):  # refused
        spread = "find_unused_parameters"
    precision = "" if by_numbers else d.of(PRECISIONS, *(["pictures"] if not MODELS[model].has("pictures") else []))
    return {
        "spread": spread,
        "model": model,
        "precision": precision,
        "optimizer": d.of(OPTIMIZERS),
        "fits": (d.of(FITS),),
    }


def of_callbacks(d: Draw, c: Configuration, n: int) -> tuple[str, ...]:
    chosen: list[str] = []
    for name in d.random.sample(sorted(CALLBACKS), n):
        form = d.one(*CALLBACKS[name])
        if form.has("pictures") and c.form != "pictures":
            continue
        if form.has("monitors") and c.valid == "none":
            continue
        if form.has("no schedule") and c.has("schedule") and d.chance(0.9):  # refused
            continue
        if (
            name == "SAM"
            and (
                c.spread == "delay_allreduce"
                or c.has("float16")
                or any("Accumulate" in code or "AutoMicro" in code for code in chosen)
            )
            and d.chance(0.9)
        ):
            continue
        if (
            name in ("Accumulate", "AutoMicrobatch")
            and (any("SAM" in code for code in chosen) or c.spread in ("static_graph", "sync_bn"))
            and d.chance(0.9)
        ):
            continue
        if name == "AutoMicrobatch" and c.has("fsdp") and d.chance(0.9):
            continue
        if c.check in ("worlds", "elsewhere", "micro_batches") and form.has("order") and d.chance(0.9):
            continue
        chosen.append(form.code)
    return tuple(chosen)


def of_checkpoint(d: Draw) -> tuple[tuple[str, Any], ...]:
    options: dict[str, Any] = {}
    if d.chance(0.75):
        options["every_n_steps"] = d.one(1, 1, 2, 3)
    if d.chance(0.2):
        options["every_n_epochs"] = d.one(2, None)
    if d.chance(0.3):
        options["keep"] = d.one(1, 3)
    if d.chance(0.25):
        options["async_write"] = True
    elif d.chance(0.25):
        options["sharded"] = True
    return tuple(options.items())


def of_interruptions(d: Draw, c: Configuration) -> tuple[Interruption, ...]:
    per_epoch = max(1, c.whole_batches)
    last = per_epoch * c.epochs * (2 if c.has("two fits") else 1)
    found = []
    for _ in range(d.weighted({1: 7, 2: 2, 3: 1})):
        hook = d.one("after_batch", "after_step", "after_batch", *HOOKS)
        world = c.world if c.check == "resumed" else d.one(1, 2, 3)
        found.append(
            Interruption(
                d.of(INTERRUPTIONS),
                hook,
                d.random.randint(0 if hook.startswith("before") else 1, last),
                d.random.randrange(c.world),
                d.chance(0.3),
                d.one(*range(1, len(c.fits) + 1)),
                world,
            )
        )
    if c.check == "elsewhere" and all(i.world == c.world for i in found):
        found[0] = Interruption(**{**vars(found[0]), "world": d.one(*({1, 2, 3} - {c.world}))})
    return tuple(found)


def of_calls(d: Draw, c: Configuration) -> tuple[tuple[str, str, int], ...]:
    calls = []
    for _ in range(d.one(1, 1, 2, 3)):
        where = d.one("before", "amid", "after") if len(c.fits) > 1 else d.one("before", "amid")
        name = d.of(
            {name: part for name, part in BETWEEN.items() if where != "amid" or part.has("amid")},
            *(["valid"] if c.valid == "none" else []),
        )
        if name == "get_preds of train_dl" and c.has("draws"):  # reading these samples is drawing them
            continue
        calls.append((name, where, d.random.randint(1, 3)))
    return tuple(calls)


def fitting(c: Configuration) -> Configuration:
    """Without what the library has no meaning for, or a table's note rules out; some of what it refuses is left, to be
    refused.
    """
    if c.has("unsized"):
        c = c.changed(fits=tuple("fit" if FITS[name].has("length") else name for name in c.fits))
        c = c.changed(
            callbacks=tuple(code for code in c.callbacks if "ParamScheduler" not in code and "SWA" not in code)
        )
    if c.check == "stops":
        c = c.changed(
            world=max(2, c.world),
            spread="to_distributed" if c.spread == "alone" else c.spread,
            stop=c.stop or ("StopFit", 2),
            between=(),
        )
    if c.has("images") and c.form != "pictures":
        c = c.changed(model="convolutions", spread="fsdp" if c.has("blocks") else c.spread)
    if (
        c.has("x")
        and c.form == ""
        and c.model in ("linear", "MLP", "MLP, dropout", "batch norm", "batch norm, dropout", "frozen")
    ):
        c = c.changed(model="blocks")  # nn.Sequential's argument is called otherwise
    if c.check == "micro_batches":  # batches of which the same k make one of k times the size
        c = c.changed(
            callbacks=tuple(code for code in c.callbacks if not any(name in code for name in MICRO)),
            own_callbacks=(),
            n=c.global_bs * 3,
            stop=None,
            between=(),
        )
        c = c.changed(
            source=c.source if c.source in SPLITS else "from_tensors",
            model="MLP" if c.has("batch norm", "dropout", "order") or c.model == "buffers" else c.model,
        )
        c = c.changed(
            spread="to_distributed" if c.has("fsdp", "own weights", "float32", "static") else c.spread,
            optimizer="SGD" if c.has("closure") else c.optimizer,
        )
        c = c.changed(global_bs=12, n=36, world=c.world if c.world < 3 else 2)
    if c.check in ("worlds", "elsewhere") and (
        c.has("dealt") or c.n % c.global_bs < 3
    ):  # of fewer samples than ranks nothing is left in
        c = c.changed(n=c.n - c.n % c.global_bs)
    if c.check == "loop_by_hand":
        if c.has("draws", "x", "dealt", "alone", "pads", "images"):
            c = c.changed(source="DataLoader, shuffle")
        c = c.changed(world=1, fits=c.fits[:1], own_callbacks=(), stop=None, max_steps=None)
        c = c.changed(
            callbacks=tuple(code for code in c.callbacks if can_be_written(SIMPLEST.changed(callbacks=(code,))))
        )
        for name in ("fits", "spread", "precision", "optimizer"):
            c = c if can_be_written(c) else c.changed(**{name: getattr(SIMPLEST, name)})
    counts = c.model == "buffers" and c.check in ("worlds", "elsewhere")  # it counts its calls, a part of a batch each
    if c.has("batch norm") or counts:  # and of a part of it, too
        c = c.changed(callbacks=tuple(code for code in c.callbacks if code != "AutoMicrobatch(2)"))
    if c.has("batch norm"):  # a rank's part of a batch has to have two samples at least
        c = c.changed(n=c.n - c.n % c.global_bs)
    if c.has("one process"):
        c = c.changed(
            bn_wd=True, fits=tuple("fit" if FITS[name].has("groups") else name for name in c.fits)
        )  # L-BFGS takes one group of parameters
        c = c.changed(callbacks=tuple(code for code in c.callbacks if not OF_CODE[code].has("groups")))
        c = c.changed(
            world=1,
            other_world=1,
            interruptions=tuple(replace(i, world=1) for i in c.interruptions),
            check="resumed" if c.check in ("worlds", "elsewhere") else c.check,
        )
    if c.has("buckets") and c.has("compiled"):  # torch asserts that its first bucket is not larger than the next
        c = c.changed(spread="to_distributed")
    if c.has("fsdp"):
        kept = {
            name: tuple(code for code in getattr(c, name) if not OF_CODE[code].has("plain weights"))
            for name in ("callbacks", "own_callbacks")
        }
        c = c.changed(**kept)
    if c.check == "traces" and c.valid == "same as train_dl":  # evaluating it draws what training would
        c = c.changed(valid="DataLoader")
    if c.has("schedule-free") and c.has("own weights") and c.check != "refusal":
        c = c.changed(optimizer="SGD, momentum")
    if c.has("optimizer in whole") and c.has("fsdp") and c.check != "refusal":
        c = c.changed(optimizer="AdamW")
    if c.has("pure") and c.has("fsdp") and c.check != "refusal":
        c = c.changed(precision="bf16")
    if c.has("built") and c.has("groups"):
        c = c.changed(optimizer="AdamW")
    return c
