"""What only a CUDA device can show. Everything else runs on the CPU."""
import io
from contextlib import redirect_stdout

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import EMA, Accumulate, ClipGradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FIRST, LAST = 5, 55


class Terminal(io.StringIO):
    def isatty(self) -> bool: return True


class NoReads(Callback):
    """Fifty steps, and fifty batches of a validation, in which whoever waits for the device raises an error."""
    in_trials = False

    def before_batch(self, learn):
        if learn.batch_index == FIRST: torch.cuda.set_sync_debug_mode("error")

    def after_batch(self, learn):
        if learn.batch_index == LAST: torch.cuda.set_sync_debug_mode("default")

    def around_fit(self, learn, run):
        try: run()
        finally: torch.cuda.set_sync_debug_mode("default")


def learner(loader=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(60 * 8, 3, 8, 8), torch.randint(3, (60 * 8,))
    if loader: data = DataBunch.create(TensorDataset(x, y), TensorDataset(x, y), bs=8, num_workers=0)
    else: data = DataBunch.from_tensors((x, y), (x, y), bs=8)
    return Learner(data, model, metrics=accuracy, seed=0, **options)


@pytest.mark.parametrize("loader", [True, False])
@pytest.mark.parametrize("words", [(), ("to_bf16",), ("to_bf16", "to_channels_last", "compile")])
@pytest.mark.parametrize("callbacks", [(), (Accumulate, ClipGradients, EMA)])
def test_fifty_steps_with_bar_metrics_recorder_and_schedule_never_wait_for_the_device(loader, words, callbacks):
    learn = learner(loader, callbacks=[cls(3) if cls is Accumulate else cls() for cls in callbacks])
    for word in words: getattr(learn, word)()
    learn.no_logging()
    with redirect_stdout(Terminal()):
        learn.fit_one_cycle(1)
        learn.fit_one_cycle(1, callbacks=[NoReads()])
    assert torch.tensor(learn.recorder.losses).isfinite().all()


def test_batches_that_come_on_a_stream_of_their_own_are_those_of_the_host():
    seen = []

    class See(Callback):
        def before_batch(self, learn): seen.append((learn.inputs[0].clone(), learn.target.clone()))

    loader = DataLoader(TensorDataset(torch.randn(512, 1000), torch.arange(512) % 3), 64, pin_memory=True)
    Learner(DataBunch(loader), nn.Linear(1000, 3)).fit(1, callbacks=[See()])
    for (x, y), (own_x, own_y) in zip(loader, seen, strict=True):
        assert torch.equal(x, own_x.cpu()) and torch.equal(y, own_y.cpu())


@pytest.mark.parametrize("word", ["to_fp16", "to_bf16"])
def test_half_precision_on_a_device_is_close_to_float32(word):
    full, half = learner(False), getattr(learner(False), word)()
    for learn in (full, half):
        with learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    assert abs(full.values["valid_loss"] - half.values["valid_loss"]) < 2e-2


def test_a_batch_that_does_not_fit_is_split_on_the_device():
    from learnkit.callbacks import AutoMicrobatch
    free, _ = torch.cuda.mem_get_info()
    width = free // 4 // 6 // 64        # activations of 64 samples need more than there is, those of 8 do not
    x, y = torch.randn(64, 1), torch.randn(64, 1)
    micro = AutoMicrobatch()
    learn = Learner(DataBunch([(x, y)] * 2), nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.ReLU(), nn.Linear(width, 1)), callbacks=[micro])
    with learn.no_logging(): learn.fit(1, 1e-6)
    assert micro.size is not None and learn.step == 2
