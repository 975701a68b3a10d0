"""A configuration as a script writes it: what runs is what a failure prints."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import schedulefree
import torch
import torch.utils.data
import torchmetrics.classification

import learnkit
import learnkit.callbacks
import learnkit.distributed
import learnkit.schedule
import learnkit.vision
from tests.fuzz import between, callbacks, interruptions, models, optimizers, sources, spreads
from tests.fuzz.between import BETWEEN
from tests.fuzz.configuration import Configuration
from tests.fuzz.fits import FITS, METRICS
from tests.fuzz.models import MODELS
from tests.fuzz.optimizers import OPTIMIZERS
from tests.fuzz.sources import SOURCES, VALID
from tests.fuzz.spreads import PRECISIONS, SPREADS

OWN = (sources, models, optimizers, callbacks, spreads, between, interruptions)
LOADERS = (
    "DataLoader",
    "RandomSampler",
    "SubsetRandomSampler",
    "SequentialSampler",
    "WeightedRandomSampler",
    "BatchSampler",
    "DistributedSampler",
)
HEADER = f"""\
import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import {", ".join(LOADERS)}

from learnkit import *
from learnkit.callbacks import *
from learnkit.distributed import ShardedStream, get_rank, init_process_group, launch
from learnkit.schedule import linear
"""


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Script(NamedTuple):
    make: Callable[..., Any]
    fit: Callable[..., Any]


def namespace() -> dict[str, Any]:
    names: dict[str, Any] = {
        "torch": torch,
        "nn": torch.nn,
        "random": random,
        "np": np,
        "Path": Path,
        "partial": functools.partial,
        "seed_all": seed_all,
        "schedulefree": schedulefree,
        "linear": learnkit.schedule.linear,
        "ShardedStream": learnkit.distributed.ShardedStream,
        "MulticlassF1Score": torchmetrics.classification.MulticlassF1Score,
    }
    names |= {name: getattr(torch.utils.data, name) for name in LOADERS}
    for module in (learnkit.vision, learnkit, learnkit.callbacks, *OWN):
        names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return names


def compiled(c: Configuration) -> Script:
    names = namespace()
    exec(source(c), names)
    return Script(names["make"], names["fit"])


def source(c: Configuration) -> str:
    """`make(folder, world, rank)`, which gives the Learner, and `fit(learn, resume, callbacks, between)`, which trains
    it.
    """
    optimizer = OPTIMIZERS[c.optimizer]
    kept = ", ".join(f"{name}={value!r}" for name, value in c.checkpoint)
    added = [*c.callbacks, *(["ClosureStep()"] if optimizer.has("closure") else []), f"Checkpoint('kept', {kept})"]
    options = {
        "metrics": METRICS[c.metrics].code,
        "opt_func": optimizer.code,
        "wd": "0.0" if optimizer.has("closure") else "1e-2",
        "bn_wd": repr(c.bn_wd),
        "seed": repr(c.seed),
        "splitter": "halves" if c.has("groups") else "None",
        "path": "Path.cwd()",
    }
    default = {"metrics": "()", "bn_wd": "True", "seed": "None", "splitter": "None", "wd": "1e-2"}
    written = ", ".join(f"{name}={value}" for name, value in options.items() if default.get(name) != value)
    lines = [
        "def make(world, rank):",
        "    seed_all(3)",
        f"    n, bs, drop_last = {c.n}, {c.global_bs} // "
        f"{c.world if c.check == 'elsewhere' and c.has('dealt') else 'world'}, {c.drop_last}",
        f"    train, valid = samples(n, {c.form!r}, {c.dtype}), samples(14, {c.form!r}, {c.dtype}, seed=2)",
        f"    train_dl = {SOURCES[c.source].code}",
        f"    valid_dl = {VALID[c.valid].code}",
        f"    model = {MODELS[c.model].code}.to({c.dtype})",
        f"    learn = Learner(DataBunch(train_dl, valid_dl), model, {written}, callbacks=[{', '.join(added)}])",
        f"    return learn{PRECISIONS[c.precision].code}{SPREADS[c.spread].code}",
        "",
        "def fit(learn, resume=False, callbacks=()):",
        f"    epochs, options = {c.epochs}, "
        f"dict(resume=resume{'' if c.max_steps is None else f', max_steps={c.max_steps}'})",
    ]
    if any(name == "predict" for name, _, _ in c.between):
        names = ("first", "second") if c.form == "pair" else ("x",)
        lines.append(f"    sample = one_sample({c.form!r}, {c.dtype}, {names if c.has('x') else ()})")
    stop = [] if c.stop is None else [f"Stop({c.stop[0]!r}, {c.stop[1]}{', alone=True' if c.check == 'stops' else ''})"]
    calls = {
        where: [f"    {BETWEEN[name].code}" for name, w, _ in c.between if w == where] for where in ("before", "after")
    }
    amid = [f"Amid({name!r}, lambda learn: {BETWEEN[name].code}, {step})" for name, w, step in c.between if w == "amid"]
    lines += calls["before"]
    for k, name in enumerate(c.fits):
        own = [*stop, *amid, *(c.own_callbacks if k == len(c.fits) - 1 else ())]
        given = f"callbacks=[*callbacks, {', '.join(own)}]" if own else "callbacks=callbacks"
        lines += [f"    {FITS[name].code.replace('**options', f'{given}, **options')}"]
        if k == 0:
            lines += calls["after"]
    return "\n".join([*lines, "    return learn", ""])
