"""Everything that a Learner does, on the device and on the CPU: the same bits, as the stand-in computes with the CPU's
kernels.

What is exported is tried by being listed: a callback, transform or metric that is in none of the tables makes a test
fail.
"""

import inspect
import io
import pickle
from contextlib import nullcontext, redirect_stdout
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RMSprop
from torch.utils.data import DataLoader, TensorDataset

import learnkit
import learnkit.callbacks as callbacks
import learnkit.vision as vision
from learnkit import Callback, DataBunch, Learner, StopFit, Together, accuracy, error_rate, load_learner
from learnkit.callbacks import *  # noqa: F403
from learnkit.callbacks import EMA, Accumulate, Checkpoint, ClipGradients, Progress
from learnkit.metrics import RootMeanSquaredError, mean_absolute_error, mean_squared_error, top_k_accuracy
from tests.accelerator import twin

N, SIDE, CLASSES = 40, 8, 3


def pictures(n=N):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, SIDE, SIDE, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def net():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


def learner(device, data=None, model=None, **options):
    x, y = pictures()
    data = DataBunch.from_tensors((x, y), (x[:15], y[:15]), bs=8, device=device) if data is None else data
    options = {"metrics": [accuracy], "seed": 3, **options}
    return Learner(data, net() if model is None else model, device=device, **options)


def on_host(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(v) for key, v in value.items() if key != "time"}
    if isinstance(value, (list, tuple)):
        return [on_host(v) for v in value]
    return value


def outcome(learn):
    return on_host(
        {
            "losses": learn.recorder.losses,
            "lrs": learn.recorder.lrs,
            "values": learn.values,
            "weights": dict(learn.model.state_dict()),
            "rows": learn.recorder.values,
            "preds": learn.get_preds(with_loss=True),
            "measured": learn.validate(),
        }
    )


def fit(learn, epochs=2, **options):
    with learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-2, **options)
    assert {t.device for t in (*learn.model.parameters(), *learn.model.buffers())} == {learn.device}
    return learn


def same(a, b, tolerance=0.0):
    """Numbers and tensors are equal, or as close as `tolerance`; everything else is equal."""
    a, b = on_host(a), on_host(b)
    if isinstance(a, (torch.Tensor, float)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key], tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y, tolerance)
    else:
        assert a == b


def both(make, tolerance=0.0):
    """What `make(device)` gives on the CPU and on the device, which must be equal."""
    same(make(torch.device("cpu")), make(torch.device("twin:0")), tolerance)
    assert twin.races() == []


