"""Bad input gets an error that says what was got, what was expected and what to do, before anything is learned from
it.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from learnkit import Callback, DataBunch, Learner, TensorLoader, accuracy
from learnkit.callbacks import EarlyStopping, ParamScheduler, Progress, Recorder
from learnkit.schedule import constant, linear

X, Y, R = torch.randn(8, 3), torch.arange(8) % 2, torch.randn(8, 2)
GOOD = [(X, Y)]
Act = Callable[[nn.Module], Any]
Cases = dict[str, tuple[Act, Any, tuple[str, ...]]]


class Empty:
    """Does not know its length, which is 0."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class EmptyStream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class OneOutput(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[:, :1]


def fit(data: Any, **options: Any) -> Act:
    """A fit of the case's model on `data`: a loader, or a pair of them."""
    return lambda model: Learner(data if isinstance(data, (DataBunch, tuple)) else (data, None), model, **options).fit(
        1
    )


def batch(*parts: Any, **options: Any) -> Act:
    return fit([parts[0] if len(parts) == 1 else parts], **options)


def fit_with(*args: Any, method: str = "fit", **options: Any) -> Act:
    """A fit method of a good Learner, called like that."""
    return lambda model: getattr(Learner((GOOD, GOOD), model), method)(*args, **options)


def learner(**options: Any) -> Act:
    return lambda model: Learner((GOOD, GOOD), model, **options)


def fit_learner(**options: Any) -> Act:
    return lambda model: Learner((GOOD, GOOD), model, **options).fit(1)


def fine_tune(*args: Any, **options: Any) -> Act:
    """Of a model with two layer groups, the second of which is trained alone at first."""
    return lambda model: Learner((GOOD, GOOD), model, splitter=lambda m: [m.weight, m.bias]).fine_tune(*args, **options)


def dataset(n: int) -> TensorDataset:
    return TensorDataset(X[:n], Y[:n])


