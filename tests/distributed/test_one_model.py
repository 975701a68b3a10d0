"""All ranks evaluate one model, however a fit has left an epoch, and go on with what each had for itself."""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner, StopBatch, StopEpoch, StopFit, StopTrain
from learnkit.callbacks import EMA, SAM, SWA, Accumulate, Checkpoint, Lookahead
from learnkit.devices.dtensor import whole
from learnkit.distributed import gather_objects, get_world_size
from learnkit.distributed.request import SAVE

N, GLOBAL = 72, 12  # 6 steps an epoch


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def learner(*callbacks: Callback, fsdp: bool = False, **options: Any) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(N, 5) * torch.linspace(0.5, 4.0, N)[:, None]
    y = x[:, :3].argmax(1)
    learn = Learner(
        DataBunch.from_tensors((x, y), (x[:15], y[:15]), bs=GLOBAL // get_world_size(), seed=3),
        Net(),
        lr=0.05,
        callbacks=callbacks,
    )
    return learn.to_fsdp() if fsdp else learn.to_distributed(**options)


def fit(learn: Learner, n_epochs: int = 2, **options: Any) -> Learner:
    with learn.no_logging():
        return learn.fit(n_epochs, **options)


def state(learn: Learner) -> list[Any]:
    return [whole(t.detach()).tolist() for t in learn.model.state_dict().values()]


class Evaluated(Callback):
    """The whole model as each evaluation of this rank has seen it."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def before_forward(self, learn: Learner) -> None:
        if not learn.training and learn.batch_index == 0:
            self.states.append(state(learn))


class Leaves(Callback):
    """At the third step of the second epoch: raises, or does something."""

    def __init__(self, how: Any) -> None:
        self.how = how

    def after_step(self, learn: Learner) -> None:
        if (learn.epoch, learn.batch_index) != (1, 2):
            return
        if isinstance(self.how, type):
            raise self.how
        self.how(learn)


class Own(Exception):
    pass


class ByHand(Callback):
    """An average of weights as people write it, which torch's buffers belong to as well."""

    def before_fit(self, learn: Learner) -> None:
        self.average = [t.detach().clone() for t in self.tensors(learn)]

    def tensors(self, learn: Learner) -> list[Tensor]:
        return [t for t in learn.model.state_dict().values() if t.is_floating_point()]

    def after_step(self, learn: Learner) -> None:
        for t, average in zip(self.tensors(learn), self.average, strict=True):
            average.lerp_(t.detach(), 0.3)

    @torch.no_grad()
    def around_validate(self, learn: Learner, run: Any) -> None:
        own = [t.clone() for t in self.tensors(learn)]
        for t, average in zip(self.tensors(learn), self.average, strict=True):
            t.copy_(average)
        try:
            run()
        finally:
            for t, value in zip(self.tensors(learn), own, strict=True):
                t.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, value in zip(self.average, state["average"], strict=True):
            own.copy_(value)


WAYS: dict[str, Any] = {
    "max_steps": 9,
    "StopFit": StopFit,
    "StopEpoch": StopEpoch,
    "StopTrain": StopTrain,
    "StopBatch": StopBatch,
    "an error": Own,
    "validate": lambda learn: learn.validate(),
    "get_preds": lambda learn: learn.get_preds(),
}
BESIDE: dict[str, Callable[[], list[Callback]]] = {
    "nothing": list,
    "EMA": lambda: [EMA(0.7)],
    "SWA": lambda: [SWA(0.1)],
    "SWA measures": lambda: [SWA(0.1, update_bn=True)],
    "by hand": lambda: [ByHand()],
}


def left(way: str, beside: str, **options: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """What was evaluated in a fit that leaves an epoch so and in a validation afterwards, the model after that, and
    what is predicted.
    """
    how, seen = WAYS[way], Evaluated()
    learn = learner(*BESIDE[beside](), seen, *([] if isinstance(how, int) else [Leaves(how)]), **options)
    with suppress(Own):
        fit(learn, max_steps=how if isinstance(how, int) else None)
    learn.validate()
    evaluated = list(seen.states)
    predicted = (
        [] if beside == "by hand" else learn.predict(learn.data.valid_dl.tensors[0]).tolist()
    )  # it knows nothing of other ranks
    return evaluated, state(learn), predicted


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_batch_norms_statistics_are_one_wherever_they_are_evaluated(spread, beside, ranks):
    def fn():
        return [left(way, beside, fsdp=spread == "fsdp") for way in WAYS]

    for n in (2, 3):
        first, *others = ranks(n, fn, timeout=90)
        for other in others:
            for way, (seen, model, predicted), (seen_there, model_there, predicted_there) in zip(
                WAYS, first, other, strict=True
            ):
                assert len(seen) > 1 and seen == seen_there, way
                if way != "an error":
                    assert model == model_there and predicted == predicted_there, way


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_an_evaluation_amid_training_leaves_no_trace(spread, ranks):
    def fn():
        return [left(way, "EMA", fsdp=spread == "fsdp")[1] for way in ("StopBatch", "validate", "get_preds")]

    for plain, validated, predicted in ranks(2, fn, timeout=60):
        assert plain == validated == predicted


# --- weights that are each rank ----------------------------------------------
APART: dict[str, dict[str, Any]] = {
    "decentralized": {"period": 4},
    "local_sgd": {"period": 4, "warmup_steps": 2},
    "hierarchical": {"period": 4, "warmup_steps": 0},
}
KEEPS: dict[str, Callable[[], list[Callback]]] = {
    **BESIDE,
    "Lookahead": lambda: [Lookahead(3)],
    "SAM": lambda: [SAM()],
    "several": lambda: [Accumulate(2), Lookahead(2), EMA(0.7), ByHand()],
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("algorithm", APART)
def test_ranks_with_weights_of_their_own_evaluate_one_model_too(algorithm, beside, ranks):
    def fn():
        return [left(way, beside, algorithm=algorithm, **APART[algorithm]) for way in WAYS]

    n = 2 if beside != "EMA" else 3
    first, *others = ranks(n, fn, timeout=90)
    for other in others:
        for way, (seen, model, predicted), (seen_there, model_there, predicted_there) in zip(
            WAYS, first, other, strict=True
        ):
            assert len(seen) > 1 and seen == seen_there, way
            if way != "an error":
                assert model == model_there and predicted == predicted_there, way
    assert first[4][1] == first[6][1] == first[7][1], "evaluations amid training leave no trace"


def test_the_average_that_is_evaluated_is_the_mean_of_all_ranks_averages(ranks):
    def fn():
        own: list[list[Tensor]] = []

        class Follow(Callback):
            order = EMA.order + 1  # what this rank's average is of

            def before_fit(self, learn: Learner) -> None:
                own[:] = [[p.detach().double() for p in learn.model.parameters()]]

            def after_step(self, learn: Learner) -> None:
                own.append(
                    [
                        a + 0.3 * (p.detach().double() - a)
                        for a, p in zip(own[-1], learn.model.parameters(), strict=True)
                    ]
                )

        ema = EMA(0.7)
        fit(learner(ema, Follow(), algorithm="decentralized", period=4), 1)
        assert ema.average is not None
        kept = torch.cat(
            [
                value.flatten()
                for name, value in ema.average.values.items()
                if not name.startswith("norm.running") and value.is_floating_point()
            ]
        )
        expected = torch.stack(gather_objects(torch.cat([value.flatten() for value in own[-1]])))
        return float((kept - expected.mean(0)).abs().max()), float((expected[0] - expected[1]).abs().max())

    for off, apart in ranks(2, fn):
        assert off < 1e-6 < 1e-3 < apart


class Interrupted(Callback):
    """Amid the second epoch and within a window of two batches: a save and then an error, or SIGTERM to one rank."""

    order = -200

    def __init__(self, how: str) -> None:
        self.how = how

    def before_batch(self, learn: Learner) -> None:
        if not learn.training or learn.epoch != 1:
            return
        if self.how == "killed" and learn.batch_index == 2:
            learn.wanted = SAVE
        if self.how == "killed" and learn.batch_index == 4:
            raise Own
        if self.how == "SIGTERM" and learn.batch_index == 2 and learn.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def kept_by(learn: Learner) -> Any:
    averages = [
        [t.tolist() for t in cb.average.values.values()]
        for cb in learn.callbacks
        if isinstance(cb, (EMA, SWA)) and cb.average is not None
    ]
    return (
        [t.tolist() for t in learn.model.state_dict().values()],
        averages,
        learn.recorder.values,
        learn.recorder.losses,
    )


@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
@pytest.mark.parametrize("beside", KEEPS)
def test_a_fit_of_ranks_with_weights_of_their_own_resumes_as_if_it_had_never_stopped(beside, how, ranks, tmp_path):
    def fn(folder: Path) -> Any:
        for algorithm, options in APART.items():
            plain = fit(learner(*KEEPS[beside](), algorithm=algorithm, **options), 3)
            learn = learner(*KEEPS[beside](), Checkpoint(folder / algorithm), algorithm=algorithm, **options)
            with pytest.raises((Own, SystemExit)):
                fit(learn, 3, callbacks=[Interrupted(how)])
            again = fit(
                learner(*KEEPS[beside](), Checkpoint(folder / algorithm), algorithm=algorithm, **options),
                3,
                resume=True,
            )
            assert again.resumed is not None and again.resumed["items"]
            assert kept_by(again) == kept_by(plain), algorithm

    ranks(2, fn, tmp_path, timeout=90)


def test_another_number_of_ranks_takes_the_mean_of_averages(ranks, tmp_path):
    def interrupted() -> Any:
        ema, ahead = EMA(0.7), Lookahead(3)
        learn = learner(ema, ahead, Checkpoint(tmp_path), algorithm="decentralized")
        with pytest.raises(SystemExit):
            fit(learn, 3, callbacks=[Interrupted("SIGTERM")])
        return None

    class Look(Callback):
        order = -200

        def before_batch(self, learn: Learner) -> None:
            raise Own

    ranks(2, interrupted)
    *_, file = sorted(tmp_path.glob("*/run.pt"))
    states = [own["callbacks"] for own in torch.load(file, weights_only=True)["ranks"]]
    ema, ahead = EMA(0.7), Lookahead(3)
    with pytest.raises(Own):
        fit(learner(ema, ahead, Checkpoint(tmp_path), algorithm="decentralized"), 3, resume=True, callbacks=[Look()])
    assert ema.average is not None
    for name, value in ema.average.values.items():
        first, second = (own["EMA"]["average"][name] for own in states)
        assert torch.equal(
            value, ((first.double() + second.double()) / 2).to(value.dtype) if value.is_floating_point() else first
        )
    assert not torch.equal(states[0]["Lookahead"]["slow"][0], states[1]["Lookahead"]["slow"][0])
    for value, first, second in zip(ahead.slow, *(own["Lookahead"]["slow"] for own in states), strict=True):
        assert torch.equal(value, ((first.double() + second.double()) / 2).to(value.dtype))
