"""What one draw is: plain values, printed as they are written."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from tests.fuzz.between import BETWEEN as BETWEEN
from tests.fuzz.callbacks import CALLBACKS
from tests.fuzz.fits import FITS, METRICS
from tests.fuzz.models import MODELS
from tests.fuzz.optimizers import OPTIMIZERS
from tests.fuzz.part import Part
from tests.fuzz.sources import SOURCES, VALID
from tests.fuzz.spreads import PRECISIONS, SPREADS

OF_CODE: dict[str, Part] = {form.code: form for forms in CALLBACKS.values() for form in forms}


@dataclass(frozen=True)
class Interruption:
    """`kind` strikes at `hook` when `step` steps of a fit are done, before the other callbacks (`early`) or after them;
    on `rank`.

    world       of the process group that resumes
    """

    kind: str = "raise"
    hook: str = "after_batch"
    step: int = 1
    rank: int = 0
    early: bool = False
    fit: int = 1
    world: int = 1


@dataclass(frozen=True)
class Configuration:
    """Names are those of the tables; callbacks are what is written in them.

    check           which of the checks it is for
    global_bs       samples of all ranks in a step
    own_callbacks   given to the last fit alone
    max_steps       of each fit; stop: (signal, step), raised by a callback of the user's
    checkpoint      options of Checkpoint
    interruptions   one after the other, each followed by a resume
    between         (what is called, "before" | "amid" | "after", the step amid a fit)
    """

    check: str = "resumed"
    world: int = 1
    spread: str = "alone"
    source: str = "from_tensors"
    valid: str = "none"
    model: str = "linear"
    precision: str = ""
    optimizer: str = "SGD"
    callbacks: tuple[str, ...] = ()
    own_callbacks: tuple[str, ...] = ()
    fits: tuple[str, ...] = ("fit",)
    epochs: int = 1
    n: int = 24
    global_bs: int = 12
    drop_last: bool = False
    max_steps: int | None = None
    stop: tuple[str, int] | None = None
    metrics: str = "none"
    seed: int | None = None
    bn_wd: bool = True
    checkpoint: tuple[tuple[str, Any], ...] = (("every_n_steps", 1),)
    interruptions: tuple[Interruption, ...] = ()
    between: tuple[tuple[str, str, int], ...] = ()
    other_world: int = 1

    # --- what holds of its parts ---------------------------------------------
    @property
    def parts(self) -> dict[str, Part]:
        return {
            "spread": SPREADS[self.spread],
            "source": SOURCES[self.source],
            "valid": VALID[self.valid],
            "model": MODELS[self.model],
            "precision": PRECISIONS[self.precision],
            "optimizer": OPTIMIZERS[self.optimizer],
            "metrics": METRICS[self.metrics],
            **{f"fit {k}": FITS[name] for k, name in enumerate(self.fits)},
            **{f"callback {k}": OF_CODE[code] for k, code in enumerate((*self.callbacks, *self.own_callbacks))},
        }

    @staticmethod
    def of(code: str) -> Part:
        """A callback's entry."""
        return OF_CODE[code]

    def has(self, *traits: str) -> bool:
        """Whether one of its parts has one of these traits."""
        return any(part.has(trait) for part in self.parts.values() for trait in traits)

    @property
    def form(self) -> str:
        return next((form for form in ("pictures", "pair") if MODELS[self.model].has(form)), "")

    @property
    def dtype(self) -> str:
        return "torch.float32" if self.has("half", "float32") else "torch.float64"

    @property
    def whole_batches(self) -> int:
        """In an epoch; the last one may be smaller."""
        return self.n // self.global_bs + (not self.drop_last and self.n % self.global_bs > 0)

    @property
    def is_exact_in_any_world(self) -> bool:
        """Whether every step is the same on any number of ranks, but for the order of sums."""
        if self.world > 1 and not SPREADS[self.spread].has("exact"):
            return False
        if self.has("dropout", "draws", "order", "half", "float32", "own weights", "skips", "own order", "rounds"):
            return False
        if self.has("batch norm") and (self.world > 1 or self.other_world > 1) and self.spread != "sync_bn":
            return False
        return self.source != "DistributedSampler" or self.n % self.global_bs == 0

    def changed(self, **values: Any) -> Configuration:
        return replace(self, **values)

    def __repr__(self) -> str:
        """What differs from the simplest one alone: it can be read back."""
        own = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"Configuration({', '.join(own)})"


def short(interruption: Interruption) -> str:
    own = [
        f"{f.name}={getattr(interruption, f.name)!r}"
        for f in fields(interruption)
        if getattr(interruption, f.name) != f.default
    ]
    return f"Interruption({', '.join(own)})"


Interruption.__repr__ = short  # type: ignore[method-assign]
SIMPLEST = Configuration()
