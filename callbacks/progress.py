"""Progress bars and a table of epochs in a terminal or notebook; one plain line per epoch elsewhere."""

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

WIDE = 76  # columns of a terminal that is wide enough for the loss; a longer line would wrap and not be overwritten
BAR_SMOOTHING = 0.98  # for the training loss next to the bar: a debiased moving average, as in fastai v1


class Progress(Callback):
    """Show the progress of a fit with fastprogress; `learn.no_bar()` and `learn.no_logging()` silence it temporarily.

    Args:
        bar: draw bars, if the output is a terminal or a notebook.
        lines: print a line per epoch: with bars a row of a table, without bars `epoch 1/5  train_loss 0.31  …`.
        graph: in a notebook, draw training and validation losses below the bars, and update them after each epoch. A
            name draws that metric instead.

    Raises:
        ValueError: at the start of the fit, when the fit does not measure the metric `graph`.

    Example:
        >>> quiet = Progress(bar=False)
    """

    order = Recorder.order - 10
    unique = True
    in_trials = False

    def __init__(self, *, bar: bool = True, lines: bool = True, graph: bool | str = False) -> None:
        self.bar, self.lines, self.graph = bar, lines, graph
        self.master: Any = None  # fastprogress's bar of all epochs; None: no bars in this fit
        self.child: Any = None  # its bar of the current pass
        self.next_batch = sys.maxsize  # the batch after which the bar is drawn again
        self.n_seen = 0  # number of losses in the moving average
        self.smooth = self.debias = 0.0
        self.reading: Reading | None = None  # losses that are being copied from the device
        self.shares = False  # whether the ranks share their losses, because one of them shows a bar
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
        """Draw the graph with fastprogress, which draws nothing in a terminal. The Recorder has already read the
        epoch's losses.
        """
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
            n += learn.first_batch  # the batches before it were trained in an earlier run
        self.child = progress_bar(range(n or 0), total="noinfer" if n is None else n, parent=self.master, leave=False)
        self.child.update(0)
        self.next_batch = 0

    def advance(self, learn: Learner) -> None:
        """Draw the bar, which decides itself after which batch it is drawn again."""
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
        """Add the losses that have arrived to the moving average; on a GPU these were requested at the last call."""
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
        """Compute the mean loss of all ranks since the last call: a collective, which Distributed calls on all ranks.
        The host does not wait for the value, and shows it once it has arrived.
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

    def say(self, text: str) -> None:
        """Print a line between those of the epochs, if these are printed."""
        if not self.lines:
            return
        if self.master is None:
            print(text, flush=True)
        else:
            self.master.write(text)


def losses_since(n: int, learn: Learner) -> Tensor:
    recorder = next((cb for cb in learn.callbacks if isinstance(cb, Recorder)), None)
    return torch.zeros(0) if recorder is None else recorder.trace.since(n)


def tell_interval(learn: Learner) -> int:
    """Return the number of batches between two exchanges of the ranks' losses: twenty exchanges an epoch, but at least
    25 batches between two.
    """
    return max(25, (n_batches(learn.dl) or 1000) // 20)


def is_interactive() -> bool:
    """Whether bars can be drawn: in a terminal or a Jupyter kernel, but not in a file or pipe."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return sys.stdout.isatty() or getattr(shell, "kernel", None) is not None


def new_master(n_epochs: int) -> Any:
    from fastprogress.fastprogress import master_bar

    return master_bar(range(n_epochs))


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