LOADERS: Cases = {
    "empty list": (fit([]), ValueError, ("train_dl is empty", "0 samples", "Check")),
    "empty DataLoader": (fit(DataLoader(dataset(0), 4)), ValueError, ("train_dl is empty", "0 samples")),
    "empty tensors": (lambda _: DataBunch.from_tensors((X[:0], Y[:0])), ValueError, ("train_dl is empty", "0 samples")),
    "empty dataset": (lambda _: DataBunch.create(dataset(0)), ValueError, ("train_dl is empty", "0 samples")),
    "empty without a length": (fit(Empty()), ValueError, ("Empty", "gave no batch", "empty")),
    "empty stream": (fit(DataLoader(EmptyStream(), 2)), ValueError, ("DataLoader", "gave no batch", "empty")),
    "empty valid_dl": (fit((GOOD, [])), ValueError, ("valid_dl is empty",)),
    "empty valid_dl without a length": (
        lambda model: Learner((GOOD, Empty()), model).validate(),
        ValueError,
        ("Empty", "gave no batch"),
    ),
    "empty test_dl": (lambda _: DataBunch(GOOD, GOOD, []), ValueError, ("test_dl is empty",)),
    "nothing to validate": (lambda model: Learner((GOOD, GOOD), model).validate([]), ValueError, ("dl is empty",)),
    "nothing to predict": (lambda model: Learner((GOOD, GOOD), model).get_preds([]), ValueError, ("dl is empty",)),
    "emptied after construction": (lambda model: emptied(model).fit(1), ValueError, ("train_dl is empty",)),
    "drop_last drops all of from_tensors": (
        lambda _: DataBunch.from_tensors((X, Y), bs=64),
        ValueError,
        ("8 samples", "batch size 64", "drop_last=True", "bs=8 or less", "drop_last=False"),
    ),
    "drop_last drops all of create": (
        lambda _: DataBunch.create(dataset(5), bs=6),
        ValueError,
        ("5 samples", "batch size 6", "drop_last=True", "bs=5 or less"),
    ),
    "drop_last drops all of a DataLoader": (
        fit(DataLoader(dataset(3), 4, drop_last=True)),
        ValueError,
        ("3 samples", "batch size 4", "drop_last=False"),
    ),
    "generator": (
        lambda model: fit(b for b in GOOD)(model),
        TypeError,
        ("train_dl is a generator", "read only once", "Give a DataLoader"),
    ),
    "iterator of a DataLoader": (
        lambda model: fit(iter(DataLoader(dataset(8), 4)))(model),
        TypeError,
        ("train_dl is a ", "read only once"),
    ),
    "map": (
        lambda model: fit(map(tuple, GOOD))(model),
        TypeError,
        ("train_dl is a map", "read only once", "list of batches"),
    ),
    "generator to validate on": (
        lambda model: fit((GOOD, (b for b in GOOD)))(model),
        TypeError,
        ("valid_dl is a generator", "read only once"),
    ),
    "generator for validate()": (
        lambda model: Learner((GOOD, GOOD), model).validate(b for b in GOOD),
        TypeError,
        ("dl is a generator", "read only once"),
    ),
    "generator for get_preds()": (
        lambda model: Learner((GOOD, GOOD), model).get_preds(b for b in GOOD),
        TypeError,
        ("dl is a generator", "read only once"),
    ),
    "tensor as loader": (fit(X), TypeError, (r"train_dl is float32 \(8, 3\)", "no loader", "from_tensors")),
    "dataset as loader": (fit(dataset(8)), TypeError, ("train_dl is TensorDataset", "no loader", r"DataBunch\.create")),
    "number as loader": (fit(3), TypeError, ("train_dl is int", "no loader", "expected a DataLoader")),
    "no train_dl": (fit((None, GOOD)), TypeError, ("train_dl", "NoneType", "expected a DataLoader")),
    "one loader as data": (
        lambda model: Learner(DataLoader(dataset(8), 4), model),
        TypeError,  # type: ignore[arg-type]
        ("data is DataLoader", "DataBunch", r"pair \(train_dl, valid_dl\)"),
    ),
    "tensor as data": (lambda model: Learner(X, model), TypeError, ("data is Tensor", "expected a DataBunch")),  # type: ignore[arg-type]
    "three loaders": (
        lambda model: Learner((GOOD,) * 3, model),
        TypeError,
        ("data is tuple", r"pair \(train_dl, valid_dl\)"),
    ),
    "validate without data": (
        lambda model: Learner((GOOD, None), model).validate(),
        ValueError,
        (r"validate\(\) has no data", "no valid_dl", r"validate\(dl\)"),
    ),
    "get_preds without data": (
        lambda model: Learner((GOOD, None), model).get_preds(),
        ValueError,
        (r"get_preds\(\) has no data", "no valid_dl", r"get_preds\(dl\)"),
    ),
}

BATCHES: Cases = {
    "text": (batch("cats"), (TypeError, ValueError), ("str", r"\(x, y\)|tensor")),
    "None": (batch(None), (TypeError, ValueError), ("NoneType", r"\(x, y\)|tensor")),
    "numpy arrays": (batch(X.numpy(), Y.numpy()), (TypeError, ValueError), ("ndarray", "tensor")),
    "lists of numbers": (batch([[1.0, 2.0, 3.0]], [0]), (TypeError, ValueError), ("list|float", "tensor")),
    "empty tuple": (fit([()]), (TypeError, ValueError), (r"\(\)", r"\(x, y\)")),
    "no target": (batch((X,)), ValueError, ("no target", r"expected \(x, y\)", r"float32 \(8, 2\)")),
    "bare tensor": (batch(X), ValueError, ("no target", r"expected \(x, y\)")),
    "mapping without a target": (
        batch(
            {"input": X, "label": Y},
        ),
        (TypeError, ValueError),
        ("label",),
    ),
    "mapping of inputs alone": (batch({"input": X}), ValueError, ("no target", "'labels' or 'target'")),
    "mapping with a name that the model lacks": (batch({"image": X, "labels": Y}), TypeError, ("image",)),
    "an input too many": (batch(X, X, Y), TypeError, (r"\(8, 3\).*\(8, 3\)|two|2 inputs|positional",)),
    "lengths differ": (batch(X, Y[:7]), ValueError, (r"\(8, 2\)", r"\(7,\)", r"shape \(8,\)")),
    "features differ": (batch(torch.randn(8, 5), Y), Exception, (r"\(8, 5\)|8x5",)),
}

