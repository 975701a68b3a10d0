"""What does not go together, and says so before the first step, on all ranks alike."""

from __future__ import annotations

import re
from typing import Any

from tests.fuzz.configuration import Configuration


class Refused(Exception):
    """A configuration that the library refuses, for a reason that is known."""


# a part of the message -> why it is right that this is refused
KNOWN: dict[str, str] = {
    r"its second pass needs the whole batch": "SAM needs a step's whole batch at once",
    r"SAM.*float16": "it climbs along gradients that overflow at times",
    r"needs the number of steps": "a schedule of a loader without a length",
    r"is an IterableDataset: each rank": "only its author knows whether it divides itself",
    r"batch_size=None, so its dataset makes the batches": "only its author knows a rank's share",
    r"ReduceLROnPlateau has no effect": "a schedule sets the rate anew in each step",
    r"AutoMicrobatch.*(to_fsdp|sync_bn)": "where memory runs out on one rank, the others wait",
    r"pure=True.*to_fsdp": "whole weights are cast, of which each rank has a part",
    r"(fused=True|Muon|Adafactor|LBFGS).*to_fsdp": "torch has none of it for weights that are in parts",
    r"static_graph=True": "gradients cannot wait",
    r"got no gradient": "DDP waits for each parameter",
    r"train_dl has no batch for each": "fewer batches than ranks",
    r"averages the ranks' weights; those of": "a schedule-free optimizer's weights are two, of which each rank would "
    "keep one of its own",
    r"no layer is selected": "the model is one layer",
    r"this Learner has an? \w+ already": "two of a kind would undo each other",
    r"sharded=True.*async_write": "all ranks would talk while training does",
    r"CutMix cuts pictures": "it needs four dimensions",
    r"(MixUp|CutMix).* batches \(x, y\)": "the first input of a mapping is not told",
    r"(SaveBest|EarlyStopping|ReduceLROnPlateau|valid_loss).*(validation|valid_dl)": "nothing is validated",
}

# What is drawn to be refused: changes of any configuration, after which it cannot be right.
CONFLICTS: dict[str, dict[str, Any]] = {
    "SAM and Accumulate": {"callbacks": ("SAM(0.05)", "Accumulate(2)")},
    "SAM and float16": {"callbacks": ("SAM(0.05)",), "precision": "fp16", "spread": "to_distributed"},
    "AutoMicrobatch and FSDP": {
        "callbacks": ("AutoMicrobatch(2)",),
        "spread": "fsdp",
        "world": 2,
        "precision": "",
        "optimizer": "SGD",
    },
    "AutoMicrobatch and sync_bn": {"callbacks": ("AutoMicrobatch(2)",), "spread": "sync_bn", "world": 2},
    "pure and FSDP": {"precision": "bf16, pure", "spread": "fsdp", "world": 2, "optimizer": "SGD"},
    "Adafactor and FSDP": {"optimizer": "Adafactor", "spread": "fsdp", "world": 2, "model": "MLP"},
    "schedule-free and averages": {
        "optimizer": "SGDScheduleFree",
        "spread": "decentralized",
        "world": 2,
        "precision": "",
    },
    "static_graph and Accumulate": {"callbacks": ("Accumulate(2)",), "spread": "static_graph", "world": 2},
    "an IterableDataset on ranks": {"source": "IterableDataset, length", "spread": "to_distributed", "world": 2},
    "batches of the dataset's own on ranks": {
        "source": "DataLoader, batch_size=None",
        "spread": "to_distributed",
        "world": 2,
    },
    "a schedule without a length": {
        "source": "generator class",
        "fits": ("fit_one_cycle",),
        "max_steps": None,
        "spread": "to_distributed",
        "callbacks": (),
    },
    "ReduceLROnPlateau and a schedule": {
        "callbacks": ("ReduceLROnPlateau('train_loss', patience=1, min_delta=0.05)",),
        "fits": ("fit_one_cycle",),
    },
    "an unused parameter": {"source": "from_tensors", "model": "unused", "spread": "to_distributed", "world": 2},
    "CutMix without pictures": {
        "source": "from_tensors",
        "model": "MLP",
        "callbacks": ("CutMix()",),
        "spread": "to_distributed",
    },
    "sharded and async_write": {"checkpoint": (("sharded", True), ("async_write", True))},
    "two of a kind": {
        "callbacks": ("EMA(decay=0.8)", "EMA(decay=0.8)"),
        "spread": "to_distributed",
        "precision": "",
        "optimizer": "SGD",
    },
}


def known(message: str, c: Configuration) -> str | None:
    """Why this is refused; None: nobody knows."""
    return next((why for pattern, why in KNOWN.items() if re.search(pattern, message)), None)
