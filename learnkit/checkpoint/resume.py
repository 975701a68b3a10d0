"""The state of a fit at a step: saved as plain types and tensors, and restored, so that the fit continues exactly."""

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
    """Return the parts of a snapshot. All ranks must call this: rank 0 collects the random state of each.

    Args:
        learn: the Learner
        keeper: the callback that saves the snapshot; its own state is not included
        place: what `place_of` returned
        order: `order_states` at the start of the epoch in which the fit resumes, from which its order is drawn again
        gathered: if the model is sharded: True: rank 0's parts contain the full tensors; False: each rank's parts
            contain its own shards
    """
    callbacks = others(learn, keeper)
    states: dict[bool, dict[str, Any]] = {False: {}, True: {}}  # by whether the state differs between ranks
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
    """Return the position of the fit: epochs, steps, and the items of the epoch's order that were trained on.

    All ranks must call this.
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
    """Return the parts of a snapshot with copies of everything except parameters and optimizer state.

    Those change only in steps; buffers and the state of callbacks change at other times too. For most models this waits
    for the device once.
    """
    if any(map(is_shard, learn.model.parameters())):  # gathered for the snapshot, so they are copies already
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
    """Set the epoch and the step from which the fit resumes, before the first hook."""
    if place["n_epochs"] != learn.n_epochs:
        raise ValueError(
            f"the checkpoint is from a fit of {place['n_epochs']} epochs, this fit has {learn.n_epochs}: resume it "
            f"with the same arguments, or start a new fit with resume=False or in another folder."
        )
    learn.epoch, learn.step, learn.n_items_done = place["epoch"], place["step"], place["items"]
    learn.values = dict(place.get("values", {}))
    held = place.get("n_held", 0)  # batches of an accumulation window; their gradients are useless to other ranks
    if place["world_size"] == learn.world_size:
        learn.n_held = held
    else:
        learn.n_items_done -= held * place["items_per_batch"]
    learn.epochs_trained, learn.order_seed = place["epochs_trained"], place["order_seed"]


def begin_at(learn: Learner, place: dict[str, Any], *, is_over: bool = False) -> bool:
    """Return whether the fit resumes from this place; called before the first hook.

    If the place is in a later fit of the same script, this fit is finished, as with `is_over`. If it is in an earlier
    fit, which has restored it, this fit has not begun.
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
    """Raise ValueError if a snapshot belongs to another model or optimizer; shapes are sufficient for this check."""
    check_model(learn.model, parts["model"])
    if not optimizer_fits(learn.opt, parts["optimizer"]):
        raise ValueError(
            f"the checkpoint's optimizer state does not fit this {type(learn.opt).__name__} and its parameters. "
            f"Resume with the same opt_func and splitter."
        )


def restore_training(learn: Learner, keeper: Callback, parts: dict[str, Any]) -> None:
    """Restore weights, optimizer, callback states and random states; called after `before_fit` of all callbacks."""
    check_fits(learn, parts)
    callbacks = others(learn, keeper)
    run, keys = parts["run"], keys_of(callbacks)
    states = {**run["callbacks"], **states_of_rank(learn, dict(zip(keys, callbacks, strict=True)), run["ranks"])}
    if run["place"]["fit"] > learn.n_fits:  # the saved callbacks are those of a later fit
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
    has_come = learn.rank >= len(run["ranks"])  # a new rank
    own = run["ranks"][0 if has_come else learn.rank]
    put_states(of_order(learn), own.get("order", []), "the order of samples")
    if has_come:
        return seed_process(mix(learn.order_seed or 0, learn.step, learn.rank))
    put_states(of_samples(learn), own.get("samples", []), "the training samples")
    put_random_state(own["random"], learn.device)


def states_of_rank(learn: Learner, callbacks: dict[str, Callback], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the states that this rank's callbacks restore from those of all ranks."""
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
    """Return a name for each callback: its class name, with a number if there are several of the class."""
    names = [type(callback).__name__ for callback in callbacks]
    return [name if names.count(name) == 1 else f"{name} {names[:i].count(name)}" for i, name in enumerate(names)]


# --- random states -----------------------------------------------------------
def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this process's generators.

    These are torch's on the CPU and the device, Python's, and numpy's if it is loaded.
    """
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
    """Return the user's generators that decide the order of training and validation samples."""
    loaders = [dl for dl in (learn.data.train_dl, learn.data.valid_dl) if dl is not None]
    return once(generator for loader in loaders for generator in order_generators(loader))


def of_samples(learn: Learner) -> list[Any]:
    return sample_generators(learn.data.train_dl)


def order_states(learn: Learner) -> list[Any]:
    return [generator_state(generator) for generator in of_order(learn)]