TARGETS: Cases = {
    "float targets for cross-entropy": (
        batch(X, Y.float(), loss_func=F.cross_entropy),
        TypeError,
        ("cross_entropy", r"float32 \(8,\)", "integers", r"target\.long\(\)"),
    ),
    "float targets for CrossEntropyLoss": (
        batch(X, Y.float(), loss_func=nn.CrossEntropyLoss()),
        TypeError,
        ("CrossEntropyLoss", r"float32 \(8,\)", r"target\.long\(\)"),
    ),
    "32-bit targets": (batch(X, Y.int()), (TypeError, ValueError), (r"int32 \(8,\)", "int64", r"target\.long\(\)")),
    "integer targets for mse_loss": (
        batch(X, Y.reshape(8, 1).expand(8, 2), loss_func=F.mse_loss),
        TypeError,
        ("mse_loss", r"int64 \(8, 2\)", "float", r"target\.float\(\)"),
    ),
    "integer targets for binary cross-entropy": (
        batch(X, torch.ones(8, 2).long(), loss_func=nn.BCEWithLogitsLoss()),
        TypeError,
        ("BCEWithLogitsLoss", r"int64 \(8, 2\)", r"target\.float\(\)"),
    ),
    "bool targets": (batch(X, Y.bool()), TypeError, ("bool", "loss_func", "int64")),
    "complex targets": (batch(X, R.to(torch.complex64)), TypeError, ("complex64", "loss_func")),
    "names as targets": (batch(X, ["cat"] * 8), TypeError, ("str|list", "loss_func|class numbers")),
    "(N, 1) against (N,)": (
        lambda model: fit([(X, R[:, 0])])(OneOutput(3, 2)),
        ValueError,
        (r"float32 \(8, 1\)", r"float32 \(8,\)", "broadcast", r"pred\.squeeze\(-1\)|unsqueeze"),
    ),
    "(N,) against (N, 1)": (
        batch(X, R[:, :1], loss_func=lambda p, t: F.mse_loss(p[:, 0], t)),
        Exception,
        (r"\[8, 1\]|\(8, 1\)",),
    ),
    "(N, 2) against (N, 1)": (
        batch(X, R[:, :1]),
        ValueError,
        (r"float32 \(8, 2\)", r"float32 \(8, 1\)", "broadcast", "agree"),
    ),
    "(N, 2) against (N,) in l1_loss": (
        batch(X, R[:, 0], loss_func=nn.L1Loss()),
        ValueError,
        ("L1Loss", r"\(8, 2\)", r"\(8,\)", "broadcast"),
    ),
    "(N, 2) against (N, 2, 1)": (
        batch(X, R.unsqueeze(-1), loss_func=F.smooth_l1_loss),
        ValueError,
        ("smooth_l1_loss", r"\(8, 2, 1\)", r"target\.squeeze\(-1\)"),
    ),
    "(N, 1) class numbers": (batch(X, Y.unsqueeze(1)), ValueError, (r"int64 \(8, 1\)", r"shape \(8,\)", "[Ss]queeze")),
    "one-hot integers": (batch(X, F.one_hot(Y, 2)), ValueError, (r"int64 \(8, 2\)", r"shape \(8,\)")),
    "a class too many": (batch(X, Y + 2), ValueError, ("to [23]", "2 scores", "classes 0 to 1", "Check")),
    "a negative class": (batch(X, Y - 2), ValueError, ("from -2", "classes 0 to 1", "label encoding")),
    "classes for one output": (
        lambda model: fit(GOOD)(OneOutput(3, 2)),
        ValueError,
        ("cross-entropy", r"\(8, 1\)", "as many outputs as there are classes", "BCEWithLogitsLoss"),
    ),
}