# --- precision and speed -----------------------------------------------------
WORDS = {
    "float32": ([], 0.0),
    "to_bf16": (["to_bf16"], 5e-2),
    "to_fp16": (["to_fp16"], 5e-2),
    "to_fp32": (["to_bf16", "to_fp32"], 0.0),
    "to_channels_last": (["to_channels_last"], 1e-5),
    "to_bf16, to_channels_last": (["to_bf16", "to_channels_last"], 5e-2),
    "to_bf16(pure=True)": ([("to_bf16", {"pure": True})], 5e-2),
    "to_fp16(pure=True)": ([("to_fp16", {"pure": True})], 5e-2),
    "compile": ([("compile", {"backend": "eager"})], 0.0),
    "compile, to_bf16": ([("compile", {"backend": "eager"}), "to_bf16"], 5e-2),
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(
    "more",
    [(), (partial(Accumulate, 2), ClipGradients, partial(EMA, 0.9))],
    ids=["plain", "accumulated, clipped, averaged"],
)
def test_a_fit_of_every_precision_word_is_that_of_the_cpu(word, more):
    steps, tolerance = WORDS[word]

    def make(device):
        learn = learner(device, callbacks=[make() for make in more])
        for step in steps:
            name, options = step if isinstance(step, tuple) else (step, {})
            getattr(learn, name)(**options)
        found = outcome(fit(learn))
        # Autocast on the CPU has other lists of operations: what half precision rounds is not the same there.
        return found if tolerance < 1e-2 else {name: found[name] for name in ("losses", "rows", "measured")}

    both(make, tolerance)


# --- callbacks ---------------------------------------------------------------
CALLBACKS = {
    "Accumulate": lambda: [Accumulate(2)],
    "ActivationStats": lambda: [callbacks.ActivationStats()],
    "AutoMicrobatch": lambda: [callbacks.AutoMicrobatch(3)],
    "BnFreeze": lambda: [callbacks.BnFreeze()],
    "ChannelsLast": lambda: [callbacks.ChannelsLast()],
    "Checkpoint": lambda: [Checkpoint("kept", every_n_steps=2)],
    "ClipGradients": lambda: [ClipGradients(0.1)],
    "CSVLogger": lambda: [callbacks.CSVLogger("log.csv", every_n_steps=2)],
    "CutMix": lambda: [callbacks.CutMix()],
    "EarlyStopping": lambda: [callbacks.EarlyStopping(patience=1)],
    "EMA": lambda: [EMA(0.9)],
    "GradientStats": lambda: [callbacks.GradientStats()],
    "JSONLogger": lambda: [callbacks.JSONLogger("log.jsonl")],
    "LabelSmoothing": lambda: [callbacks.LabelSmoothing()],
    "Lookahead": lambda: [callbacks.Lookahead()],
    "MixUp": lambda: [callbacks.MixUp()],
    "Profile": lambda: [callbacks.Profile()],
    "Progress": list,
    "Recorder": list,
    "ReduceLROnPlateau": lambda: [callbacks.ReduceLROnPlateau()],
    "SAM": lambda: [callbacks.SAM()],
    "SaveBest": lambda: [callbacks.SaveBest()],
    "StopAfter": lambda: [callbacks.StopAfter(steps=7)],
    "SWA": lambda: [callbacks.SWA(start=0.5)],
    "TensorBoardLogger": lambda: [callbacks.TensorBoardLogger("runs")],
    "TerminateOnNaN": lambda: [callbacks.TerminateOnNaN()],
    "Timer": lambda: [callbacks.Timer()],
}
OF_TIME = {"samples_per_second", "batches_per_second", "data_time", "mfu", "peak_memory"}  # Timer's columns
ELSEWHERE = {
    "Communicate": "test_ranks.py: of algorithm=",
    "Distributed": "test_ranks.py",
    "FullyShard": "test_ranks.py: of to_fsdp",
    "ReduceAfterwards": "test_ranks.py: of delay_allreduce",
    "Compiled": "above: of compile()",
    "MixedPrecision": "above: of to_bf16() and to_fp16()",
    "ParamScheduler": "every fit here has one",
    "OptimizerModes": "below: of schedule-free optimizers",
    "GradualUnfreezing": "below: it needs layer groups",
    "MLflowLogger": "sends the floats that CSVLogger writes, and needs a package that the tests do not install",
    "WandbLogger": "sends the floats that CSVLogger writes, and needs a package that the tests do not install",
}


def test_every_callback_is_tried_on_the_device_or_said_to_be_tried_elsewhere():
    exported = {
        name
        for name, value in vars(callbacks).items()
        if inspect.isclass(value) and issubclass(value, Callback) and value is not Callback
    }
    assert exported == set(CALLBACKS) | set(ELSEWHERE)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_fit_with_every_callback_is_that_of_the_cpu(name):
    def make(device):
        learn = learner(device, callbacks=CALLBACKS[name]())
        with learn.no_logging():
            learn.fit(3, 1e-2)
        learn.values = {key: value for key, value in learn.values.items() if key not in OF_TIME}
        return outcome(learn)

    both(make, tolerance=1e-5 if name == "ChannelsLast" else 0.0)


def test_layer_groups_unfrozen_one_after_the_other_are_those_of_the_cpu():
    def make(device):
        learn = learner(
            device, splitter=lambda model: [model[:2], model[2:]], callbacks=[callbacks.GradualUnfreezing(1)]
        )
        return outcome(fit(learn, 3))

    both(make)


def test_what_callbacks_keep_of_a_fit_is_what_they_keep_on_the_cpu():
    def make(device):
        norms, stats, gradients = ClipGradients(0.1), callbacks.ActivationStats(), callbacks.GradientStats()
        fit(learner(device, callbacks=[norms, stats, gradients]))
        return (
            norms.norms,
            stats.stats if hasattr(stats, "stats") else 0,
            {k: v for k, v in gradients.state_dict().items() if k != "time"},
        )

    both(make)


# --- data --------------------------------------------------------------------
def loader(*tensors, **options):
    return DataLoader(TensorDataset(*tensors), 8, **options)


X, Y = pictures()
DATA = {
    "from_tensors on the device": lambda device: DataBunch.from_tensors((X, Y), (X[:15], Y[:15]), bs=8, device=device),
    "from_tensors on the host": lambda device: DataBunch.from_tensors((X, Y), (X[:15], Y[:15]), bs=8, device="cpu"),
    "create": lambda device: DataBunch.create(TensorDataset(X, Y), TensorDataset(X[:15], Y[:15]), bs=8),
    "create, with workers": lambda device: DataBunch.create(
        TensorDataset(X, Y), TensorDataset(X[:15], Y[:15]), bs=8, num_workers=2
    ),
    "a DataLoader": lambda device: (loader(X, Y), loader(X[:15], Y[:15])),
    "a pinned DataLoader": lambda device: (loader(X, Y, pin_memory=True), loader(X[:15], Y[:15], pin_memory=True)),
    "a list": lambda device: ([(X[:8], Y[:8]), (X[8:16], Y[8:16])], [(X[:15], Y[:15])]),
    "a list on the device": lambda device: (
        [(X[:8].to(device), Y[:8].to(device))] * 2,
        [(X[:15].to(device), Y[:15].to(device))],
    ),
    "inputs on the host, targets on the device": lambda device: (
        [(X[:8], Y[:8].to(device))] * 2,
        [(X[:15], Y[:15].to(device))],
    ),
}


@pytest.mark.parametrize("source", DATA)
def test_a_fit_of_every_source_of_data_is_that_of_the_cpu(source):
    both(lambda device: outcome(fit(learner(device, data=DATA[source](device)))))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x, scale, labels=None):
        out = self.body(x * scale["by"][0].view(-1, 1, 1, 1))
        return out


