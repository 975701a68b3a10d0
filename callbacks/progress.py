"""A bar per epoch and a table of epochs in a terminal or notebook; one plain line per epoch elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

from learnkit.callbacks.recorder import Recorder
from learnkit.data.loaders import n_batches
from learnkit.devices.accelerator import widest_float
from learnkit.devices.transfer import Reading
from learnkit.hooks import Callback, Run
from learnkit.learner import Learner
from learnkit.logs.plots import moving_average

WIDE = 76  # columns of a terminal that has room for the loss; a longer line would wrap and not be overwritten
BAR_SMOOTHING = 0.98  # of the training loss beside the bar: a debiased moving average, as in fastai v1


class Progress(Callback):
    """Shows how a fit goes, by fastprogress. `learn.no_bar()` and `learn.no_logging()` quieten it for a while.

    bar     draw bars, where the output is a terminal or a notebook
    lines   print a line per epoch: a table's row with bars, `epoch 1/5  train_loss 0.31  …` without
    graph   in a notebook, draw training and validation losses below the bars, anew after each epoch; or the metric of
            this name

    >>> quiet = Progress(bar=False)
    """

    order = Recorder.order - 10
    unique = True
    in_trials = False

    def __init__(self, *, bar: bool = True, lines: bool = True, graph: bool | str = False) -> None:
        self.bar, self.lines, self.graph = bar, lines, graph
        self.master: Any = None  # fastprogress's bar of all epochs; None: no bars in this fit
        self.child: Any = None  # its bar of the pass under way
        self.next_batch = sys.maxsize  # the batch after which the bar is due again
        self.n_seen = 0  # losses in the moving average
        self.smooth = self.debias = 0.0
        self.reading: Reading | None = None  # losses that are on their way from the device
        self.shares = False  # whether the ranks tell each other their losses, because one shows a bar
        self.epoch_start = 0.0

    def around_fit(self, learn: Learner, run: Run) -> None:
        if isinstance(self.graph, str) and self.graph not in learn.value_names:
            raise ValueError(f"graph={self.graph!r}: this fit measures {', '.join(learn.value_names)}.")
        shows = self.bar and self.lines and learn.rank == 0 and is_interactive()
        self.master = new_master(learn.n_epochs) if shows else None
        self.n_seen, self.smooth, self.debias, self.reading = 0, 0.0, 0.0, None
        self.shares = learn.world_size > 1 and learn.ranks.agree(shows)
        try:
            if self.master is not None:
                self.master.update(0)
                self.master.write(["epoch", *learn.value_names, "time"], table=True)
            run()
        except BaseException:
            if self.master is not None:
                self.master.on_interrupt()
            raise
        finally:
            self.end_bar()
            if self.master is not None and self.master.main_bar.last_v is not None:
                self.master.on_iter_end()
            self.master = None

    def before_epoch(self, learn: Learner) -> None:
        self.epoch_start = time.perf_counter()

    def before_train(self, learn: Learner) -> None:
        self.start_bar(learn)

    def before_validate(self, learn: Learner) -> None:
        self.start_bar(learn)

    def after_train(self, learn: Learner) -> None:
        self.end_bar()

    def after_validate(self, learn: Learner) -> None:
        self.end_bar()

    def after_batch(self, learn: Learner) -> None:
        if learn.batch_index >= self.next_batch:
            self.advance(learn)

    def after_epoch(self, learn: Learner) -> None:
        if not self.lines or learn.rank != 0:
            return
        elapsed = clock(time.perf_counter() - self.epoch_start)
        cells = {name: f"{learn.values[name]:.6f}" for name in learn.value_names if name in learn.values}
        if self.master is None:
            words = "  ".join(f"{name} {cell}" for name, cell in cells.items())
            print(f"epoch {learn.epoch + 1}/{learn.n_epochs}  {words}  time {elapsed}", flush=True)
        else:
            self.master.write(
                [str(learn.epoch), *(cells.get(name, "-") for name in learn.value_names), elapsed], table=True
            )
            self.master.update(learn.epoch + 1)
            if self.graph:
                self.draw(learn)

    def draw(self, learn: Learner) -> None:
        """By fastprogress, in a terminal nothing. The Recorder has read the epoch's losses by now."""
        recorder = next((cb for cb in learn.running if isinstance(cb, Recorder)), None)
        if recorder is None:
            return
        columns = [self.graph] if isinstance(self.graph, str) else ["train_loss", "valid_loss"]
        columns = [name for name in columns if name in recorder.metric_names]
        lines: list[Any] = [
            [recorder.ends, [row[recorder.metric_names.index(name)] for row in recorder.values]] for name in columns
        ]
        if columns[:1] == ["train_loss"]:
            losses = moving_average(recorder.losses, max(1, len(recorder.counts) // 50))
            lines[0] = [range(len(losses)), losses]
        self.master.names = columns
        if lines:
            self.master.update_graph(lines, x_bounds=(0, learn.n_steps or len(recorder.counts)))

    def start_bar(self, learn: Learner) -> None:
        self.end_bar()
        if self.master is None:
            return
        from fastprogress.fastprogress import progress_bar

        n = n_batches(learn.dl)
        if n is not None and learn.training:
            n += learn.first_batch  # those before it were trained on before
        self.child = progress_bar(range(n or 0), total="noinfer" if n is None else n, parent=self.master, leave=False)
        self.child.update(0)
        self.next_batch = 0

    def advance(self, learn: Learner) -> None:
        """Draw the bar; it says itself when it is due again."""
        if learn.training and getattr(self.child, "cols", WIDE) >= WIDE:
            self.child.comment = self.loss_so_far(learn)
        n_done = learn.batch_index + 1
        self.child.update(n_done)
        finished = self.child.last_v is None
        self.next_batch = (
            sys.maxsize if finished else n_done + (0 if n_done < self.child.first_its else self.child.wait_for - 1)
        )

    def end_bar(self) -> None:
        if self.child is not None and self.child.last_v is not None:
            self.child.on_iter_end()
        self.child, self.next_batch = None, sys.maxsize

    def loss_so_far(self, learn: Learner) -> str:
        if learn.world_size == 1:
            self.follow_loss(learn)
        elif self.reading is not None and self.reading.has_arrived:
            self.take_loss_of_all()
        return f"train_loss {self.smooth / self.debias:.4f}" if self.debias else ""

    def follow_loss(self, learn: Learner) -> None:
        """Bring the moving average up to date with what has arrived; on a GPU that is what was asked for the time
        before.
        """
        if self.reading is None:
            self.reading = Reading(losses_since(self.n_seen, learn))
        if not self.reading.has_arrived:
            return
        for loss in self.reading.tolist():
            self.n_seen += 1
            self.smooth += (1 - BAR_SMOOTHING) * (loss - self.smooth)
            self.debias += (1 - BAR_SMOOTHING) * (1 - self.debias)
        self.reading = None

    def show_loss_of_all(self, learn: Learner) -> None:
        """The mean loss of all ranks since the last time: a collective, which Distributed asks all ranks for. It is
        shown when it has arrived on the host, which does not wait for it.
        """
        losses = losses_since(self.n_seen, learn).to(learn.device)
        self.n_seen += len(losses)
        wide = widest_float(learn.device)
        sums = learn.ranks.all_sum(
            [losses.sum(dtype=wide), torch.full((), len(losses), dtype=wide, device=learn.device)]
        )
        if self.reading is not None:
            self.take_loss_of_all()
        self.reading = Reading(torch.stack(sums))
        if self.reading.has_arrived:
            self.take_loss_of_all()

    def take_loss_of_all(self) -> None:
        assert self.reading is not None
        total, n = self.reading.tolist()
        self.smooth, self.debias, self.reading = total / max(n, 1), 1.0, None


def say(learn: Learner, text: str) -> None:
    """A line beside those of the epochs: on rank 0, and where these are printed."""
    shown = next((cb for cb in learn.running if isinstance(cb, Progress) and cb.lines), None)
    if shown is None or learn.rank != 0:
        return
    if shown.master is None:
        print(text, flush=True)
    else:
        shown.master.write(text)


def losses_since(n: int, learn: Learner) -> Tensor:
    recorder = next((cb for cb in learn.callbacks if isinstance(cb, Recorder)), None)
    return torch.zeros(0) if recorder is None else recorder.trace.since(n)


def tell_interval(learn: Learner) -> int:
    """Batches between two times that the ranks tell each other their losses: twenty times an epoch, but not too
    often.
    """
    return max(25, (n_batches(learn.dl) or 1000) // 20)


def is_interactive() -> bool:
    """Whether bars can be drawn: in a terminal or a Jupyter kernel, not in a file or pipe."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stdout.isatty() or getattr(shell, "kernel", None) is not None


def new_master(n_epochs: int) -> Any:
    from fastprogress.fastprogress import master_bar

    return master_bar(range(n_epochs))


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