LOSSES: Cases = {
    "not averaged": (
        batch(X, Y, loss_func=nn.CrossEntropyLoss(reduction="none")),
        ValueError,
        (r"shape \(8,\)", "one number", r"\.mean\(\)"),
    ),
    "of shape (1,)": (
        batch(X, Y, loss_func=lambda p, t: F.cross_entropy(p, t).reshape(1)),
        ValueError,
        (r"shape \(1,\)", "one number"),
    ),
    "a float": (
        batch(X, Y, loss_func=lambda p, t: F.cross_entropy(p, t).item()),
        TypeError,
        ("loss is float", "0-d tensor", r"without \.item\(\)"),
    ),
    "None": (batch(X, Y, loss_func=lambda p, t: None), TypeError, ("loss is NoneType", "0-d tensor")),
    "an array": (batch(X, Y, loss_func=lambda p, t: np.float32(1.0)), TypeError, ("loss is float32", "0-d tensor")),
    "a tuple": (
        batch(X, Y, loss_func=lambda p, t: (F.cross_entropy(p, t), 1)),
        TypeError,
        ("tuple|float32", "0-d tensor"),
    ),
    "detached": (
        batch(X, Y, loss_func=lambda p, t: F.cross_entropy(p, t).detach()),
        ValueError,
        ("no graph", r"\.detach\(\)"),
    ),
    "of an argmax": (
        batch(X, Y, loss_func=lambda p, t: F.mse_loss(p.argmax(1).float(), t.float())),
        ValueError,
        ("no graph", "argmax"),
    ),
    "of a frozen model": (
        lambda model: fit(GOOD)(model.requires_grad_(False)),
        ValueError,
        ("no graph", "frozen", r"learn\.unfreeze\(\)"),
    ),
    "that raises": (batch(X, Y, loss_func=lambda p, t: F.nll_loss(p, t[:5])), ValueError, ("batch_size|size",)),
    "not callable": (learner(loss_func="mse"), TypeError, ("loss_func", "'mse'|str", "callable|function")),
    "a class": (
        fit_learner(loss_func=nn.CrossEntropyLoss),
        TypeError,
        ("CrossEntropyLoss", "class", r"CrossEntropyLoss\(\)"),
    ),
}

NUMBERS: Cases = {
    **{
        f"epochs={value!r}": (fit_with(value), (TypeError, ValueError), (f"epochs={value!r}", expected))
        for value, expected in (
            (0, "1 or more"),
            (-1, "1 or more"),
            (1.5, "whole number"),
            (True, "whole number"),
            ("3", "whole number"),
            (None, "whole number"),
        )
    },
    **{
        f"{method}, epochs=0": (fit_with(0, method=method), ValueError, ("=0", "1 or more"))
        for method in ("fit_one_cycle", "fit_flat_cos", "fit_sgdr")
    },
    "fine_tune, epochs=0": (fine_tune(0), ValueError, ("epochs=0", "1 or more")),
    "fine_tune, freeze_epochs=-1": (fine_tune(1, freeze_epochs=-1), ValueError, ("freeze_epochs=-1", "0 or more")),
    "fine_tune, lr is nan": (fine_tune(1, math.nan), ValueError, ("lr=nan", "finite")),
    "fine_tune, pct_start=2": (fine_tune(1, pct_start=2.0), ValueError, ("pct_start", r"\[0, 1\]")),
    **{
        f"max_steps={value!r}": (
            fit_with(1, max_steps=value),
            (TypeError, ValueError),
            (f"max_steps={value!r}", "1 or more|whole number"),
        )
        for value in (0, -5, 2.5, True)
    },
    **{
        f"lr={value!r}": (fit_with(1, value), (TypeError, ValueError), (f"lr={value!r}", "expected a (finite )?number"))
        for value in (math.nan, math.inf, -math.inf, -0.1, "1e-3", True)
    },
    **{
        f"max_lr={value!r}": (
            fit_with(1, value, method="fit_one_cycle"),
            (TypeError, ValueError),
            (f"{value!r}", "expected a (finite )?number"),
        )
        for value in (math.nan, -1.0, "fast")
    },
    "lr is a list": (fit_with(1, [1e-3, 1e-2]), TypeError, (r"lr=\[0\.001, 0\.01\]", "list", "expected a number")),
    "lr of the Learner is nan": (fit_learner(lr=math.nan), ValueError, ("lr=nan", "finite")),
    "lr of the Learner is text": (fit_learner(lr="big"), TypeError, ("lr='big'", "number")),
    "slice from 0": (fit_with(1, slice(0, 1e-2)), ValueError, ("slice", "above 0")),
    "slice to nan": (fit_with(1, slice(1e-3, math.nan)), ValueError, ("slice's end=nan", "finite")),
    "slice without an end": (fit_with(1, slice(1e-3, None)), (TypeError, ValueError), ("slice's end", "number")),
    "slice of text": (fit_with(1, slice("a", "b")), TypeError, ("slice", "'[ab]'", "expected a number")),
    "wd is nan": (fit_with(1, wd=math.nan), ValueError, ("wd=nan", "finite number, 0 or more")),
    "wd is negative": (fit_with(1, wd=-0.1), ValueError, (r"wd=-0\.1", "0 or more")),
    "wd of the Learner is nan": (learner(wd=math.nan), ValueError, ("wd=nan", "finite number, 0 or more")),
    "wd of the Learner is text": (learner(wd="1e-2"), TypeError, ("wd='1e-2'", "expected a number")),
    "div_factor=0": (fit_with(1, method="fit_one_cycle", div_factor=0), ValueError, ("div_factor", "above 0", "0")),
    "final_div=-1": (
        fit_with(1, method="fit_one_cycle", final_div=-1.0),
        ValueError,
        ("final_div", "above 0", r"-1\.0"),
    ),
    "pct_start=1.5": (
        fit_with(1, method="fit_one_cycle", pct_start=1.5),
        ValueError,
        ("pct_start", r"\[0, 1\]", r"1\.5"),
    ),
    "pct_start is nan": (fit_with(1, method="fit_flat_cos", pct_start=math.nan), ValueError, ("pct_start", "nan")),
    "moms is one number": (fit_with(1, method="fit_one_cycle", moms=0.9), TypeError, ("moms", r"0\.9", "pair")),
    "moms of 1": (fit_with(1, method="fit_one_cycle", moms=(1.0, 0.8)), ValueError, ("moms", "below 1")),
    "n_cycles=1.5": (fit_with(1.5, method="fit_sgdr"), TypeError, (r"n_cycles=1\.5", "whole number")),
    "cycle_len=0": (fit_with(1, method="fit_sgdr", cycle_len=0), ValueError, ("cycle_len=0", "1 or more")),
    "a schedule to nan": (lambda _: linear(0.0, math.nan), ValueError, ("nan", "finite")),
}

