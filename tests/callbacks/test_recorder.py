"""The recorder keeps what a loop by hand would have written down, and draws it."""

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from learnkit import Callback, Learner, SkipBatch, StopFit, accuracy
from learnkit.callbacks import Checkpoint, JSONLogger, Recorder
from learnkit.checkpoint.snapshot import newest_snapshot

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def no_figure_stays_open() -> Iterator[None]:
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def make_batches(sizes: tuple[int, ...] = (8, 8, 3)) -> Batches:
    return [(torch.randn(n, 3), torch.randint(2, (n,))) for n in sizes]


def train(batches: Batches, epochs: int = 2, **options: Any) -> Learner:
    return Learner((batches, batches[:1]), nn.Linear(3, 2), opt_func=SGD, lr=0.1, wd=0.0, **options).fit(epochs)


def losses_by_hand(model: nn.Module, batches: Batches, epochs: int = 2, lr: float = 0.1) -> list[float]:
    losses = []
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, grad in zip(model.parameters(), grads, strict=True):
                    p -= lr * grad
            losses.append(loss.item())
    return losses


def test_a_float64_models_losses_are_float64_wherever_they_go(tmp_path: Path):
    batches = [(x.double(), y) for x, y in make_batches()]

    def learner(**options: Any) -> Learner:
        torch.manual_seed(1)
        return Learner((batches, None), nn.Linear(3, 2).double(), opt_func=SGD, lr=0.1, wd=0.0, **options)

    losses: list[float] = []

    class See(Callback):
        def after_step(self, learn: Learner) -> None:
            losses.append(learn.loss.item())

    learn = learner(
        callbacks=[
            See(),
            JSONLogger(tmp_path / "log.jsonl", every_n_steps=1),
            Checkpoint(tmp_path / "kept", every_n_steps=4),
        ]
    )
    learn.fit(3)
    assert losses == pytest.approx(losses_by_hand(learner().model, batches, epochs=3), rel=1e-14)
    assert learn.recorder.losses == losses and losses != torch.tensor(losses).float().tolist()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-15)
    snapshot = newest_snapshot(tmp_path / "kept")
    assert snapshot is not None and snapshot[1]["run"]["ranks"][0]["callbacks"]["Recorder"]["losses"].tolist() == losses
    again = learner(callbacks=[JSONLogger(tmp_path / "log.jsonl", every_n_steps=1), Checkpoint(tmp_path / "kept")])
    assert again.fit(3, resume=True).recorder.losses == losses


def test_losses_are_those_of_every_step_of_the_loop_by_hand():
    batches = make_batches()
    torch.manual_seed(1)
    learn = train(batches)
    torch.manual_seed(1)
    assert learn.recorder.losses == pytest.approx(losses_by_hand(nn.Linear(3, 2), batches), rel=1e-6)
    assert all(type(loss) is float for loss in learn.recorder.losses)


def test_more_steps_than_are_folded_at_a_time_are_all_there_in_order():
    batches = make_batches((2,)) * 300
    torch.manual_seed(1)
    learn = train(batches)
    torch.manual_seed(1)
    assert learn.recorder.losses == pytest.approx(losses_by_hand(nn.Linear(3, 2), batches), rel=1e-4)


def test_train_loss_is_the_mean_over_samples_not_over_batches():
    learn = train(make_batches((8, 8, 1)))
    losses, sizes = learn.recorder.losses, (8, 8, 1)
    for row, part in zip(learn.recorder.values, (losses[:3], losses[3:]), strict=True):
        assert row[0] == pytest.approx(sum(n * loss for n, loss in zip(sizes, part, strict=True)) / 17, rel=1e-6)
    assert learn.values["train_loss"] == learn.recorder.values[-1][0]


def test_values_have_one_row_an_epoch_under_the_metric_names():
    learn = train(make_batches(), metrics=accuracy)
    assert learn.recorder.metric_names == ("train_loss", "valid_loss", "accuracy")
    assert [len(row) for row in learn.recorder.values] == [3, 3]
    assert learn.recorder.values[-1][1:] == pytest.approx(list(learn.validate().values()), rel=1e-12)


