"""What a fit is at a step: taken as plain types and tensors, and put back, so that it goes on as if it had never
stopped.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learnkit.checkpoint.files import check_plain
from learnkit.checkpoint.snapshot import copied_to_host
from learnkit.checkpoint.weights import check_model, has_same_dtypes, load_model
from learnkit.data.generators import generator_state, once, order_generators, put_states, sample_generators
from learnkit.data.order import items_per_batch, mix, seed_process
from learnkit.devices.dtensor import is_shard, parted, whole_on_main
from learnkit.devices.wrappers import plain_state
from learnkit.optim.state import load_optimizer, optimizer_fits

if TYPE_CHECKING:
    from learnkit.hooks import Callback
    from learnkit.learner import Learner


def training_state(
    learn: Learner, keeper: Callback, place: dict[str, Any], order: list[Any], *, gathered: bool = True
) -> dict[str, Any]:
    """The parts of a snapshot. On several ranks all must call it, as each one's random state is asked for, which rank 0
    has.

    `keeper`: the callback that keeps it, whose own state is left out. `order`: `order_states` at the start of the epoch
    that the fit goes on with, which is drawn from them anew. `gathered`: a model that is spread over ranks is whole in
    rank 0's parts, else each rank has its own.
    """
    callbacks = others(learn, keeper)
    states: dict[bool, dict[str, Any]] = {False: {}, True: {}}  # by whether ranks have different ones
    for key, callback in zip(keys_of(callbacks), callbacks, strict=True):
        state = whole_on_main(callback.state_dict(), learn.rank)
        check_plain(state, f"the state of {type(callback).__name__}")
        if state:
            states[callback.per_rank or learn.ranks.apart][key] = state
    own = {
        "random": random_state(learn.device),
        "order": order,
        "samples": [generator_state(g) for g in of_samples(learn)],
        "callbacks": states[True],
    }
    run = {"place": place, "callbacks": states[False], "ranks": learn.ranks.gather_on_main(own)}
    model, optimizer = plain_state(learn.model), learn.opt.state_dict()
    if not gathered:
        return {"model": model, "optimizer": optimizer, "run": run}
    return {"model": whole_on_main(model, learn.rank), "optimizer": whole_on_main(optimizer, learn.rank), "run": run}


def place_of(learn: Learner, *, epoch_over: bool, over: bool) -> dict[str, Any]:
    """Where the fit is: whole epochs, steps, and the items of the epoch's order that have been trained on. All ranks
    must call it.
    """
    in_epoch = not epoch_over and not over
    return {
        "fit": learn.n_fits,
        "runs": dict(learn.runs),
        "n_epochs": learn.n_epochs,
        "n_steps": learn.n_steps,
        "step": learn.step,
        "steps_ahead": learn.steps_ahead,
        "epoch": learn.n_epochs if over else learn.epoch + epoch_over,
        "items": learn.n_items_done if in_epoch else 0,
        "n_held": learn.n_held if in_epoch else 0,
        "items_per_batch": items_per_batch(learn.data.train_dl),
        "world_size": learn.world_size,
        "epochs_trained": learn.epochs_trained - in_epoch,
        "order_seed": learn.order_seed,
        "gradient_order": learn.gradient_order(),
        "values": dict(learn.values),
    }


def with_own_copies(learn: Learner, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts of a snapshot in which only parameters and optimizer state are still the fit's own: they change in
    steps alone, what callbacks keep and buffers at other times too. Waits for the device once for most models.
    """
    if any(map(is_shard, learn.model.parameters())):  # gathered for this: a copy already
        own = {name for name, _ in learn.model.named_buffers()}
    else:
        parameters = {p.data_ptr() for p in learn.model.parameters()}
        own = {
            name
            for name, value in parts["model"].items()
            if not (isinstance(value, Tensor) and value.data_ptr() in parameters)
        }
    copies = copied_to_host(
        {"run": parts["run"], "model": {name: value for name, value in parts["model"].items() if name in own}}
    )
    return {**parts, "run": copies["run"], "model": {**parts["model"], **copies["model"]}}


def put_place(learn: Learner, place: dict[str, Any]) -> None:
    """Before the first hook: the epoch and the step from which the fit goes on."""
    if place["n_epochs"] != learn.n_epochs:
        raise ValueError(
            f"the checkpoint is of a fit of {place['n_epochs']} epochs, this one is of {learn.n_epochs}: resume it "
            f"with the same arguments, or begin a new fit with resume=False or in another folder."
        )
    learn.epoch, learn.step, learn.n_items_done = place["epoch"], place["step"], place["items"]
    learn.values = dict(place.get("values", {}))
    held = place.get("n_held", 0)  # batches of a window whose gradients each rank has kept: of no use to other ranks
    if place["world_size"] == learn.world_size:
        learn.n_held = held
    else:
        learn.n_items_done -= held * place["items_per_batch"]
    learn.epochs_trained, learn.order_seed = place["epochs_trained"], place["order_seed"]