CALLBACKS: Cases = {
    "the same twice": (
        lambda model: Learner((GOOD, None), model, callbacks=[c := Plain(), c]),
        ValueError,
        ("same Plain was added twice", "Add it once"),
    ),
    "the same added again": (
        lambda model: Learner((GOOD, None), model, callbacks=(c := Plain())).add_callback(c),
        ValueError,
        ("same Plain", "twice"),
    ),
    "the same in fit": (
        lambda model: Learner((GOOD, None), model, callbacks=(c := Plain())).fit(1, callbacks=[c]),
        ValueError,
        ("same Plain", "twice"),
    ),
    "a second Recorder": (
        lambda model: Learner((GOOD, None), model).add_callback(Recorder()),
        ValueError,
        ("has a Recorder already", r"remove_callback\(Recorder\)"),
    ),
    "a second Progress in fit": (
        lambda model: Learner((GOOD, None), model).fit(1, callbacks=[Progress()]),
        ValueError,
        ("has a Progress already",),
    ),
    "two Progress": (learner(callbacks=[Progress(), Progress()]), ValueError, ("has a Progress already",)),
    "a class": (
        learner(callbacks=[EarlyStopping]),
        TypeError,
        ("EarlyStopping is a class", r"write EarlyStopping\(\)"),
    ),
    "a class alone": (
        learner(callbacks=EarlyStopping),
        TypeError,
        ("EarlyStopping is a class", r"write EarlyStopping\(\)"),
    ),
    "a function": (
        learner(callbacks=[print]),
        TypeError,
        ("builtin_function", "expected a Callback", "derive its class"),
    ),
    "a function in fit": (fit_with(1, callbacks=[lambda learn: None]), TypeError, ("function", "expected a Callback")),
    "None": (
        lambda model: Learner((GOOD, None), model).add_callback(None),  # type: ignore
        TypeError,
        ("NoneType", "expected a Callback"),
    ),  # type: ignore[arg-type]
    "removing what is not there": (
        lambda model: Learner((GOOD, None), model).remove_callback(EarlyStopping),
        ValueError,
        ("no EarlyStopping to remove", "Recorder, Progress"),
    ),
    "unknown monitor": (
        fit_learner(callbacks=EarlyStopping("acuracy"), metrics=accuracy),
        ValueError,
        ("'acuracy'", "did you mean accuracy", "valid_loss"),
    ),
    "schedule of an unknown name": (
        fit_learner(callbacks=ParamScheduler({"momenta": constant(0.9)})),
        ValueError,
        ("AdamW", "'momenta'", "betas"),
    ),
    "schedule that is a number": (
        lambda model: fit_learner(callbacks=ParamScheduler({"lr": 0.1}))(model),  # type: ignore
        TypeError,
        ("lr", r"0\.1|float", "Schedule|schedule"),
    ),
    "fewer schedules than layer groups": (
        lambda model: Learner((GOOD, None), model, splitter=lambda m: [m.weight, m.bias]).fit(
            1, callbacks=[ParamScheduler({"lr": [constant(0.1)]})]
        ),
        ValueError,
        ("lr", "1", "2"),
    ),
}