def test_without_validation_data_there_is_the_train_loss_alone():
    learn = Learner((make_batches(), None), nn.Linear(3, 2), metrics=accuracy).fit(1)
    assert learn.recorder.metric_names == ("train_loss",) and len(learn.recorder.values[0]) == 1


@pytest.mark.parametrize(
    "opt_func, mom",
    [
        (lambda ps, lr: SGD(ps, lr=lr, momentum=0.7), [0.7] * 6),
        (torch.optim.AdamW, [0.9] * 6),
        (torch.optim.Adagrad, []),
    ],
    ids=["SGD", "AdamW", "Adagrad"],
)
def test_lrs_and_moms_are_those_of_every_step(opt_func: Any, mom: list[float]):
    learn = Learner((make_batches(), None), nn.Linear(3, 2), opt_func=opt_func, lr=0.02).fit(2)
    assert learn.recorder.lrs == [0.02] * 6 and learn.recorder.moms == mom


def test_lrs_are_the_last_layer_groups():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    learn = Learner((make_batches(), None), model, splitter=list).fit(1, slice(1e-4, 1e-2))  # type: ignore
    assert learn.recorder.lrs == [1e-2] * 3


def test_rates_are_those_that_the_step_used():
    used: list[float] = []

    class Used(Callback):
        order = 1_000

        def around_step(self, learn, run):
            used.append(learn.opt.param_groups[0]["lr"])
            run()

    learn = Learner((make_batches(), None), nn.Linear(3, 2), callbacks=Used()).fit_one_cycle(2)
    assert learn.recorder.lrs == used and len(set(used)) > 3


def test_a_second_fit_begins_a_new_record():
    learn = train(make_batches())
    learn.fit(1)
    assert len(learn.recorder.losses) == 3 and len(learn.recorder.values) == 1


def test_an_interrupted_fit_keeps_what_was_recorded():
    class Breaks(Callback):
        def after_step(self, learn):
            if learn.step == 4:
                raise KeyboardInterrupt

    learn = Learner((make_batches(), None), nn.Linear(3, 2), callbacks=Breaks())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    assert (
        len(learn.recorder.values) == 1
        and len(learn.recorder.losses) in (3, 4)
        and all(map(math.isfinite, learn.recorder.losses))
    )


def test_epochs_that_were_left_early_or_skipped_keep_rows_and_means_right():
    class Leaves(Callback):
        def before_batch(self, learn):
            if learn.training and learn.batch_index == 1:
                raise SkipBatch
            if learn.training and learn.epoch == 1 and learn.batch_index == 2:
                raise StopFit

    learn = train(make_batches(), epochs=3, callbacks=Leaves())
    losses, recorder = learn.recorder.losses, learn.recorder
    assert len(losses) == 3 and recorder.values[0][0] == pytest.approx((8 * losses[0] + 3 * losses[1]) / 11, rel=1e-6)


def test_a_loss_that_is_changed_after_its_step_stays_as_it_was_recorded():
    class Changes(Callback):
        def after_batch(self, learn):
            if learn.training:
                learn.loss.data.fill_(1e9)

    learn = train(make_batches(), callbacks=Changes())
    assert max(learn.recorder.losses) < 1e3


def test_recording_keeps_no_graph_alive():
    learn = train(make_batches())
    values = [*learn.recorder.trace.recent, *learn.recorder.trace.folded]
    assert not any(value.requires_grad for value in values)


def test_an_infinite_or_nan_loss_is_recorded_as_it_is():
    batches = make_batches()
    batches[1][0][0, 0] = float("nan")
    losses = train(batches, epochs=1).recorder.losses
    assert math.isfinite(losses[0]) and math.isnan(losses[1])


def test_a_learner_without_its_recorder_trains_and_says_so_when_asked():
    learn = Learner((make_batches(), make_batches()), nn.Linear(3, 2)).remove_callback(Recorder)
    assert learn.fit(1).step == 3
    with pytest.raises(AttributeError, match="no Recorder: it was removed"):
        _ = learn.recorder


def test_the_state_goes_round():
    recorder, other = train(make_batches(), metrics=accuracy).recorder, Recorder()
    other.load_state_dict(recorder.state_dict())
    for name in ("losses", "lrs", "moms", "values", "metric_names"):
        assert getattr(other, name) == getattr(recorder, name)
    assert other.losses


