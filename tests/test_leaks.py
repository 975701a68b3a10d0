"""A thousand fits leave nothing behind: no memory, no tensor, no thread, no open file."""

import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, accuracy

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def n_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def n_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def make_learner(**options: Any) -> Learner:
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    return Learner(DataBunch.from_tensors((x, y), (x, y), bs=2), nn.Linear(3, 2), metrics=accuracy, **options)


def new_learner() -> None:
    learn = make_learner()
    with learn.no_logging():
        learn.fit_one_cycle(1)


def same_learner() -> Callable[[], Any]:
    learn = make_learner()

    def fit() -> None:
        with learn.no_logging():
            learn.fit(1)
        learn.validate()
        learn.get_preds()

    return fit


class Breaks(Callback):
    def after_backward(self, learn: Learner) -> None:
        raise LookupError("lost")


def broken() -> Callable[[], Any]:
    learn = make_learner()

    def fit() -> None:
        with learn.no_logging(), pytest.raises(LookupError, match="lost"):
            learn.fit(1, callbacks=[Breaks()])

    return fit


@linux
@pytest.mark.parametrize(
    "make, n",
    [(lambda: new_learner, 1_000), (same_learner, 500), (broken, 300)],
    ids=["new learners", "one learner", "broken fits"],
)
def test_many_fits_grow_neither_memory_nor_tensors_nor_files_nor_threads(make: Callable[[], Callable[[], Any]], n: int):
    fit = make()
    for _ in range(50):
        fit()
    tensors, files, threads, memory = n_tensors(), n_open_files(), threading.active_count(), resident_bytes()
    for _ in range(n):
        fit()
    assert n_tensors() <= tensors + 2
    assert n_open_files() <= files and threading.active_count() <= threads
    assert resident_bytes() - memory < 20e6


@linux
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fits_with_workers_leave_no_process_file_or_thread():
    dataset = TensorDataset(torch.randn(4, 3), torch.randint(2, (4,)))
    loader = DataLoader(dataset, 2, num_workers=2)
    learn = Learner((loader, loader), nn.Linear(3, 2))

    def children() -> list[str]:
        return [c for task in Path("/proc/self/task").iterdir() for c in (task / "children").read_text().split()]

    learn.fit(1)
    gc.collect()
    files, threads, processes = n_open_files(), threading.active_count(), children()
    for _ in range(3):
        learn.fit(1)
        with pytest.raises(LookupError, match="lost"):
            learn.fit(1, callbacks=[Breaks()])
    gc.collect()
    assert n_open_files() <= files and threading.active_count() <= threads and len(children()) <= len(processes)


def test_a_learner_that_is_dropped_frees_its_model_and_data():
    learn = make_learner()
    learn.fit(1)
    refs = [weakref.ref(learn), weakref.ref(learn.model), weakref.ref(learn.data)]
    del learn
    gc.collect()
    assert [ref() for ref in refs] == [None, None, None]


def test_the_graph_of_a_batch_is_free_before_the_next_one_is_built():
    alive: list[int] = []

    class Count(Callback):
        refs: list[weakref.ref[Any]] = []

        def before_forward(self, learn: Learner) -> None:
            if learn.training:
                alive.append(sum(ref() is not None for ref in self.refs))

        def after_forward(self, learn: Learner) -> None:
            self.refs.append(weakref.ref(learn.pred))

    make_learner(callbacks=Count()).fit(2)
    assert alive == [0] * len(alive)


def test_predictions_do_not_keep_the_graph_or_the_batches():
    learn = make_learner()
    preds, targets = learn.get_preds()
    assert not preds.requires_grad and preds.grad_fn is None
    assert preds.untyped_storage().nbytes() == preds.nbytes and targets.untyped_storage().nbytes() == targets.nbytes


def test_an_interrupted_fit_keeps_no_gradients_and_no_activations():
    learn = make_learner()
    for _ in range(2):
        with pytest.raises(LookupError, match="lost"):
            learn.fit(1, callbacks=[Breaks()])
        assert all(p.grad is None for p in learn.model.parameters()) and learn.loss is None