class Plain(Callback): ...


def broken(pred: Tensor, target: Tensor) -> Tensor:
    raise LookupError("no such class")


class HalfMetric:
    def reset(self) -> None: ...
    def update(self, pred: Any, target: Any) -> None: ...


METRICS: Cases = {
    "a class": (learner(metrics=HalfMetric), TypeError, ("HalfMetric is a class", "instance", r"HalfMetric\(")),
    "a misspelt name": (learner(metrics="acuracy"), TypeError, ("'acuracy' is a string", "accuracy", "without quotes")),
    "a number": (learner(metrics=[3]), TypeError, ("3 is not a metric", r"function \(pred, target\)")),
    "an object without compute": (
        learner(metrics=HalfMetric()),
        TypeError,
        ("has no compute", "reset, update and compute"),
    ),
    "a function of one argument": (
        learner(metrics=lambda pred: 0.0),
        TypeError,
        (r"\(pred\)", r"cannot be called with \(pred, target\)", "partial"),
    ),
    "a vector": (
        lambda model: Learner((GOOD, GOOD), model, metrics=lambda p, t: p).validate(),
        ValueError,
        (r"float32 \(8, 2\)", "expected one number", r"\.mean\(\)"),
    ),
    "accuracy of a regression": (
        lambda model: Learner((GOOD, [(X, R)]), model, metrics=accuracy).validate(),
        ValueError,
        ("accuracy", r"float32 \(8, 2\)", "integer class numbers", "one-hot|One-hot"),
    ),
    "accuracy of (N, 1) targets": (
        lambda model: Learner(
            (GOOD, [(X, Y[:, None])]), model, metrics=accuracy, loss_func=lambda p, t: F.cross_entropy(p, t[:, 0])
        ).validate(),
        ValueError,
        ("accuracy", r"int64 \(8, 1\)", r"target\.squeeze\(1\)"),
    ),
    "one that raises": (
        lambda model: Learner((GOOD, GOOD), model, metrics=broken).validate(),
        LookupError,
        ("no such class", "metric broken raised this", r"float32 \(8, 2\)", r"int64 \(8,\)"),
    ),
}

