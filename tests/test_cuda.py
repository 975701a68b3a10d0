"""What only a CUDA device can show: real streams, graphs, cuDNN, memory that runs out, and with two devices NCCL.

Everything else runs on the CPU, and on the stand-in accelerator of tests/accelerator. What needs several ranks, or a
process in which CUDA has not been used, runs in a process of its own, as `python tests/test_cuda.py FUNCTION`, which
calls that function of this file.
"""

import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # cuBLAS reads it at its first use; deterministic sums need it

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from learnkit import Callback, DataBunch, Learner, TensorLoader, accuracy, callbacks, load_learner
from learnkit.callbacks import EMA, Accumulate, AutoMicrobatch, Checkpoint, ClipGradients, MixedPrecision
from learnkit.checkpoint import snapshot as snapshots
from learnkit.devices.accelerator import accelerator
from learnkit.devices.transfer import Reading
from learnkit.distributed import RankFailed, all_sum, gather_for_metrics, get_rank, launch

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda", 0)
HAS_CUDA = (
    kind := accelerator()
) is not None and kind.type == "cuda"  # does not use CUDA, so that this process may still fork
needs_two = pytest.mark.skipif(not HAS_CUDA or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
pytestmark = [
    pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # the compiler's advice
]
FIRST, LAST = 5, 55
MOMENT, SECOND = 20_000_000, 2_000_000_000  # cycles of a GPU: some 10 ms, and one second
MB = 2**20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class NoReads(Callback):
    """Fifty steps, and fifty batches of a validation, in which whoever waits for the device raises an error."""

    in_trials = False
    order = -10_000

    def before_batch(self, learn):
        if learn.batch_index == FIRST:
            torch.cuda.set_sync_debug_mode("error")

    def after_batch(self, learn):
        if learn.batch_index == LAST:
            torch.cuda.set_sync_debug_mode("default")

    def around_fit(self, learn, run):
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def net(norm=True):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        *([nn.BatchNorm2d(8)] if norm else []),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ]
    return nn.Sequential(*layers)


def samples(n=60 * 8):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (n,), generator=generator)
    return torch.randn(n, 3, 8, 8, generator=generator) + y.view(-1, 1, 1, 1), y


def learner(loader=True, *, n=60 * 8, bs=8, model=None, device=DEVICE, **options):
    x, y = samples(n)
    if loader:
        data = DataBunch.create(TensorDataset(x, y), TensorDataset(x, y), bs=bs, num_workers=0)
    else:
        data = DataBunch.from_tensors((x, y), (x, y), bs=bs, device=device)
    options = {"metrics": accuracy, "seed": 0, **options}
    return Learner(data, net() if model is None else model, device=device, **options)


def weights(learn):
    return [p.detach().clone() for p in learn.model.parameters()]


def in_new_process(*arguments, seconds=120, **variables):
    """What a Python process prints, which must succeed within `seconds`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def called(function, seconds=120, **variables):
    """What a function of this file returns in a process of its own."""
    return json.loads(in_new_process(__file__, function.__name__, seconds=seconds, **variables).splitlines()[-1])


# --- who waits for the device ------------------------------------------------
WORDS = {
    "float32": lambda learn: learn,
    "tf32": lambda learn: learn.to_fp32(tf32=True),
    "bfloat16": lambda learn: learn.to_bf16(),
    "pure bfloat16": lambda learn: learn.to_bf16(pure=True),
    "channels last": lambda learn: learn.to_channels_last(),
    "bfloat16, channels last, compiled": lambda learn: learn.to_bf16().to_channels_last().compile(),
}


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("loader", [True, False])
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    "more", [(), (partial(Accumulate, 3), ClipGradients, EMA)], ids=["plain", "accumulated, clipped, averaged"]
)
def test_fifty_steps_with_bar_metrics_recorder_and_schedule_never_wait_for_the_device(loader, word, more):
    learn = WORDS[word](learner(loader, callbacks=[make() for make in more]))
    learn.no_logging()
    with redirect_stdout(Terminal()):
        learn.fit_one_cycle(1)
        learn.fit_one_cycle(1, callbacks=[NoReads()])
    assert torch.tensor(learn.recorder.losses).isfinite().all()


CALLBACKS = {
    "Accumulate": lambda: Accumulate(2),
    "ActivationStats": lambda: callbacks.ActivationStats(),
    "AutoMicrobatch": lambda: AutoMicrobatch(4),
    "BnFreeze": lambda: callbacks.BnFreeze(),
    "CSVLogger": lambda: callbacks.CSVLogger("log.csv"),
    "ChannelsLast": lambda: callbacks.ChannelsLast(),
    "Checkpoint": lambda: Checkpoint("kept"),
    "ClipGradients": lambda: ClipGradients(1.0),
    "CutMix": lambda: callbacks.CutMix(),
    "EMA": lambda: EMA(),
    "EarlyStopping": lambda: callbacks.EarlyStopping(),
    "GradientStats": lambda: callbacks.GradientStats(),
    "GradualUnfreezing": lambda: callbacks.GradualUnfreezing(plan={0: 1, 1: 0}),
    "JSONLogger": lambda: callbacks.JSONLogger("log.jsonl"),
    "LabelSmoothing": lambda: callbacks.LabelSmoothing(),
    "Lookahead": lambda: callbacks.Lookahead(),
    "MixUp": lambda: callbacks.MixUp(),
    "Profile": lambda: callbacks.Profile(),
    "ReduceLROnPlateau": lambda: callbacks.ReduceLROnPlateau(),
    "SAM": lambda: callbacks.SAM(),
    "SWA": lambda: callbacks.SWA(start=0.0),
    "SaveBest": lambda: callbacks.SaveBest(),
    "StopAfter": lambda: callbacks.StopAfter(steps=1000),
    "TensorBoardLogger": lambda: callbacks.TensorBoardLogger("runs"),
    "TerminateOnNaN": lambda: callbacks.TerminateOnNaN(),
    "Timer": lambda: callbacks.Timer(),
}
ELSEWHERE = {
    "Communicate": "of several ranks",
    "Distributed": "of several ranks",
    "FullyShard": "of several ranks",
    "ReduceAfterwards": "of several ranks",
    "Compiled": "above",
    "MixedPrecision": "above and below",
    "ParamScheduler": "above",
    "Progress": "above",
    "Recorder": "above",
    "OptimizerModes": "has no hook in a step",
    "MLflowLogger": "as CSVLogger, of a package that tests do not install",
    "WandbLogger": "as CSVLogger, of a package that tests do not install",
}


def reading_in_each_step():
    """The callbacks of which docs/callbacks.md says that they read the device in each step."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \|([^|]*)\|$", (ROOT / "docs" / "callbacks.md").read_text(), re.MULTILINE)
    return {name for name, note in rows if "reads the device in each step" in note}