def begin_at(learn: Learner, place: dict[str, Any], *, is_over: bool = False) -> bool:
    """Before the first hook: whether the fit goes on from this place. A place in a later fit of the same script says
    that this one is over, as `is_over` does; one in an earlier fit, which has put it back, that this one has not
    begun.
    """
    if place["fit"] < learn.n_fits:
        return False
    if place["fit"] > learn.n_fits or is_over:
        place = {**place, "epoch": learn.n_epochs, "n_epochs": learn.n_epochs, "items": 0, "n_held": 0}
    learn.resumed = place
    put_place(learn, place)
    learn.plan_steps()
    return True


def check_fits(learn: Learner, parts: dict[str, Any]) -> None:
    """Raise ValueError where a snapshot is of another model or optimizer; shapes are enough."""
    check_model(learn.model, parts["model"])
    if not optimizer_fits(learn.opt, parts["optimizer"]):
        raise ValueError(
            f"the checkpoint's optimizer state is not one of this {type(learn.opt).__name__} and these parameters. "
            f"Resume with the same opt_func and splitter."
        )


def restore_training(learn: Learner, keeper: Callback, parts: dict[str, Any]) -> None:
    """When all callbacks have been told of the fit's start: weights, optimizer, what callbacks keep, random states."""
    check_fits(learn, parts)
    callbacks = others(learn, keeper)
    run, keys = parts["run"], keys_of(callbacks)
    states = {**run["callbacks"], **states_of_rank(learn, dict(zip(keys, callbacks, strict=True)), run["ranks"])}
    if (
        run["place"]["fit"] > learn.n_fits
    ):  # of this fit there is none any more: callbacks of the later one are not these
        keys = [key if callback in learn.callbacks else "" for key, callback in zip(keys, callbacks, strict=True)]
    elif unknown := [key for key in states if key not in keys]:
        raise ValueError(
            f"the checkpoint has the state of {', '.join(unknown)}, which this fit does not have: resume with the same "
            "callbacks."
        )
    load_model(learn.model, parts["model"], strict=True)
    load_optimizer(learn.opt, parts["optimizer"], same_dtypes=has_same_dtypes(learn.model, parts["model"]))
    spread = any(map(is_shard, learn.model.parameters()))
    for key, callback in zip(keys, callbacks, strict=True):
        if key in states:
            callback.load_state_dict(parted(callback.state_dict(), states[key]) if spread else states[key])
    has_come = learn.rank >= len(run["ranks"])  # a rank that was not there
    own = run["ranks"][0 if has_come else learn.rank]
    put_states(of_order(learn), own.get("order", []), "the order of samples")
    if has_come:
        return seed_process(mix(learn.order_seed or 0, learn.step, learn.rank))
    put_states(of_samples(learn), own.get("samples", []), "the training samples")
    put_random_state(own["random"], learn.device)


def states_of_rank(learn: Learner, callbacks: dict[str, Callback], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What callbacks of this rank take back of what those of each rank kept."""
    kept = [own["callbacks"] for own in ranks]
    if len(ranks) == learn.world_size:
        return kept[learn.rank]
    return {
        key: callbacks[key].regroup([own[key] for own in kept], learn.rank) if key in callbacks else first
        for key, first in kept[0].items()
    }


def others(learn: Learner, keeper: Callback) -> list[Callback]:
    return [callback for callback in learn.running if callback is not keeper]


def keys_of(callbacks: list[Callback]) -> list[str]:
    """A name for each: its class's, with a number where there are several."""
    names = [type(callback).__name__ for callback in callbacks]
    return [name if names.count(name) == 1 else f"{name} {names[:i].count(name)}" for i, name in enumerate(names)]


# --- random states -----------------------------------------------------------
def random_state(device: torch.device) -> dict[str, Any]:
    """Of this process's generators: torch's on the CPU and the device, Python's, and numpy's where it is loaded."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return state


def put_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((version, tuple(words), gauss))
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"].cpu(), device)
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))


def of_order(learn: Learner) -> list[Any]:
    """The user's generators that decide the order of training and validation samples."""
    loaders = [dl for dl in (learn.data.train_dl, learn.data.valid_dl) if dl is not None]
    return once(generator for loader in loaders for generator in order_generators(loader))


def of_samples(learn: Learner) -> list[Any]:
    return sample_generators(learn.data.train_dl)


def order_states(learn: Learner) -> list[Any]:
    return [generator_state(generator) for generator in of_order(learn)]
