"""compile(): the numbers of the model as it was written, compiled once for training and once for evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import (
    EMA,
    SAM,
    SWA,
    Accumulate,
    AutoMicrobatch,
    Checkpoint,
    ClipGradients,
    Compiled,
    MixedPrecision,
)

Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.n += 1
        return graph.forward


def batches(*sizes: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def learner(*callbacks: Callback, train: Any = None, valid: Any = None, **options: Any) -> Learner:
    data = (train or batches(4, 4, 4, 3), valid or batches(5, 5, 2, seed=2))
    return Learner(
        data,
        net(),
        metrics=accuracy,
        callbacks=callbacks,
        **{"opt_func": torch.optim.SGD, "lr": 0.1, "wd": 0.0} | options,
    )


def state(learn: Learner) -> list[Tensor]:
    return [v.detach().clone() for v in learn.model.state_dict().values()]


def assert_near(a: Learner, b: Learner, atol: float = 1e-5) -> None:
    torch.testing.assert_close(state(a), state(b), rtol=0, atol=atol)
    assert a.recorder.losses == pytest.approx(b.recorder.losses, abs=atol)
    for row, expected in zip(a.recorder.values, b.recorder.values, strict=True):
        assert row == pytest.approx(expected, abs=atol)


# --- how often, an -----------------------------------------------------------
def test_last_short_batches_and_validations_compile_nothing_anew():
    graphs = Graphs()
    learn = learner().compile(backend=graphs).fit(3)
    assert graphs.n == 2 == counters["stats"]["unique_graphs"]  # one in training, one in evaluation
    learn.validate()
    learn.get_preds()
    learn.predict(torch.randn(4))
    learn.fit_one_cycle(2)
    assert graphs.n == 2
    assert_near(learn, fitted_alike())


def fitted_alike() -> Learner:
    learn = learner().fit(3)
    return learn.fit_one_cycle(2)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_numbers_are_those_of_the_model_as_it_was_written(backend):
    compiled, plain = (
        learner(opt_func=torch.optim.AdamW).compile(backend=backend).fit(2),
        learner(opt_func=torch.optim.AdamW).fit(2),
    )
    assert_near(compiled, plain)
    torch.testing.assert_close(compiled.get_preds()[0], plain.get_preds()[0], rtol=0, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2


def test_names_of_parameters_stay_and_a_file_goes_both_ways():
    compiled, plain = learner().compile(backend="eager").fit(1), learner()
    assert list(compiled.model.state_dict()) == list(net().state_dict()) and type(compiled.model) is nn.Sequential
    compiled.save("compiled")
    plain.load("compiled")
    for a, b in zip(state(compiled), state(plain), strict=True):
        assert torch.equal(a, b)
    assert plain.validate() == pytest.approx(compiled.validate())
    plain.fit(1).save("plain")
    compiled.load("plain")
    assert compiled.validate() == pytest.approx(plain.validate())


def test_a_size_that_is_dynamic_is_compiled_for_and_needs_no_eager_batches():
    graphs = Graphs()
    learn = learner().compile(backend=graphs, dynamic=True)
    assert not any(isinstance(callback, Compiled) for callback in learn.callbacks)
    assert_near(learn.fit(1), learner().fit(1))
    n = graphs.n
    learn.fit(2)
    assert graphs.n == n <= 3


def test_compiling_again_takes_the_place_of_the_first():
    first, second = Graphs(), Graphs()
    learn = learner().compile(backend=first).compile(backend=second).fit(1)
    assert sum(isinstance(callback, Compiled) for callback in learn.callbacks) == 1
    assert (first.n, second.n) == (0, 2)


# --- freezing aft ------------------------------------------------------------
def test_freezing_and_unfreezing_after_compiling_train_what_they_say():
    graphs, results = Graphs(), []
    for compiles in (True, False):
        learn = learner(splitter=lambda model: [model[:2], model[2:]])
        if compiles:
            learn.compile(backend=graphs)
        learn.fit(1)
        frozen = learn.freeze().model[0].weight.detach().clone()
        learn.fit(1)
        assert torch.equal(learn.model[0].weight, frozen)
        learn.unfreeze().fit(1)
        assert not torch.equal(learn.model[0].weight, frozen)
        results.append(learn)
    assert_near(*results)
    assert graphs.n <= 4  # anew for other gradients at most, not for each fit


# --- beside ------------------------------------------------------------------
BESIDE: dict[str, Callable[[], list[Callback]]] = {
    "accumulate and clipping": lambda: [Accumulate(3), ClipGradients(0.3)],
    "bf16": lambda: [MixedPrecision()],
    "fp16": lambda: [MixedPrecision(torch.float16, init_scale=64.0), Accumulate(2)],
    "EMA": lambda: [EMA(0.5)],
    "SWA": lambda: [SWA(0.0, update_bn=True)],
    "SAM": lambda: [SAM()],
}


@pytest.mark.parametrize("make", BESIDE.values(), ids=BESIDE)
def test_beside_others_it_is_compiled_twice_and_the_numbers_stay(make):
    graphs = Graphs()
    compiled, plain = learner(*make()).compile(backend=graphs).fit(2), learner(*make()).fit(2)
    assert_near(
        compiled,
        plain,
        atol=0.02 if any(isinstance(callback, MixedPrecision) for callback in compiled.callbacks) else 1e-5,
    )
    assert compiled.validate() == pytest.approx(plain.validate(), abs=0.02)
    assert graphs.n <= (4 if "SWA" in str(compiled.callbacks) else 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_pure_half_precision_the_numbers_stay(dtype):
    options = {"pure": True, "init_scale": 64.0}
    compiled = learner(MixedPrecision(dtype, **options)).compile(backend="eager").fit(2)
    assert_near(compiled, learner(MixedPrecision(dtype, **options)).fit(2), atol=0.02)


def test_a_split_batch_goes_through_in_parts():
    graphs = Graphs()
    given = batches(8, 8, 5)
    compiled = learner(AutoMicrobatch(4), train=given).compile(backend=graphs).fit(2)
    assert_near(compiled, learner(AutoMicrobatch(4), train=given).fit(2))
    assert graphs.n == 2


def test_the_order_of_the_words_does_not_matter():
    a = learner().compile(backend="eager").to_bf16().to_channels_last().fit(1)
    b = learner().to_channels_last().to_bf16().compile(backend="eager").fit(1)
    for p, q in zip(state(a), state(b), strict=True):
        assert torch.equal(p, q)


# --- clean-up, ---------------------------------------------------------------
def test_after_an_error_in_a_short_batch_the_next_ones_are_compiled_again():
    class Raise(Callback):
        def after_forward(self, learn: Learner) -> None:
            if len(learn.target) == 3:
                raise ConnectionAbortedError

    class RaiseWithin(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 3:
                raise ConnectionAbortedError
            return x

    learn = learner()
    learn.model.append(RaiseWithin())
    learn.compile(backend="eager")
    with pytest.raises(ConnectionAbortedError):
        learn.fit(1)
    compiled, graphs = torch.compile(net(), backend=Graphs()), counters["stats"]["unique_graphs"]
    compiled(torch.randn(4, 4))
    assert counters["stats"]["unique_graphs"] == graphs + 1  # the process compiles as before


def test_a_resumed_fit_is_the_one_that_was_not_interrupted():
    class Die(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn: Learner) -> None:
            if learn.training and (learn.epoch, learn.batch_index) == (1, 2):
                raise ConnectionAbortedError

    def make(folder: str) -> Learner:
        [(x, y)] = batches(22)
        data = DataBunch.from_tensors((x, y), (x[:7], y[:7]), bs=4, drop_last=False)
        return Learner(
            data, net(), lr=0.05, seed=1, callbacks=[Accumulate(2), EMA(0.5), Checkpoint(folder, every_n_steps=1)]
        ).compile(backend="eager")

    plain = make("a").fit(3)
    with pytest.raises(ConnectionAbortedError):
        make("b").fit(3, callbacks=[Die()])
    learn = make("b").fit(3, resume=True)
    for p, q in zip(state(learn), state(plain), strict=True):
        assert torch.equal(p, q)


def test_compiling_in_the_middle_of_a_fit_is_refused():
    class Change(Callback):
        def after_step(self, learn: Learner) -> None:
            learn.compile(backend="eager")

    with pytest.raises(RuntimeError, match="called while this Learner runs: call it before"):
        learner(Change()).fit(1)