def test_the_state_is_plain_and_loads_with_weights_only(tmp_path: Path):
    recorder = train(make_batches(), metrics=accuracy).recorder
    torch.save(recorder.state_dict(), tmp_path / "state.pt")
    other = Recorder()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.losses == recorder.losses


def test_to_csv_has_a_header_and_a_row_an_epoch(tmp_path: Path):
    learn = train(make_batches(), metrics=accuracy)
    for path in (tmp_path / "a.csv", str(tmp_path / "b.csv")):
        assert learn.recorder.to_csv(path) == Path(path)
        with open(path, newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["epoch", "train_loss", "valid_loss", "accuracy"]
        assert [[float(cell) for cell in row] for row in rows[1:]] == [
            [i, *row] for i, row in enumerate(learn.recorder.values)
        ]


# --- plots -------------------------------------------------------------------
def lines_of(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for ax in axes.figure.axes for line in ax.get_lines()}


def test_plot_losses_shows_every_step_and_the_validation_loss_at_the_end_of_each_epoch():
    learn = train(make_batches())
    lines = list(lines_of(learn.recorder.plot_losses()).values())
    assert any(list(line.get_ydata()) == pytest.approx(learn.recorder.losses) for line in lines)
    [valid] = [line for line in lines if "valid" in line.get_label()]
    assert list(valid.get_ydata()) == [row[1] for row in learn.recorder.values] and list(valid.get_xdata()) == [3, 6]


def test_plot_losses_may_skip_the_start():
    learn = train(make_batches())
    lines = list(lines_of(learn.recorder.plot_losses(skip_start=2)).values())
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
    assert ([2, 3, 4, 5], pytest.approx(learn.recorder.losses[2:])) in drawn


def test_the_thick_line_of_a_long_fit_is_a_moving_average():
    learn = train(make_batches((2,)) * 60, epochs=1)
    losses = learn.recorder.losses
    [(label, smooth)] = [
        (label, line) for label, line in lines_of(learn.recorder.plot_losses()).items() if "mean of" in label
    ]
    window = int(label.split("mean of ")[1].split()[0])
    assert window > 1 and smooth.get_ydata()[-1] == pytest.approx(sum(losses[-window:]) / window)


def test_plot_lr_shows_rates_and_momentum():
    learn = Learner((make_batches(), None), nn.Linear(3, 2)).fit_one_cycle(2)
    lines = lines_of(learn.recorder.plot_lr())
    assert list(lines["learning rate"].get_ydata()) == learn.recorder.lrs
    assert list(lines["momentum"].get_ydata()) == learn.recorder.moms


def test_plot_lr_of_an_optimizer_without_momentum_shows_rates_alone():
    learn = Learner((make_batches(), None), nn.Linear(3, 2), opt_func=torch.optim.Adagrad).fit(2)
    assert list(lines_of(learn.recorder.plot_lr())) == ["learning rate"]


def test_plot_metrics_has_a_line_a_metric():
    def entropy(pred: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(pred, target)

    learn = train(make_batches(), metrics=[accuracy, entropy])
    lines = lines_of(learn.recorder.plot_metrics())
    for i, name in ((2, "accuracy"), (3, "entropy")):
        assert list(lines[name].get_ydata()) == [row[i] for row in learn.recorder.values]
        assert list(lines[name].get_xdata()) == [1, 2]


def test_plots_are_drawn_into_given_axes_and_can_be_saved(tmp_path: Path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3)
    recorder = train(make_batches(), metrics=accuracy).recorder
    for ax, plot in zip(axes, (recorder.plot_losses, recorder.plot_lr, recorder.plot_metrics), strict=True):
        assert plot(ax) is ax
    figure.savefig(tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 1_000


def test_plotting_metrics_where_there_are_none_says_what_to_give():
    with pytest.raises(ValueError, match=r"no metrics to plot: give Learner\(…, metrics=…\)"):
        train(make_batches()).recorder.plot_metrics()


@pytest.mark.parametrize("plot", ["plot_losses", "plot_lr"])
def test_plots_before_any_fit_are_empty_and_no_error(plot: str):
    learn = Learner((make_batches(), None), nn.Linear(3, 2))
    assert all(len(line.get_ydata()) == 0 for line in lines_of(getattr(learn.recorder, plot)()).values())