CONSTRUCTION: Cases = {
    "a model that is a class": (
        lambda _: Learner((GOOD, None), nn.Linear),  # type: ignore
        TypeError,
        ("model is type", r"expected a torch\.nn\.Module"),
    ),  # type: ignore
    "a function as model": (
        lambda _: Learner((GOOD, None), F.relu),  # type: ignore
        TypeError,
        ("model is", r"expected a torch\.nn\.Module"),
    ),  # type: ignore
    "a model without parameters": (
        lambda _: Learner((GOOD, None), nn.Flatten()).fit(1),
        ValueError,
        ("Flatten", "no parameters", "nothing to train"),
    ),
    "an optimizer by name": (fit_learner(opt_func="adam"), TypeError, ("opt_func", "'adam'|str", r"torch\.optim")),
    "a function that gives no optimizer": (
        fit_learner(opt_func=lambda ps, lr: None),
        TypeError,
        ("NoneType", r"torch\.optim\.Optimizer", "SGD"),
    ),
    "weight_decay in opt_func": (
        fit_learner(opt_func=partial(torch.optim.SGD, weight_decay=0.1)),
        ValueError,
        (r"weight_decay=0\.1", "wd="),
    ),
    "an optimizer of another model": (
        fit_learner(opt_func=torch.optim.SGD(nn.Linear(1, 1).parameters())),
        ValueError,
        ("holds none of the model's parameters", r"learn\.model\.parameters\(\)"),
    ),
    "a splitter that forgets": (
        learner(splitter=lambda m: [m.weight]),
        ValueError,
        ("splitter", "bias", "exactly one group"),
    ),
    "a splitter that repeats": (
        learner(splitter=lambda m: [m, m.bias]),
        ValueError,
        ("more than one layer group", "bias", "exactly one group"),
    ),
    "a splitter of strangers": (
        learner(splitter=lambda m: [m, nn.Linear(2, 2)]),
        ValueError,
        ("splitter", "not the model's"),
    ),
    "a splitter of names": (
        learner(splitter=lambda m: ["weight", "bias"]),
        (TypeError, ValueError),
        ("splitter", "str|'weight'", "modules|parameters"),
    ),
    "freeze without a splitter": (
        lambda model: Learner((GOOD, None), model).freeze(),
        ValueError,
        ("one layer group", "nothing to freeze", "splitter="),
    ),
    "freeze_to too far": (
        lambda model: Learner((GOOD, None), model, splitter=lambda m: [m.weight, m.bias]).freeze_to(2),
        ValueError,
        (r"freeze_to\(2\)", "2 layer groups", "between -1 and 1"),
    ),
    "bs=0": (lambda _: DataBunch.from_tensors((X, Y), bs=0), ValueError, ("bs=0", "at least one sample")),
    "bs=-3": (lambda _: DataBunch.create(dataset(8), bs=-3), ValueError, ("bs=-3", "at least one sample")),
    "bs=2.5": (lambda _: DataBunch.from_tensors((X, Y), bs=2.5), TypeError, (r"bs=2\.5", "whole number")),  # type: ignore[arg-type]
    "bs=True": (lambda _: DataBunch.create(dataset(8), bs=True), TypeError, ("bs=True", "whole number")),
    "val_bs=0": (
        lambda _: DataBunch.create(dataset(8), dataset(8), bs=2, val_bs=0),
        ValueError,
        ("val_bs=0", "at least one sample"),
    ),
    "val_bs=0 of tensors": (
        lambda _: DataBunch.from_tensors((X, Y), (X, Y), bs=2, val_bs=0),
        ValueError,
        ("val_bs=0", "at least one sample"),
    ),
    "val_bs='4'": (
        lambda _: DataBunch.from_tensors((X, Y), (X, Y), bs=2, val_bs="4"),  # type: ignore
        TypeError,
        ("val_bs='4'", "whole number"),
    ),  # type: ignore
    "one tensor": (
        lambda _: DataBunch.from_tensors(X),
        TypeError,
        (r"float32 \(8, 3\)", "tuple of tensors", r"\(x, y\)"),
    ),  # type: ignore
    "arrays for tensors": (
        lambda _: DataBunch.from_tensors((X.numpy(), Y.numpy())),  # type: ignore
        TypeError,
        ("ndarray", "tuple of tensors"),
    ),  # type: ignore
    "tensors of unequal lengths": (
        lambda _: DataBunch.from_tensors((X, Y[:5])),
        ValueError,
        (r"\(8, 3\)", r"\(5,\)", "same first dimension"),
    ),
    "a tensor without dimensions": (
        lambda _: DataBunch.from_tensors((X, Y[0])),
        ValueError,
        (r"int64 \(\)", "same first dimension"),
    ),
    "no tensors": (lambda _: TensorLoader(()), ValueError, (r"\(\)", "at least one tensor")),
    "a loader as dataset": (
        lambda _: DataBunch.create(DataLoader(dataset(8))),
        TypeError,
        ("DataLoader is not a dataset", "__getitem__", r"DataBunch\(train_dl, valid_dl\)"),
    ),
    "a generator as dataset": (
        lambda _: DataBunch.create(i for i in range(3)),
        TypeError,
        ("generator is not a dataset", "IterableDataset"),
    ),
    "batch_tfms of something else": (
        lambda _: DataBunch.from_tensors((X, Y), bs=2, batch_tfms=["flip"]),
        TypeError,
        ("'flip'", r"functions x -> x", "pair"),
    ),
    "predict text": (lambda model: Learner((GOOD, None), model).predict("cat"), TypeError, ("str", "tensor")),
    "predict an array": (
        lambda model: Learner((GOOD, None), model).predict(X.numpy()),
        TypeError,
        ("ndarray", "tensor"),
    ),
    "predict a number": (
        lambda model: Learner((GOOD, None), model).predict(torch.tensor(1.0)),
        ValueError,
        ("0 dimensions", "expected 2.*or 1"),
    ),
    "predict a batch of batches": (
        lambda model: Learner((GOOD, None), model).predict(X[None]),
        ValueError,
        ("3 dimensions", r"\(1, 8, 3\)", "expected 2 for a batch or 1 for one sample"),
    ),
}

