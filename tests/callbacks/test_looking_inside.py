"""Statistics are those of their definitions, pictures can be drawn, times add up, and nothing stays hooked."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot
from torch import nn

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import ActivationStats, Checkpoint, GradientStats, JSONLogger, Profile, Recorder, Timer
from learnkit.hooks import HOOKS


def learner(*callbacks: Callback, valid: bool = True, **options: Any) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    data = DataBunch.from_tensors(
        (x, (x[:, 0] > 0).long()), (x[:8], (x[:8, 0] > 0).long()) if valid else None, bs=8, seed=1
    )
    return Learner(
        data,
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)),
        metrics=accuracy,
        callbacks=callbacks,
        **options,
    )


class Fails(Callback):
    def after_backward(self, learn: Learner) -> None:
        raise ConnectionError


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- activations -------------------------------------------------------------
class Outputs(Callback):
    """What the first layer gives, computed anew."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def after_forward(self, learn: Learner) -> None:
        if learn.training:
            self.found.append(learn.model[0](learn.inputs[0]).detach())


def test_activations_are_measured_as_they_are():
    seen = ActivationStats(limit=2.0, bins=8, near_zero=0.3)
    learner(seen, outputs := Outputs()).fit(1)
    assert seen.names == ["0", "2"] and seen.steps == [0, 1, 2, 3, 4]
    for k, values in enumerate(outputs.found):
        expected = [values.mean(), values.std(correction=0), (values.abs() < 0.3).float().mean()]
        assert seen.stats[k, 0].tolist() == pytest.approx([float(v) for v in expected], abs=1e-6)
        counts = torch.bincount((values.abs().flatten() * 4).long().clamp(max=7), minlength=8) / values.numel()
        assert seen.histograms[k, 0].tolist() == pytest.approx(counts.tolist())
    assert seen.histograms.sum(-1).flatten().tolist() == pytest.approx([1.0] * 10)


def test_layers_and_steps_can_be_chosen():
    seen = ActivationStats(every=3, select=lambda name, module: isinstance(module, nn.ReLU))
    learner(seen).fit(2)
    assert seen.names == ["1"] and seen.steps == [0, 3, 6, 9] and seen.stats.shape == (4, 1, 3)
    with pytest.raises(ValueError, match="no layer is selected"):
        learner(ActivationStats(select=lambda name, module: False)).fit(1)


@pytest.mark.parametrize("make", [ActivationStats, GradientStats])
def test_looking_changes_no_number_and_leaves_no_hook(make: Any):
    plain, looked_at = learner().fit(2), learner(make()).fit(2)
    assert plain.recorder.losses == looked_at.recorder.losses and hooks_of(looked_at.model) == 0
    with pytest.raises(ConnectionError):
        (failed := learner(make(), Fails())).fit(1)
    assert hooks_of(failed.model) == 0


@pytest.mark.parametrize("make", [ActivationStats, GradientStats])
def test_a_resumed_fit_has_all_its_rows(make: Any):
    class Dies(Callback):
        order = Checkpoint.order - 10

        def after_batch(self, learn: Learner) -> None:
            if learn.training and learn.step == 7:
                raise ConnectionAbortedError

    learner(whole := make()).fit(2)
    with pytest.raises(ConnectionAbortedError):
        learner(make(), Checkpoint("kept", every_n_steps=3), Dies()).fit(2)
    learner(seen := make(), Checkpoint("kept", every_n_steps=3)).fit(2, resume=True)
    assert seen.steps == whole.steps == list(range(10)) and torch.equal(seen.recorded, whole.recorded)


def test_norms_are_those_of_gradients_weights_and_updates():
    class ByHand(Callback):
        order = 1000

        def __init__(self) -> None:
            self.rows: list[Any] = []

        def around_step(self, learn: Learner, run: Any) -> None:
            parameters = list(learn.model.parameters())
            before, gradients = (
                [p.detach().clone() for p in parameters],
                [p.grad.norm() for p in parameters if p.grad is not None],
            )
            run()
            self.rows.append(
                [
                    gradients,
                    [b.norm() for b in before],
                    [(p.detach() - b).norm() for p, b in zip(parameters, before, strict=True)],
                ]
            )

    learner(seen := GradientStats(), by_hand := ByHand()).fit(1)
    assert torch.allclose(seen.recorded, torch.tensor(by_hand.rows), atol=1e-6)
    assert torch.equal(seen.gradients, seen.recorded[:, 0]) and torch.equal(seen.updates, seen.recorded[:, 2])