def test_every_callback_is_tried_here_or_said_to_be_tried_elsewhere():
    assert {
        name for name, value in vars(callbacks).items() if isinstance(value, type) and issubclass(value, Callback)
    } == set(CALLBACKS) | set(ELSEWHERE)
    assert reading_in_each_step() <= set(CALLBACKS)


@pytest.mark.parametrize("name", CALLBACKS)
def test_no_callback_waits_for_the_device_in_a_step_unless_its_page_says_so(name):
    learn = learner(callbacks=[CALLBACKS[name]()], splitter=lambda model: [model[:2], model[2:]])

    def fit(*more):
        with learn.no_logging():
            learn.fit(1, 1e-3, callbacks=more)

    fit()
    if name not in reading_in_each_step():
        return fit(NoReads())
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        fit(NoReads())


def n_waits(work):
    """How often the host waits for the device in it, as far as CUDA's debug mode sees it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


def test_float16_reads_the_device_once_a_step():
    counts = []
    for n in (20, 60):
        learn = learner(n=8 * n, metrics=()).to_fp16()
        learn.data.valid_dl = None
        with learn.no_logging():
            learn.fit_one_cycle(1)
            counts.append(n_waits(lambda learn=learn: learn.fit_one_cycle(1)))
    assert counts[1] - counts[0] == 40


# --- streams -----------------------------------------------------------------
class See(Callback):
    """Keeps what each batch is on the device, behind kernels that take long: before it is computed with, or after."""

    order = 1000

    def __init__(self, slow=""):
        self.slow, self.seen = slow, []

    def before_batch(self, learn):
        if self.slow == "before":
            torch.cuda._sleep(MOMENT)
        self.seen.append((learn.inputs[0].clone(), learn.target.clone()))

    def after_batch(self, learn):
        if self.slow == "after":
            torch.cuda._sleep(MOMENT)


def numbered(n=2048, width=1000):
    return torch.randn(n, width), torch.arange(n) % 3


LOADERS = {
    "pinned": lambda x, y: DataLoader(TensorDataset(x, y), 64, pin_memory=True),
    "pageable": lambda x, y: DataLoader(TensorDataset(x, y), 64),
    "pinned by two workers": lambda x, y: DataLoader(TensorDataset(x, y), 64, pin_memory=True, num_workers=2),
    "cut ahead": lambda x, y: TensorLoader((x, y), bs=64, n_ahead=3),
    "a last short batch": lambda x, y: DataLoader(TensorDataset(x, y), 60, pin_memory=True),
    "on the device": lambda x, y: DataBunch.from_tensors((x, y), (x, y), bs=64, device=DEVICE).valid_dl,
}


@pytest.mark.parametrize("slow", ["", "before", "after"], ids=["", "slow kernels before", "slow kernels after"])
@pytest.mark.parametrize("name", LOADERS)
def test_batches_that_come_on_a_stream_of_their_own_are_those_of_the_host(name, slow):
    x, y = numbered()
    loader, see = LOADERS[name](x, y), See(slow)
    learn = Learner(DataBunch(loader), nn.Linear(1000, 3), callbacks=[see], device=DEVICE)
    with learn.no_logging():
        learn.fit(1)
    assert torch.equal(torch.cat([own.cpu() for own, _ in see.seen]), x) and torch.equal(
        torch.cat([own.cpu() for _, own in see.seen]), y
    )


def test_predictions_copied_beside_slow_kernels_are_those_of_the_model():
    x, y = numbered()
    model = nn.Linear(1000, 3).to(DEVICE)
    learn = Learner(
        DataBunch([(x, y)], DataLoader(TensorDataset(x, y), 64, pin_memory=True)),
        model,
        device=DEVICE,
        callbacks=[See("before")],
    )
    preds, targets = learn.get_preds()
    with torch.no_grad():
        expected = model(x.to(DEVICE)).cpu()
    assert torch.allclose(preds, expected, atol=1e-5) and torch.equal(targets, y)


def test_a_reading_has_arrived_when_the_device_has_come_to_it_and_is_of_the_moment_it_was_made():
    values = torch.arange(3.0, device=DEVICE)
    torch.cuda._sleep(SECOND)
    reading = Reading(values)
    values.fill_(9)
    assert not reading.has_arrived
    torch.cuda.synchronize()
    assert reading.has_arrived and reading.tolist() == [0, 1, 2]


def test_a_reading_that_is_read_too_early_waits():
    values = torch.arange(3.0, device=DEVICE)
    torch.cuda._sleep(SECOND)
    assert Reading(values + 1).tolist() == [1, 2, 3]


def trains_with_everything():
    """Two epochs with loaders of both kinds, validations, predictions, and checkpoints that are written in the
    background.
    """
    for loader in (True, False):
        more = [
            EMA(),
            ClipGradients(1.0),
            Accumulate(2),
            Checkpoint(f"kept {loader}", every_n_steps=7, async_write=True),
            callbacks.MixUp(),
        ]
        learn = learner(loader, n=160, callbacks=more).to_bf16().to_channels_last()
        with redirect_stdout(Terminal()):
            learn.fit_one_cycle(2, 1e-2)
        learn.get_preds()
    return "trained"


def race():
    """A kernel on one stream changes what a kernel on another one has just made: an error of this script's."""
    x = torch.rand(10_000, device=DEVICE)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.mul(x, 5, out=x)
    torch.cuda.synchronize()


