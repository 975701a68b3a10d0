"""The loop in plain PyTorch: no learnkit but the batches that the fit had, and the rates that it recorded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from learnkit.data.order import mix
from tests.fuzz.configuration import Configuration
from tests.fuzz.learner_source import Script, namespace
from tests.fuzz.optimizers import OPTIMIZERS
from tests.fuzz.sources import samples

LR, START, DIVIDER = 1e-2, 0.3, 25.0


def can_be_written(c: Configuration) -> bool:
    """Whether this loop is the fit's: one process, and nothing that takes part in steps but what is written here."""
    taking_part = [
        code
        for code in c.callbacks
        if c.of(code).has("gradients")
        and not code.startswith(("ClipGradients(max_norm=0.1)", "ClipGradients(value", "Accumulate"))
    ]
    if c.fits == ("fit, slice",) and OPTIMIZERS[c.optimizer].has("built"):
        return False  # a rate for each of its groups, of which the history has the last one's
    return not (
        taking_part or c.own_callbacks or c.world > 1 or len(c.fits) > 1 or c.stop or c.max_steps
    ) and not c.has(
        "draws",
        "closure",
        "schedule-free",
        "groups",
        "stops",
        "pure",
        "skips",
        "counts",
        "compiled",
        "fsdp",
        "built rates",
        "matrices",
        "own weights",
        "x",
    )


def by_hand(
    c: Configuration, script: Script, places: dict[tuple[int, int, int], list[list[int]]], history: dict[str, Any]
) -> dict[str, Any]:
    """Weights, optimizer state and the loss of each step."""
    model: Any = script.make(1, 0).model.train()
    if c.seed is not None:
        torch.manual_seed(mix(c.seed, 0, 0))
    *inputs, y = samples(c.n, c.form, getattr(torch, c.dtype.split(".")[1]))
    opt, wd, scaled = optimizer(c, model), 0.1 if c.fits == ("fit, slice",) else 1e-2, c.has("float16")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3, enabled=scaled)
    dtype = torch.float16 if scaled else torch.bfloat16
    losses: list[Tensor] = []
    for window, usual in windows(c, places):
        set_rates(opt, history, len(losses), moms=c.fits == ("fit_one_cycle",))
        total = sum(map(len, window))
        loss_of_step: Any = 0.0
        for rows in window:
            with torch.autocast("cpu", dtype) if c.has("half") else nullcontext():
                loss = F.cross_entropy(model(*(x[rows] for x in inputs)), y[rows])
            scaler.scale(loss if usual is None else loss * (len(rows) / usual)).backward()
            loss_of_step = loss.detach() if usual is None else loss_of_step + loss.detach() * len(rows)
        if usual is not None and total != usual:
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], usual / total)  # type: ignore[attr-defined]
        scaler.unscale_(opt)
        clip(c, model)
        if not OPTIMIZERS[c.optimizer].has("built"):
            decay(c, model, opt, wd)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        losses.append(loss_of_step if usual is None else loss_of_step / total)
    return {
        "weights": dict(model.state_dict()),
        "optimizer": opt.state_dict()["state"],
        "losses": [float(loss) for loss in losses],
    }


def windows(
    c: Configuration, places: dict[tuple[int, int, int], list[list[int]]]
) -> Iterator[tuple[list[list[int]], float | None]]:
    """The batches of each step, by their samples' numbers, and what a regular step has; None: a step is a batch."""
    k = next((int(code[len("Accumulate(")]) for code in c.callbacks if code.startswith("Accumulate")), 1)
    usual = (
        None
        if k == 1 and not any(code.startswith("Accumulate") for code in c.callbacks)
        else float(k * len(next(iter(places.values()))[0]))
    )
    for epoch in range(1 + max(epoch for _, epoch, _ in places)):
        batches = [ranks[0] for (_, e, _), ranks in sorted(places.items()) if e == epoch]
        yield from ((batches[start : start + k], usual) for start in range(0, len(batches), k))


def optimizer(c: Configuration, model: nn.Module) -> Optimizer:
    """As the documentation says: decay decoupled, fused where torch can; one group that decays and one that does
    not.
    """
    made = eval(OPTIMIZERS[c.optimizer].code, {**namespace(), "model": model})
    if isinstance(made, Optimizer):
        return made
    spared = [] if c.bn_wd else [p for p, is_spared in zip(model.parameters(), spares(model), strict=True) if is_spared]
    decaying = [p for p in model.parameters() if not any(p is other for other in spared)]
    groups = [{"params": params} for params in (decaying, spared) if params]
    accepted, given = inspect.signature(made).parameters, made.keywords if isinstance(made, partial) else {}
    options: dict[str, Any] = {"decoupled_weight_decay": True} if "decoupled_weight_decay" in accepted else {}
    if "fused" in accepted and not any(given.get(name) is not None for name in ("fused", "foreach", "differentiable")):
        options["fused"] = True
    opt = made(groups, **({} if "lr" in given else {"lr": LR}), **options)
    for k, group in enumerate(opt.param_groups):
        group["decays"] = k == 0 or not spared
    return opt


def spares(model: nn.Module) -> list[bool]:
    norms = {
        id(p) for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters(recurse=False)
    }
    return [
        id(p) in norms or (name.endswith("bias") and name.rpartition(".")[2] == "bias")
        for name, p in model.named_parameters()
    ]


def decay(c: Configuration, model: nn.Module, opt: Optimizer, wd: float) -> None:
    """Before a step, w <- (1 - lr wd) w; by the optimizer itself where it can."""
    for group in opt.param_groups:
        own = wd if group["decays"] else 0.0
        if opt.defaults.get("decoupled_weight_decay"):
            group["weight_decay"] = own
            continue
        if "weight_decay" in group:
            group["weight_decay"] = 0.0
        if own:
            with torch.no_grad():
                for p in group["params"]:
                    if p.grad is not None:
                        p.mul_(1 - group["lr"] * own)


def clip(c: Configuration, model: nn.Module) -> None:
    for code in c.callbacks:
        if code.startswith("ClipGradients(max_norm"):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if code.startswith("ClipGradients(value"):
            nn.utils.clip_grad_value_(model.parameters(), 0.01)


def set_rates(opt: Optimizer, history: dict[str, Any], k: int, *, moms: bool) -> None:
    for group in opt.param_groups:
        rate = history["lrs"][k]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if moms and history["moms"] and "betas" in group:
            group["betas"] = (history["moms"][k], group["betas"][1])
        elif moms and history["moms"] and "momentum" in group:
            group["momentum"] = history["moms"][k]


def expected_rates(c: Configuration, n: int) -> list[float]:
    """The documented schedule of n steps, written once more: equal but for rounding."""
    [name] = c.fits
    return [RATES[name](k, n) for k in range(n)]


def cycle(k: int, n: int, start: float = START) -> float:
    """Cosine from LR / 25 at step 0 to LR at int(n start), and to LR / 25 / 25e4 at the last."""
    top, low, least = int(n * start), LR / DIVIDER, LR / (DIVIDER * 1e4)
    if k < top:
        return low + (LR - low) * (1 - math.cos(math.pi * k / top)) / 2
    return least + (LR - least) * (1 + math.cos(math.pi * (k - top) / max(1, n - 1 - top))) / 2


RATES = {
    "fit": lambda k, n: LR,
    "fit, slice": lambda k, n: LR,
    "fit_one_cycle": cycle,
    "fit_one_cycle, no momentum": lambda k, n: cycle(k, n, 0.5),
}