def test_pictures_have_a_line_or_a_panel_a_layer():
    learner(activations := ActivationStats(), gradients := GradientStats()).fit(1)
    assert [len(ax.get_lines()) for ax in activations.plot().axes] == [2, 2, 2]
    assert [ax.get_title() for ax in activations.plot_histograms().axes] == ["0", "2"]
    figure = gradients.plot()
    assert [len(ax.get_lines()) for ax in figure.axes] == [4, 4, 4] and figure.axes[0].get_yscale() == "log"
    pyplot.close("all")


# --- times -------------------------------------------------------------------
class Sleeps(Callback):
    """A slow callback, in three of its hooks."""

    def before_forward(self, learn: Learner) -> None:
        time.sleep(0.002)

    def around_step(self, learn: Learner, run: Any) -> None:
        time.sleep(0.003)
        run()

    def after_batch(self, learn: Learner) -> None:
        time.sleep(0.002)


class Clock(Callback):
    order = Profile.order - 1

    def around_fit(self, learn: Learner, run: Any) -> None:
        began = time.perf_counter()
        run()
        self.seconds = time.perf_counter() - began


class SlowModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.004)
        return self.layer(x)


def test_each_part_has_its_own_time_and_together_they_are_the_whole():
    learn = learner(profile := Profile(), Sleeps(), valid=False)
    learn.model = learn.training_model = SlowModel()
    learn.fit(2, callbacks=[clock := Clock()])
    assert profile.seconds["Sleeps"] >= 10 * 0.007 and profile.seconds["forward"] >= 10 * 0.004
    assert profile.seconds["Sleeps"] < 2 * 10 * 0.007 and profile.seconds["step"] < 10 * 0.003
    assert sum(profile.seconds.values()) == pytest.approx(clock.seconds, rel=0.2)
    assert {"data", "forward", "backward", "step", "loop", "Sleeps", "Recorder", "Progress"} <= set(profile.seconds)
    assert profile.n_calls["forward"] == 10 and "Sleeps" in str(profile).splitlines()[1] + str(profile).splitlines()[2]


def test_after_a_profile_the_callbacks_and_numbers_are_as_before():
    sleeps = Sleeps()
    learn = learner(sleeps, Profile())
    learn.fit_one_cycle(1)
    assert not {name for cb in learn.callbacks for name in vars(cb)} & set(HOOKS)
    assert learn.recorder.losses == learner().fit_one_cycle(1).recorder.losses
    with pytest.raises(ConnectionError) as caught:
        learner(failing := Fails(), Profile()).fit(1)
    assert vars(failing) == {} and "raised in Fails.after_backward" in caught.value.__notes__[0]


def test_a_trace_is_written_for_the_steps_that_were_asked_for():
    learner(Profile("folder/trace.json", n_steps=2, skip=1)).fit(1)
    names = [event.get("name", "") for event in json.loads(Path("folder/trace.json").read_text())["traceEvents"]]
    assert sum(name == "aten::linear" for name in names) == 4 and any(name.startswith("ProfilerStep") for name in names)


def test_throughput_is_samples_by_time_and_is_logged():
    learner(timer := Timer(flops_per_sample=100.0, peak_flops=1e6), Sleeps(), JSONLogger()).fit(2)
    for row in timer.rows:
        assert row["samples_per_second"] == 40 / row["seconds"] and row["seconds"] >= 5 * 0.007
        assert (
            row["mfu"] == pytest.approx(row["samples_per_second"] * 1e-4)
            and 7 <= row["batch_ms"] <= row["slow_batch_ms"]
        )
    logged = [json.loads(line) for line in Path("history.jsonl").read_text().splitlines()]
    assert [row["samples_per_second"] for row in logged[1:]] == [row["samples_per_second"] for row in timer.rows]
    assert len(str(timer).splitlines()) == 3
    other = Timer()
    other.load_state_dict(timer.state_dict())
    assert other.rows == timer.rows


def test_an_epoch_that_is_stopped_is_timed_too():
    learner(timer := Timer()).fit(9, max_steps=7)
    assert [round(row["samples_per_second"] * row["seconds"]) for row in timer.rows] == [40, 16]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Timer(peak_flops=1e12), "both flops_per_sample"),
        (lambda: Profile(n_steps=0), "n_steps=0"),
        (lambda: ActivationStats(every=0), "every=0"),
        (lambda: ActivationStats(limit=0.01), "limit > near_zero"),
        (lambda: GradientStats(0), "every=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_of_order_they_are_where_their_docstrings_say():
    assert Timer.order > JSONLogger.order and GradientStats.order > Recorder.order