def test_mappings_and_nested_batches_are_moved_whole():
    batch = {"x": X[:8], "scale": {"by": [torch.linspace(0.5, 1, 8)]}, "labels": Y[:8]}

    def make(device):
        torch.manual_seed(2)
        return outcome(fit(learner(device, data=([batch] * 2, [batch]), model=Named())))

    both(make)


@pytest.mark.parametrize("source", DATA)
def test_a_learner_on_a_device_that_is_not_the_current_one_trains_there(source):
    assert torch.accelerator.current_device_index() == 0
    first, second = torch.device("twin:0"), torch.device("twin:1")
    results = [outcome(fit(learner(device, data=DATA[source](device)))) for device in (first, second)]
    same(results[0], results[1])
    assert torch.accelerator.current_device_index() == 0 and twin.races() == []


def test_two_learners_of_one_process_train_on_two_devices():
    learners = [learner(torch.device("twin", i)) for i in (0, 1)]
    for learn in learners * 2:
        fit(learn, 1)
    same(outcome(learners[0]), outcome(learners[1]))


# --- pictures ----------------------------------------------------------------
TRANSFORMS = {
    "brightness": lambda: [vision.brightness()],
    "contrast": lambda: [vision.contrast()],
    "cutout": lambda: [vision.cutout(4)],
    "flip_lr": lambda: [vision.flip_lr()],
    "normalize": lambda: [vision.normalize(*vision.cifar_stats)],
    "rand_pad": lambda: [*vision.rand_pad(2, SIDE)],
    "rand_resize_crop": lambda: [vision.rand_resize_crop(SIDE)],
    "rotate": lambda: [vision.rotate(30)],
    "to_float": lambda: [vision.to_float],
    "zoom": lambda: [vision.zoom()],
}
NO_TRANSFORMS = {
    "tta",
    "resnet9",
    "resnet18_cifar",
    "wrn_22",
    "vision_learner",
    "interpret",
    "untar_data",
    "accuracy",
    "error_rate",
    "top_k_accuracy",
    "partial",
}