TABLE = {
    f"{kind}: {name}": case
    for kind, cases in {
        "loader": LOADERS,
        "batch": BATCHES,
        "target": TARGETS,
        "loss": LOSSES,
        "number": NUMBERS,
        "callback": CALLBACKS,
        "metric": METRICS,
        "construction": CONSTRUCTION,
    }.items()
    for name, case in cases.items()
}


def emptied(model: nn.Module) -> Learner:
    batches = [(X, Y)]
    learn = Learner((batches, None), model)
    batches.clear()
    return learn


def told(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("act, kind, patterns", TABLE.values(), ids=TABLE)
def test_bad_input_is_refused_before_any_weight_changes_and_the_message_helps(
    act: Act, kind: Any, patterns: tuple[str, ...]
):
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(kind, match=patterns[0]) as caught:
        act(model)
    for pattern in patterns:
        assert caught.match(pattern), told(caught.value)
    assert all(torch.equal(p, start) for p, start in zip(model.parameters(), before, strict=True))
    assert model.training and (all(p.requires_grad for p in model.parameters()) or "frozen" in patterns)


# What can be seen only when the first epoch is over.
AFTER_TRAINING: Cases = {
    "empty valid_dl without a length": (fit((GOOD, Empty())), ValueError, ("Empty", "gave no batch", "epoch 0")),
    "validation targets of another dtype": (
        fit((GOOD, [(X, Y.float())]), loss_func=F.cross_entropy),
        TypeError,
        (r"target\.long\(\)", "validation batch 0"),
    ),
    "a class too many in validation": (fit((GOOD, [(X, Y + 5)])), ValueError, ("classes 0 to 1", "validation batch 0")),
    "a metric that raises": (
        fit((GOOD, GOOD), metrics=broken),
        LookupError,
        ("no such class", "metric broken", "epoch 0, validation batch 0"),
    ),
}


@pytest.mark.parametrize("act, kind, patterns", AFTER_TRAINING.values(), ids=AFTER_TRAINING)
def test_bad_validation_input_names_its_epoch_and_batch(act: Act, kind: Any, patterns: tuple[str, ...]):
    with pytest.raises(kind, match=patterns[0]) as caught:
        act(nn.Linear(3, 2))
    for pattern in patterns:
        assert caught.match(pattern), told(caught.value)


def test_an_error_says_which_batch_was_bad():
    learn = Learner(([(X, Y), (X, Y), ("cats", Y)], None), nn.Linear(3, 2))
    with pytest.raises((TypeError, ValueError, AttributeError), match="training batch 2"):
        learn.fit(1)


def test_a_learner_that_refused_something_still_works():
    learn = Learner((GOOD, GOOD), nn.Linear(3, 2))
    for call in (
        lambda: learn.fit(0),
        lambda: learn.fit(1, math.nan),
        lambda: learn.fit(1, wd=-1.0),
        lambda: learn.validate([]),
        lambda: learn.fit(1, callbacks=[Progress()]),
        lambda: learn.predict(X[None]),
        lambda: learn.fit_one_cycle(1, pct_start=2.0),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            call()
    assert learn.fit(1).recorder.lrs == [3e-3]


def test_a_zero_rate_is_allowed_and_learns_nothing():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    Learner((GOOD, None), model).fit(2, 0)
    assert torch.equal(model.weight, before)