def test_cuda_sanitizer_finds_a_race_where_there_is_one():
    with pytest.raises(AssertionError, match="data race"):
        called(race, TORCH_CUDA_SANITIZER="1")


def test_cuda_sanitizer_finds_none_in_a_fit_with_everything():
    assert called(trains_with_everything, seconds=240, TORCH_CUDA_SANITIZER="1") == "trained"


# --- CUDA graphs -------------------------------------------------------------
def eager_and_graphs(model=net, words=()):
    """Two learners that are alike, the second one compiled into CUDA graphs."""
    pair = (
        learner(False, n=160, bs=16, model=model()),
        learner(False, n=160, bs=16, model=model()).compile(mode="reduce-overhead"),
    )
    for learn in pair:
        for word in words:
            getattr(learn, word)()
    return pair


@pytest.mark.parametrize("words", [(), ("to_bf16", "to_channels_last")], ids=["float32", "bfloat16, channels last"])
def test_losses_and_values_of_a_model_in_cuda_graphs_are_those_of_the_eager_one(words):
    eager, graphs = eager_and_graphs(words=words)
    for learn in (eager, graphs):
        with learn.no_logging():
            learn.fit_one_cycle(3, 1e-2)
    tolerance = {"rel": 5e-2 if words else 1e-2}
    assert graphs.recorder.losses == pytest.approx(eager.recorder.losses, **tolerance)
    assert graphs.values["valid_loss"] == pytest.approx(eager.values["valid_loss"], **tolerance)


def test_predictions_kept_over_batches_of_a_model_in_cuda_graphs_are_those_of_the_eager_one():
    eager, graphs = eager_and_graphs()
    for learn in (eager, graphs):
        with learn.no_logging():
            learn.fit_one_cycle(1, 1e-2)
    graphs.model.load_state_dict(eager.model.state_dict())
    (preds, targets, losses), (own, own_targets, own_losses) = (
        learn.get_preds(with_loss=True) for learn in (eager, graphs)
    )
    assert len(preds) == 160 and torch.allclose(own, preds, atol=1e-4) and torch.allclose(own_losses, losses, atol=1e-4)
    assert torch.equal(own_targets, targets)