def test_every_transform_is_tried_on_the_device():
    lower = {
        name
        for name, value in vars(vision).items()
        if name in vision.__all__ and name.islower() and callable(value) and not inspect.ismodule(value)
    }
    assert lower - NO_TRANSFORMS == set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("where", ["held on the device", "streamed from the host"])
def test_a_fit_with_every_transform_is_that_of_the_cpu(name, where):
    def make(device):
        home = device if where == "held on the device" else "cpu"
        pixels = (X * 255).byte()
        tfms = TRANSFORMS[name]() if name == "to_float" else [vision.to_float, *TRANSFORMS[name]()]
        data = DataBunch.from_tensors((pixels, Y), (X[:15], Y[:15]), bs=8, device=home, batch_tfms=tfms)
        return outcome(fit(learner(device, data=data)))

    both(make, tolerance=1e-6)


@pytest.fixture
def folder(tmp_path):
    from torchvision.utils import save_image

    for part, n in (("train", 24), ("valid", 9)):
        for i in range(n):
            path = tmp_path / "pictures" / part / "abc"[i % 3]
            path.mkdir(parents=True, exist_ok=True)
            save_image(X[i], path / f"{i}.png")
    return tmp_path / "pictures"


def test_a_folder_of_pictures_trains_interprets_and_augments_tests_as_on_the_cpu(folder):
    def make(device):
        tfms = ([*vision.rand_pad(2, SIDE), vision.flip_lr()], [])
        data = vision.ImageDataBunch.from_folder(folder, ds_tfms=tfms, bs=8, device=device).normalize(
            vision.cifar_stats
        )
        learn = fit(learner(device, data=data))
        seen = learn.interpret()
        return outcome(learn), learn.tta(n=2), seen.confusion_matrix(), data.one_batch()

    both(make, tolerance=1e-5)


def test_models_of_pictures_train_on_the_device():
    for build in (vision.resnet9, vision.resnet18_cifar):

        def make(device, build=build):
            torch.manual_seed(2)
            x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(4))
            return outcome(fit(learner(device, data=([(x, Y[:8])], [(x, Y[:8])]), model=build(CLASSES)), 1))

        both(make, tolerance=1e-3)


# --- metrics and losses ------------------------------------------------------
METRICS = {"accuracy": accuracy, "error_rate": error_rate, "top_k_accuracy": top_k_accuracy(2)}
FLOATS = {
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
    "RootMeanSquaredError": RootMeanSquaredError,
}


def test_every_metric_is_tried_on_the_device():
    exported = {name for name in learnkit.__all__ if getattr(learnkit, name).__module__ == "learnkit.metrics"}
    assert "accuracy" in exported and exported <= set(METRICS) | set(FLOATS)


def test_metrics_of_every_kind_are_those_of_the_cpu():
    import torchmetrics

    def mine(pred, target):
        return (pred.argmax(1) == target).double().mean()

    def make(device):
        given = [
            *METRICS.values(),
            mine,
            torchmetrics.Accuracy("multiclass", num_classes=CLASSES),
            torchmetrics.AUROC("multiclass", num_classes=CLASSES),
        ]
        return outcome(fit(learner(device, metrics=given)))

    both(make)


def test_metrics_of_numbers_are_those_of_the_cpu():
    x, y = torch.randn(40, 4), torch.randn(40)

    def make(device):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
        data = DataBunch.from_tensors((x, y), (x[:15], y[:15]), bs=8, device=device)
        return outcome(
            fit(
                learner(
                    device, data=data, model=model, metrics=[m() if inspect.isclass(m) else m for m in FLOATS.values()]
                )
            )
        )

    both(make)


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), nn.CrossEntropyLoss(ignore_index=1), F.cross_entropy],
    ids=["weights of classes", "an ignored class", "a function"],
)
def test_a_loss_that_has_weights_of_its_own_is_moved_with_the_model(loss):
    import copy

    def make(device):
        return {k: v for k, v in outcome(fit(learner(device, loss_func=copy.deepcopy(loss)))).items() if k != "preds"}

    both(make)