@pytest.mark.parametrize(
    "more",
    [
        partial(Accumulate, 2),
        ClipGradients,
        EMA,
        callbacks.SAM,
        callbacks.MixUp,
        partial(callbacks.ActivationStats, every=3),
    ],
    ids=["Accumulate", "ClipGradients", "EMA", "SAM", "MixUp", "ActivationStats"],
)
def test_callbacks_train_a_model_in_cuda_graphs_as_an_eager_one(more):
    pair = eager_and_graphs()
    for learn in pair:
        with learn.no_logging():
            learn.fit_one_cycle(2, 1e-2, callbacks=[more()])
    assert pair[1].recorder.losses == pytest.approx(pair[0].recorder.losses, rel=2e-2)


def captured(opt):
    """The optimizer's `step` as a CUDA graph, from its fourth call on."""
    own, params = opt.step, [p for group in opt.param_groups for p in group["params"]]
    graph, static, n_calls = torch.cuda.CUDAGraph(), [], 0

    def step():
        nonlocal n_calls
        n_calls += 1
        if n_calls <= 3:
            return own()  # the optimizer makes its state
        if n_calls == 4:
            static.extend(p.grad.clone() for p in params)
            for p, grad in zip(params, static, strict=True):
                p.grad = grad
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                own()
        else:
            for grad, p in zip(static, params, strict=True):
                grad.copy_(p.grad)
        graph.replay()

    opt.step = step
    return opt