# --- optimizers --------------------------------------------------------------
OPTIMIZERS = {
    "AdamW": AdamW,
    "Adam": Adam,
    "SGD": partial(SGD, momentum=0.9),
    "SGD, foreach": partial(SGD, momentum=0.9, foreach=True),
    "RMSprop": partial(RMSprop, momentum=0.9),
    "Adagrad": Adagrad,
    "NAdam": partial(NAdam, foreach=False),
    "one by one": partial(AdamW, foreach=False, fused=False),
    "a tensor rate": lambda groups, lr: Adam(groups, lr=torch.tensor(lr), foreach=True, capturable=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fit_with_every_optimizer_is_that_of_the_cpu(name):
    if name == "a tensor rate":
        pytest.skip(
            "torch takes a tensor rate with foreach=True only where it is capturable, which is a matter of CUDA: "
            "tests/test_cuda.py"
        )
    both(lambda device: outcome(fit(learner(device, opt_func=OPTIMIZERS[name]))), tolerance=1e-6)


def test_schedule_free_optimizers_are_those_of_the_cpu():
    from schedulefree import AdamWScheduleFree

    both(lambda device: outcome(fit(learner(device, opt_func=AdamWScheduleFree))), tolerance=1e-6)


@pytest.mark.parametrize("to_makes_new_parameters", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_an_optimizer_built_before_the_model_was_moved_trains_it(several, to_makes_new_parameters, monkeypatch):
    if to_makes_new_parameters:
        monkeypatch.setattr(torch, "_has_compatible_shallow_copy_type", lambda a, b: a.device.type == b.device.type)

    def make(device):
        model = net()
        model[6].weight.data.mul_(2)
        opt = (
            Together(AdamW(model[:4].parameters(), lr=1e-2), SGD(model[4:].parameters(), lr=1e-2))
            if several
            else AdamW(model.parameters(), lr=1e-2)
        )
        learn = learner(device, model=model, opt_func=opt)
        assert {id(p) for group in learn.opt.param_groups for p in group["params"]} == {
            id(p) for p in learn.model.parameters()
        }
        return outcome(fit(learn))

    both(make)


def test_an_optimizer_that_has_stepped_before_the_model_was_moved_goes_with_it():
    def make(device):
        model = net()
        opt = AdamW(model.parameters(), lr=1e-2)
        F.cross_entropy(model(X[:8]), Y[:8]).backward()
        opt.step()
        return outcome(fit(learner(device, model=model, opt_func=opt)))

    both(make)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(self.words(x).mean(1))


@pytest.mark.parametrize("to_makes_new_parameters", [False, True])
def test_weights_that_layers_share_stay_shared_on_the_device(to_makes_new_parameters, monkeypatch):
    """Also where a backend outside of PyTorch answers that data of its device cannot replace data of the CPU."""
    if to_makes_new_parameters:
        monkeypatch.setattr(torch, "_has_compatible_shallow_copy_type", lambda a, b: a.device.type == b.device.type)
        apart = Tied().to("twin")
        assert apart.out.weight is not apart.words.weight
    x = torch.arange(24).view(8, 3) % 7

    def make(device):
        torch.manual_seed(2)
        learn = fit(learner(device, data=([(x, x[:, 0])] * 2, [(x, x[:, 0])]), model=Tied()))
        assert learn.model.out.weight is learn.model.words.weight
        return outcome(learn)

    both(make)


# --- finders, trials, predictions --------------------------------------------
def test_finders_and_trials_are_those_of_the_cpu_and_leave_nothing():
    def make(device):
        learn = learner(device)
        before = on_host(dict(learn.model.state_dict()))
        found = learn.lr_find(num_it=20)
        quick, overfitted = learn.fast_run(), learn.overfit_batches(1, 5)
        size = learn.batch_size_find(16)
        same(on_host(dict(learn.model.state_dict())), before)
        return (
            found.lrs,
            found.losses,
            {k: v for k, v in quick.items() if k != "time"},
            overfitted,
            size,
            outcome(fit(learn)),
        )

    both(make)


def test_predictions_come_on_the_cpu_from_samples_of_either_place():
    def make(device):
        learn = fit(learner(device), 1)
        preds = [
            learn.predict(X[0]),
            learn.predict(X[:4]),
            learn.predict(X[:4].to(device)),
            *learn.get_preds(with_loss=True),
        ]
        assert {p.device.type for p in preds} == {"cpu"}
        return preds, learn.validate([(X[:5], Y[:5])]), str(learn.summary())

    both(make)


# --- files -------------------------------------------------------------------
class StopAt(Callback):
    def __init__(self, step):
        self.at = step

    def after_step(self, learn):
        if learn.step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("async_write", [False, True])
@pytest.mark.parametrize("words", [(), ("to_fp16",)], ids=["float32", "float16"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_fit_is_one_that_never_stopped(async_write, words, step, tmp_path):
    def build(*more):
        learn = learner(
            "twin",
            callbacks=[
                Checkpoint(tmp_path / "kept", every_n_steps=1, async_write=async_write),
                EMA(0.9),
                Accumulate(2),
                *more,
            ],
        )
        for word in words:
            getattr(learn, word)()
        return learn

    straight = fit(build())
    import shutil

    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        fit(build(StopAt(step)))
    resumed = fit(build(), resume=True)
    same(outcome(resumed), outcome(straight))


@pytest.mark.parametrize("written, read", [("cpu", "twin"), ("twin", "cpu"), ("twin:1", "twin:0")])
def test_a_fit_goes_on_on_another_device(written, read, tmp_path):
    def build(device, *more):
        return learner(
            torch.device(device),
            callbacks=[Checkpoint(tmp_path / f"kept {device} {bool(more)}", every_n_steps=2), *more],
        )

    model = net()
    model[3].p = 0.0  # dropout draws from the device's own generator, which another kind of device does not have

    def without_dropout(learn):
        learn.model[3].p = 0.0
        return learn

    straight = fit(without_dropout(build("cpu")))
    stopped = without_dropout(
        learner(torch.device(written), callbacks=[Checkpoint(tmp_path / "kept", every_n_steps=2), StopAt(6)])
    )
    with pytest.raises(KeyboardInterrupt):
        fit(stopped)
    resumed = fit(
        without_dropout(learner(torch.device(read), callbacks=[Checkpoint(tmp_path / "kept", every_n_steps=2)])),
        resume=True,
    )
    same(outcome(resumed), outcome(straight))


def test_saved_files_are_read_on_any_device(tmp_path):
    learn = fit(learner("twin", path=tmp_path))
    learn.save("here")
    cpu = learner("cpu", path=tmp_path).load("here")
    same(on_host(dict(cpu.model.state_dict())), on_host(dict(learn.model.state_dict())))
    other = learner(torch.device("twin:1"), path=tmp_path).load("here")
    same(other.validate(), learn.validate())
    fit(other)


@pytest.mark.parametrize("name", ["model.pt2", "model.safetensors", "model.onnx"])
def test_what_is_exported_from_the_device_is_what_the_cpu_exports(name, tmp_path):
    def make(device):
        learn = fit(learner(device), 1)
        with redirect_stdout(io.StringIO()):
            path = learn.export(tmp_path / device.type / name)
        if name.endswith("safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        loaded = load_learner(path)
        return loaded.predict(X[:4]), loaded.predict(X[:4].to(device))

    (tmp_path / "cpu").mkdir(), (tmp_path / "twin").mkdir()
    both(make, tolerance=1e-6)


# --- what a device may lack, and bad input -----------------------------------
@pytest.mark.parametrize("what", ["fit", "lr_find", "finders", "pictures", "metrics", "averages"])
def test_a_device_without_float64_trains(what):
    with twin.without_float64():
        tfms = {
            "pictures": [
                vision.to_float,
                vision.rotate(10),
                vision.zoom(),
                vision.rand_resize_crop(SIDE),
                vision.contrast(),
            ]
        }.get(what, [vision.to_float])
        data = DataBunch.from_tensors(((X * 255).byte(), Y), (X[:15], Y[:15]), bs=8, device="twin", batch_tfms=tfms)
        more = {
            "averages": [
                EMA(0.9),
                callbacks.SWA(start=0.5),
                ClipGradients(0.1),
                callbacks.GradientStats(),
                callbacks.Timer(),
                callbacks.MixUp(),
            ]
        }.get(what, [])
        learn = learner(
            "twin", data=data, callbacks=more, metrics=[*METRICS.values()] if what == "metrics" else [accuracy]
        )
        if what == "lr_find":
            assert len(learn.lr_find(num_it=10).lrs) == 10
        if what == "finders":
            learn.fast_run(), learn.batch_size_find(8)
        fit(learn)
        assert torch.tensor(learn.recorder.losses).isfinite().all()


@pytest.mark.parametrize(
    "device, message",
    [
        (
            "twin:9",
            r"device='twin:9': PyTorch .* cannot use it here .*Expected one of twin:0, twin:1, twin:2, cpu, or None",
        ),
        ("nonsense", r"device='nonsense': .*Expected one of twin:0, twin:1, twin:2, cpu"),
        ("meta", "device='meta' has no numbers to train on: expected one of twin:0, twin:1, twin:2, cpu"),
        ("mps", r"device='mps': .*Expected one of twin:0"),
        ("xpu", r"device='xpu': .*Expected one of twin:0"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(device, message):
    with pytest.raises(ValueError, match=message):
        Learner(([(X, Y)], None), net(), device=device)


def test_a_model_on_two_devices_is_an_error():
    model = net()
    model[6].to("twin:1")
    with pytest.raises(
        ValueError,
        match=r"the model \(Sequential\) has its parts on 2 devices: 0.weight on cpu, 6.weight on twin:1\. A Learner "
        r"trains on one",
    ):
        learner("twin", model=model)


@pytest.mark.parametrize("call", ["fit", "validate", "predict", "get_preds"])
def test_a_model_that_was_moved_away_is_an_error_before_the_first_step(call):
    learn = learner("twin")
    learn.model.to("cpu")
    with pytest.raises(
        ValueError, match=r"the model's 0.weight is on cpu, but this Learner trains on twin:0, .*model.to\('twin:0'\)"
    ):
        {
            "fit": lambda: learn.fit(1),
            "validate": learn.validate,
            "predict": lambda: learn.predict(X[0]),
            "get_preds": learn.get_preds,
        }[call]()


def test_a_layer_that_was_added_on_another_device_is_an_error_before_the_first_step():
    learn = learner("twin")
    learn.model[6] = nn.Linear(4, CLASSES)
    with pytest.raises(ValueError, match=r"the model's 6.weight is on cpu, but this Learner trains on twin:0"):
        learn.fit(1)


def test_a_fit_that_ends_by_an_error_or_a_stop_restores_the_current_device():
    class Fails(Callback):
        def __init__(self, error):
            self.error = error

        def after_step(self, learn):
            assert torch.accelerator.current_device_index() == 1
            raise self.error

    for error, expected in ((StopFit(), nullcontext()), (KeyError("x"), pytest.raises(KeyError))):
        with expected:
            fit(learner(torch.device("twin:1"), callbacks=[Fails(error)]))
        assert torch.accelerator.current_device_index() == 0


def test_bars_and_lines_on_the_device_show_what_they_show_on_the_cpu():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def make(device):
        out = Terminal()
        with redirect_stdout(out):
            learner(device, callbacks=[Progress()]).fit_one_cycle(2, 1e-2)
        rows = [line.split()[:4] for line in out.getvalue().replace("\r", "\n").splitlines() if line[:1].isdigit()]
        assert len(rows) == 2
        return [[float(cell) for cell in row] for row in rows]

    both(make)


def test_a_recorder_and_its_losses_can_be_pickled_and_plotted_from_the_device():
    learn = fit(learner("twin"))
    assert pickle.loads(pickle.dumps(learn.recorder.losses)) == learn.recorder.losses
    assert learn.recorder.plot_losses() is not None