def test_a_captured_optimizer_follows_the_schedule_through_its_tensor_rate():
    def fit(wrapped, lr):
        model = net(norm=False).to(DEVICE)
        opt = torch.optim.Adam(model.parameters(), lr=lr, capturable=True)
        learn = learner(False, n=160, model=model, opt_func=wrapped(opt))
        with learn.no_logging():
            learn.fit_one_cycle(2, 1e-2, moms=None)
        return learn, opt

    plain, _ = fit(lambda opt: opt, 1e-2)
    rate = torch.tensor(1e-2, device=DEVICE)
    graph, opt = fit(captured, rate)
    assert opt.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(plain.recorder.lrs[-1])
    assert graph.recorder.lrs == pytest.approx(plain.recorder.lrs)
    for a, b in zip(weights(graph), weights(plain), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


# --- cuDNN and kernels -------------------------------------------------------
@pytest.mark.parametrize("words", [(), ("to_bf16", "to_channels_last")], ids=["float32", "bfloat16, channels last"])
def test_two_deterministic_fits_are_equal_bit_by_bit(words):
    found = []
    for _ in range(2):
        learn = learner()
        for word in words:
            getattr(learn, word)()
        with learn.deterministic(), learn.no_logging():
            learn.fit_one_cycle(2, 1e-2)
        found.append((weights(learn), learn.recorder.losses, learn.values))
    assert found[0][1:] == found[1][1:] and all(map(torch.equal, found[0][0], found[1][0]))


def test_deterministic_overrules_cudnns_benchmark_and_puts_it_back():
    before = torch.backends.cudnn.benchmark
    learn = learner().to_channels_last(cudnn_benchmark=True)
    try:
        with learn.deterministic(), learn.no_logging():
            assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
            learn.fit(1)
        assert torch.backends.cudnn.benchmark
        with learn.no_logging():
            learn.fit(1)
    finally:
        torch.backends.cudnn.benchmark = before


def test_with_channels_last_convolutions_see_such_tensors_and_compute_the_same():
    seen = []
    plain, learn = learner(), learner().to_channels_last()
    learn.model[0].register_forward_hook(lambda layer, inputs, output: seen.extend([inputs[0], output, layer.weight]))
    for one in (plain, learn):
        with one.no_logging():
            one.fit(1, 1e-3)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
    assert learn.recorder.losses == pytest.approx(plain.recorder.losses, rel=1e-2)


@pytest.mark.parametrize("opt_func", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizers_step_in_one_kernel_and_as_on_the_cpu(opt_func):
    fits = []
    for device in (DEVICE, torch.device("cpu")):
        torch.manual_seed(0)
        learn = learner(False, model=nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), opt_func=opt_func, device=device)
        with learn.no_logging():
            learn.fit(1, 1e-2)
        fits.append(learn)
    assert fits[0].opt.param_groups[0]["fused"]
    for a, b in zip(weights(fits[0]), weights(fits[1]), strict=True):
        assert torch.allclose(a.cpu(), b, atol=1e-3)


@pytest.mark.parametrize("word", ["to_fp16", "to_bf16"])
def test_half_precision_on_a_device_is_close_to_float32(word):
    full, half = learner(False), getattr(learner(False), word)()
    for learn in (full, half):
        with learn.no_logging():
            learn.fit_one_cycle(2, 1e-2)
    assert abs(full.values["valid_loss"] - half.values["valid_loss"]) < 2e-2


def test_steps_that_overflow_in_float16_are_those_of_torchs_scaler_by_hand():
    x, y = samples(8 * 12)
    batches = [(x[i : i + 8] * (1e6 if i // 8 in (3, 7) else 1), y[i : i + 8]) for i in range(0, len(x), 8)]
    model = net(norm=False)
    learn = Learner(
        DataBunch(batches), net(norm=False), opt_func=partial(torch.optim.SGD, momentum=0.9), wd=0.0, device=DEVICE
    )
    learn.to_fp16(init_scale=1024.0, growth_interval=3)
    with learn.no_logging():
        learn.fit(1, 0.01)
    precision = next(callback for callback in learn.callbacks if isinstance(callback, MixedPrecision))

    model.to(DEVICE).train()
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    scaler, scales, skips, done = torch.amp.GradScaler("cuda", 1024.0, growth_interval=3), [], [], 0
    for xb, yb in batches:
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(xb.to(DEVICE)), yb.to(DEVICE))
        scales.append(scaler.get_scale())
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if scaler.get_scale() < scales[-1]:
            skips.append(done)
        else:
            done += 1
    assert precision.scales == scales and precision.skips == skips == [3, 6] and learn.step == done == 10
    for a, b in zip(weights(learn), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


# --- memory that runs out ----------------------------------------------------
@contextmanager
def at_most(n_bytes):
    """In the block, this process may allocate so many bytes on the device more than it has."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(DEVICE)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(DEVICE) + n_bytes) / total), DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        gc.collect()
        torch.cuda.empty_cache()


def wide(n_bytes, *callbacks, n_batches=2, **options):
    """A learner of batches of 64, whose activations take `n_bytes` each, of which three or four are alive at a time."""
    torch.manual_seed(0)
    width, x = n_bytes // 4 // 64, torch.randn(64, 1)
    model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Tanh(), nn.Linear(width, 1))
    return Learner(
        DataBunch([(x, x.sin())] * n_batches),
        model,
        opt_func=torch.optim.SGD,
        wd=0.0,
        callbacks=callbacks,
        device=DEVICE,
        **options,
    )


def test_a_batch_that_does_not_fit_is_split_and_its_gradient_is_that_of_the_whole():
    whole, parts = wide(200 * MB), wide(200 * MB, micro := AutoMicrobatch())
    with whole.no_logging():
        whole.fit(1, 1e-6)
    with at_most(400 * MB), parts.no_logging():
        parts.fit(1, 1e-6)
    assert micro.size is not None and micro.size < 64 and parts.step == 2
    for a, b in zip(weights(parts), weights(whole), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_batch_that_does_not_fit_into_what_the_device_has_left_is_split():
    free, _ = torch.cuda.mem_get_info(DEVICE)
    others = torch.empty(
        free - 2048 * MB, dtype=torch.uint8, device=DEVICE
    )  # the driver has no more to give, not torch's limit
    learn = wide(700 * MB, micro := AutoMicrobatch())
    with learn.no_logging():
        learn.fit(1, 1e-9)
    assert micro.size is not None and learn.step == 2 and others.is_cuda


def test_memory_that_ran_out_is_explained_and_a_smaller_batch_trains_afterwards():
    learn = wide(200 * MB)
    with at_most(400 * MB):
        used = torch.cuda.memory_allocated()
        before = weights(learn)
        with pytest.raises(torch.OutOfMemoryError) as caught, learn.no_logging():
            learn.fit(1, 1e-6)
        assert any(f"memory ran out on {DEVICE}" in note and "64 samples" in note for note in caught.value.__notes__)
        assert all(map(torch.equal, weights(learn), before)) and all(p.grad is None for p in learn.model.parameters())
        del caught, before
        gc.collect()
        assert torch.cuda.memory_allocated() - used < 20 * MB
        x, y = learn.data.train_dl[0]
        learn.data = DataBunch([(x[:8], y[:8])] * 3)
        with learn.no_logging():
            learn.fit(1, 1e-6)
        assert learn.step == 3


def test_a_batch_size_that_was_found_trains_and_four_times_as_much_does_not():
    learn = wide(32 * MB)
    with at_most(400 * MB):
        found = learn.batch_size_find(4096)
        assert 64 <= found < 4096 and learn.step == 0
        x = torch.randn(found * 4, 1)
        learn.data = DataBunch([(x[:found], x[:found])] * 3)
        with learn.no_logging():
            learn.fit(1, 1e-6)
        assert learn.step == 3
        learn.data = DataBunch([(x, x)])
        with pytest.raises(torch.OutOfMemoryError), learn.no_logging():
            learn.fit(1, 1e-6)


def test_where_free_memory_is_in_pieces_parts_of_a_batch_take_them():
    learn = wide(60 * MB, micro := AutoMicrobatch())
    with at_most(600 * MB):
        # Blocks of 5 MB share segments of 20 MB, so that the three free ones of each cannot be given back and joined.
        blocks = [torch.empty(5 * MB, dtype=torch.uint8, device=DEVICE) for _ in range(100)]
        kept = blocks[::4]
        del blocks
        free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        assert free > 300 * MB  # more than the activations of a whole batch take
        with learn.no_logging():
            learn.fit(1, 1e-6)
        assert micro.size is not None and learn.step == 2 and len(kept) == 25


# --- checkpoints and random numbers ------------------------------------------
def noisy():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


@pytest.mark.parametrize("async_write", [False, True])
def test_a_checkpoint_that_is_taken_while_kernels_run_is_of_its_step(async_write):
    learn, taken = (
        learner(
            n=160, callbacks=[See("before"), Checkpoint("kept", every_n_steps=3, keep=100, async_write=async_write)]
        ),
        {},
    )

    @learn.on("after_step")
    def keep(learn):
        taken[learn.step] = {name: value.clone() for name, value in learn.model.state_dict().items()}

    with learn.no_logging():
        learn.fit_one_cycle(1, 1e-1)
    found = [snapshots.read_snapshot(path) for path in snapshots.all_in(Path("kept"))]
    steps = [about["step"] for _, about in found]
    assert steps == [3, 6, 9, 12, 15, 18, 20]
    for parts, about in found:
        assert all(torch.equal(value.cpu(), taken[about["step"]][name].cpu()) for name, value in parts["model"].items())


@pytest.mark.parametrize(
    "words", [(), ("to_fp16",), ("to_bf16", "to_channels_last")], ids=["float32", "float16", "bfloat16, channels last"]
)
@pytest.mark.parametrize("async_write", [False, True])
def test_a_resumed_fit_is_one_that_never_stopped_bit_by_bit(words, async_write):
    class Leave(Callback):
        order = 10_000

        def after_batch(self, learn):
            if learn.training and learn.step == 25:
                raise ConnectionAbortedError

    def fit(folder, *more, **options):
        learn = learner(
            n=160, model=noisy(), callbacks=[Checkpoint(folder, every_n_steps=4, async_write=async_write), *more]
        )
        for word in words:
            getattr(learn, word)()
        with learn.deterministic(), learn.no_logging():
            learn.fit_one_cycle(2, 1e-2, **options)
        return learn

    whole = fit("whole")
    with pytest.raises(ConnectionAbortedError):
        fit("parts", Leave())
    torch.rand(7, device=DEVICE)  # the device's generator is elsewhere
    parts = fit("parts", resume=True)
    assert all(map(torch.equal, weights(parts), weights(whole))) and parts.values == whole.values


def test_finders_leave_weights_and_the_devices_random_numbers_as_they_were():
    learn = learner(n=160, model=noisy())
    before, state = weights(learn), torch.cuda.get_rng_state(DEVICE)
    with learn.no_logging():
        learn.lr_find(num_it=10)
        learn.batch_size_find(32)
        learn.fast_run()
        learn.overfit_batches(1, 5)
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), state) and all(map(torch.equal, weights(learn), before))


@pytest.mark.parametrize("name", ["model.pt2", "model.safetensors"])
def test_an_exported_model_predicts_on_the_device_what_the_learner_predicts(name):
    learn, (x, _) = learner(n=160), samples(16)
    with learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
    learn.export(name)
    model = {"model": net()} if name.endswith("safetensors") else {}
    for device in (DEVICE, torch.device("cpu")):
        predictor = load_learner(name, device=device, **model)
        for given in (x, x.to(DEVICE)):
            assert torch.allclose(predictor.predict(given), learn.predict(x), atol=1e-4)


# --- processes ---------------------------------------------------------------
def uses_the_device():
    return float(torch.ones(2, device=DEVICE).sum())


def launches_after_asking_whether_there_is_a_device():
    assert torch.cuda.is_available()
    return launch(uses_the_device, 2, every_rank=True, timeout=90)


def launches_after_using_the_device():
    return [uses_the_device(), *launch(uses_the_device, 2, every_rank=True, timeout=90)]


def launches_after_a_learner_was_made():
    data = DataBunch.create(TensorDataset(*samples(16)), bs=8)
    assert data.train_dl.pin_memory
    return launch(uses_the_device, 2, every_rank=True, timeout=90)


@pytest.mark.parametrize(
    "function, expected",
    [
        (launches_after_asking_whether_there_is_a_device, [2, 2]),
        (launches_after_using_the_device, [2, 2, 2]),
        (launches_after_a_learner_was_made, [2, 2]),
    ],
)
def test_ranks_can_use_the_device_whatever_the_process_that_launches_them_has_done(function, expected):
    assert called(function) == expected


def test_workers_of_a_loader_that_were_forked_beside_cuda_train_twice():
    learn = learner(n=160)
    learn.data = DataBunch.create(TensorDataset(*samples(160)), bs=8, num_workers=2)
    with learn.no_logging():
        learn.fit(2)
    assert learn.step == 40


# --- two devices -------------------------------------------------------------
@needs_two
@pytest.mark.parametrize("loader", [True, False])
def test_a_learner_on_the_second_device_uses_that_one_alone(loader):
    second = torch.device("cuda", 1)
    torch.zeros(1, device=DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.max_memory_allocated(DEVICE)
    learn = learner(
        loader,
        device=second,
        callbacks=[EMA(), ClipGradients(1.0), Checkpoint("kept", every_n_steps=9, async_write=True)],
    ).to_fp16()
    with redirect_stdout(Terminal()):
        learn.fit_one_cycle(2, 1e-2)
    preds, _ = learn.get_preds()
    assert (
        torch.cuda.current_device() == 0
        and all(p.device == second for p in learn.model.parameters())
        and preds.device.type == "cpu"
    )
    assert torch.cuda.max_memory_allocated(DEVICE) == before


def alone(**options):
    """A fit of one process with batches of 16 samples: what two ranks with 8 each must equal."""
    learn = learner(False, n=160, bs=16, model=net(norm=False), **options)
    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
    return learn


def rank_learner(**options):
    device = torch.device("cuda", get_rank() if dist.is_initialized() else int(os.environ["LOCAL_RANK"]))
    return learner(False, n=160, bs=8, model=net(norm=False), device=device, **options)


ALGORITHMS = {
    "allreduce": {},
    "fp16": {},
    "bf16": {},
    "bytegrad": {},
    "powersgd": {"warmup_steps": 2},
    "local_sgd": {"warmup_steps": 2},
    "hierarchical": {"warmup_steps": 2},
    "decentralized": {},
}


def of_two_ranks(function, *args):
    """[what a rank returns] of two ranks; none hangs for long."""
    return launch(function, 2, *args, every_rank=True, timeout=60)


def report(learn):
    """What a test compares: all values, where the model is, and its weights."""
    state = [p.detach() for p in learn.model.state_dict().values()]
    return {
        "values": learn.values,
        "devices": sorted({str(p.device) for p in state}),
        "weights": [float(p.double().sum()) for p in state],
        "backend": dist.get_backend_config() if dist.is_initialized() else "",
        "allocated": [torch.cuda.memory_allocated(i) > 0 for i in range(2)],
    }


def fit_as_rank(algorithm="allreduce", word="to_distributed", **options):
    learn = rank_learner()
    if word == "to_distributed":
        learn.to_distributed(algorithm=algorithm, **ALGORITHMS[algorithm], **options)
    else:
        learn.to_fsdp(**options)
    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
    return report(learn) if word == "to_distributed" else {"values": learn.values}


def distributed():
    return of_two_ranks(fit_as_rank)


@needs_two
def test_two_ranks_on_nccl_train_as_one_process_does_each_on_its_device():
    ranks, one = called(distributed), alone()
    for rank, found in enumerate(ranks):
        assert found["values"] == pytest.approx(one.values, rel=1e-3) and found["devices"] == [f"cuda:{rank}"]
        assert "cuda:nccl" in found["backend"] and found["allocated"] == [rank == 0, rank == 1]
    assert ranks[0]["weights"] == ranks[1]["weights"]


def every_algorithm():
    return {name: of_two_ranks(fit_as_rank, name) for name in ALGORITHMS}


@needs_two
def test_every_algorithm_on_nccl_trains_and_leaves_equal_weights():
    one = alone()
    for name, ranks in called(every_algorithm, seconds=400).items():
        assert ranks[0] | {"devices": 0, "allocated": 0} == ranks[1] | {"devices": 0, "allocated": 0}, name
        assert ranks[0]["values"]["valid_loss"] == pytest.approx(one.values["valid_loss"], rel=0.2), name


def fsdp_as_rank(options):
    return fit_as_rank(word="to_fsdp", **options)


def every_way_of_fsdp():
    ways = {}, {"cpu_offload": True}, {"blocks": nn.Conv2d, "activation_checkpointing": True}
    return [of_two_ranks(fsdp_as_rank, options) for options in ways]


@needs_two
def test_to_fsdp_on_nccl_trains_as_one_process_does_offloaded_too():
    one = alone()
    for ranks in called(every_way_of_fsdp, seconds=240):
        for found in ranks:
            assert found["values"] == pytest.approx(one.values, rel=1e-2)


def with_own_group(backend, set_device):
    rank = int(os.environ["LOCAL_RANK"])
    if set_device:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend)
    learn = rank_learner().to_distributed()
    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
    found = report(learn)
    dist.destroy_process_group()
    return found


def every_own_group():
    return [
        of_two_ranks(with_own_group, backend, set_device)
        for backend in ("nccl", "cpu:gloo,cuda:nccl")
        for set_device in (True, False)
    ]


@needs_two
def test_a_group_that_the_script_made_is_used_whether_or_not_it_has_set_the_device():
    one = alone()
    for ranks in called(every_own_group, seconds=300):
        for rank, found in enumerate(ranks):
            assert found["values"] == pytest.approx(one.values, rel=1e-3) and found["devices"] == [f"cuda:{rank}"]


def half_as_rank(word):
    learn = getattr(rank_learner(), word)().to_distributed(sync_bn=True)
    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
    return report(learn)


def half_precision():
    return {word: of_two_ranks(half_as_rank, word) for word in ("to_fp16", "to_bf16")}


@needs_two
def test_half_precision_on_two_ranks_is_close_to_one_process_in_float32():
    one = alone()
    for ranks in called(half_precision, seconds=200).values():
        assert ranks[0]["weights"] == ranks[1]["weights"]
        assert ranks[0]["values"]["valid_loss"] == pytest.approx(one.values["valid_loss"], abs=2e-2)


def norm_as_rank():
    learn = learner(False, n=160, bs=8, device=torch.device("cuda", int(os.environ["LOCAL_RANK"]))).to_distributed(
        sync_bn=True
    )
    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)
    return report(learn)


def synchronized_norm():
    return of_two_ranks(norm_as_rank)


@needs_two
def test_batch_norm_over_two_ranks_is_that_of_one_process():
    ranks, one = called(synchronized_norm), learner(False, n=160, bs=16)
    with one.no_logging():
        one.fit_one_cycle(2, 1e-2)
    for found in ranks:
        assert found["values"] == pytest.approx(one.values, rel=5e-3)


def empty_as_rank():
    """One sample to validate, of which one rank has none; and collectives to which one rank has nothing to give."""
    learn = rank_learner()
    x, y = samples(1)
    learn.data.valid_dl = DataBunch.from_tensors((x, y), (x, y), bs=1, device=learn.device).valid_dl
    learn.to_distributed()
    with learn.no_logging():
        learn.fit(1, 1e-2)
    preds, targets = learn.get_preds()
    mine = torch.arange(2.0, device=learn.device) if get_rank() == 0 else torch.empty(0, device=learn.device)
    gathered = gather_for_metrics(mine)
    return [
        learn.values,
        learn.validate(),
        preds.tolist(),
        targets.tolist(),
        gathered.tolist(),
        str(gathered.device.type),
        float(all_sum(torch.ones(()))),
        float(all_sum(torch.ones((), device=learn.device))),
    ]


def empty_shares():
    return of_two_ranks(empty_as_rank)


@needs_two
def test_a_rank_without_samples_has_the_values_of_all():
    first, second = called(empty_shares)
    assert first == second and first[0]["valid_loss"] == pytest.approx(first[1]["valid_loss"]) and len(first[2]) == 1
    assert first[4:] == [[0, 1], "cuda", 2, 2]


def falls(how):
    learn = rank_learner().to_distributed(hang_timeout=3.0)

    @learn.on("before_step")
    def fall(learn):
        if learn.step != 5 or get_rank() != 1:
            return
        Path(how).write_text(str(time.time()))
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with learn.no_logging():
        learn.fit(2)


def one_falls():
    """{how: [seconds from then until all have ended, why]}"""
    found = {}
    for how in ("killed", "hangs"):
        try:
            launch(falls, 2, how, timeout=60)
        except (RankFailed, TimeoutError) as error:
            found[how] = [time.time() - float(Path(how).read_text()), f"{type(error).__name__}: {error}"]
    return found


@needs_two
def test_where_a_rank_is_killed_or_hangs_in_nccl_all_have_ended_within_ten_seconds():
    found = called(one_falls)
    assert (
        found["killed"][0] < 10 and "RankFailed: rank 1 of 2 failed: it ended with signal SIGKILL" in found["killed"][1]
    )
    assert found["hangs"][0] < 10 and "RankFailed" in found["hangs"][1]


def stops_as_rank(folder):
    learn = rank_learner(callbacks=[Checkpoint(folder, every_n_steps=4)]).to_distributed()

    @learn.on("before_step", order=-10_000)
    def leave(learn):
        if learn.step == 13:
            raise ConnectionAbortedError

    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2)


def stops():
    try:
        launch(stops_as_rank, 2, "kept", timeout=60)
    except RankFailed as error:
        return str(error)


@needs_two
def test_a_checkpoint_of_two_ranks_is_gone_on_from_by_one():
    assert "ConnectionAbortedError" in called(stops)
    learn = learner(False, n=160, bs=16, model=net(norm=False), callbacks=[Checkpoint("kept")])
    with learn.no_logging():
        learn.fit_one_cycle(2, 1e-2, resume=True)
    assert learn.values == pytest.approx(alone().values, rel=1e-3) and learn.step == 20


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(globals()[sys.argv[1]]()))
