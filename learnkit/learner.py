"""The Learner: data, model, loss and optimizer bundled, and the training loop that runs them through the hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from learnkit.checkpoint.files import as_path
from learnkit.checkpoint.weights import has_same_dtypes, load_model, read_for, write_weights
from learnkit.data.batch import Inputs, accepts, as_batch, count_samples, split_batch, target_key
from learnkit.data.fork_rng import unmoved
from learnkit.data.generators import inner
from learnkit.data.loaders import DataBunch, first_batch
from learnkit.data.order import items_per_batch, mix, private, rest_of, set_seed_and_epoch, with_seeded_workers
from learnkit.devices.dtensor import whole_on_main
from learnkit.devices.nested import describe, tensors_in
from learnkit.devices.ranks import Alone, Ranks
from learnkit.devices.transfer import mover
from learnkit.devices.wrappers import plain_state
from learnkit.hooks import Callback, HookTable, Stages, hook_table
from learnkit.loop.evaluate import Collect, Measure, evaluate, evaluation_loader
from learnkit.loop.fit import check_count, optimizer_of, planned_steps, run_fit
from learnkit.loop.loss import LossFunc, check_loss, choose_loss, count_like, each_loss
from learnkit.loop.placement import as_device, check_autocast, place
from learnkit.loop.session import as_callbacks, check_callbacks
from learnkit.loop.traceback import short_traceback
from learnkit.metrics import as_metrics
from learnkit.optim.groups import OptFunc, Splitter, check_rate, layer_groups, spread
from learnkit.optim.state import load_optimizer, optimizer_fits
from learnkit.schedule import Schedule, cyclic, flat_cos, one_cycle, one_cycle_momentum

if TYPE_CHECKING:
    from learnkit.callbacks.recorder import Recorder
    from learnkit.distributed.request import Request
    from learnkit.loop.decorator import Handle
    from learnkit.trials.lr_find import RateFinder
    from learnkit.vision.interpretation import Interpretation

Rate = float | slice


class Learner:
    """Trains `model` on `data` and measures it.

    data        a DataBunch, or a pair (train_dl, valid_dl) of re-iterables of batches
    model       moved to `device` in place, as is a loss function that is an nn.Module; all of it is on one device
    loss_func   (prediction, target) -> 0-d tensor. None: the data's, else a model output's own `.loss`, else
                cross-entropy for integer targets and mean squared error for float ones
    opt_func    a callable of parameter groups such as torch.optim.SGD, whose weight decay becomes decoupled, or a built
                torch.optim.Optimizer, which is used as it is: with its own rates where fit is given none
    lr, wd      defaults of the fit methods; `bn_wd=False` spares normalization layers and biases from weight decay
    metrics     one or several: functions (pred, target) -> mean over the batch, torchmetrics objects, or objects with
                reset/update/compute. Functions are averaged over samples
    callbacks   more of them, beside the Recorder and the Progress that every Learner has
    splitter    model -> sequence of modules or parameter lists: the layer groups, first layers first
    path        where `model_dir` lies, in which save and load keep their files
    seed        None: sample order follows torch's seed at the data's construction. A number: it decides the order, and
                fit seeds torch's global generator with it, so that two fits of equal Learners are equal
    device      such as "cuda:1", "xpu" or "cpu". None: the accelerator if there is one, else the CPU; after
                to_distributed each rank has its own. Raises ValueError for one that is not there

    >>> data = DataBunch.from_tensors((torch.randn(64, 4), torch.randint(3, (64,))), bs=16)
    >>> learn = Learner(data, nn.Linear(4, 3)).fit_one_cycle(2, 1e-2)
    """

    def __init__(
        self,
        data: DataBunch | Sequence[Any],
        model: nn.Module,
        *,
        loss_func: LossFunc | None = None,
        opt_func: OptFunc | Optimizer = AdamW,
        lr: Rate = 3e-3,
        wd: float = 1e-2,
        bn_wd: bool = True,
        metrics: Any = (),
        callbacks: Callback | Iterable[Callback] = (),
        splitter: Splitter | None = None,
        path: str | Path = ".",
        model_dir: str = "models",
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        from learnkit.callbacks.progress import Progress
        from learnkit.callbacks.recorder import Recorder

        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, expected a torch.nn.Module.")
        if loss_func is not None and (isinstance(loss_func, type) or not callable(loss_func)):
            raise TypeError(
                f"loss_func={loss_func!r}, expected a function (prediction, target) -> 0-d tensor, or an object such "
                f"as torch.nn.CrossEntropyLoss(), with parentheses."
            )
        if not isinstance(opt_func, Optimizer) and not callable(opt_func):
            raise TypeError(
                f"opt_func={opt_func!r}, expected a class such as torch.optim.SGD, a functools.partial of one, or a "
                f"built torch.optim.Optimizer."
            )
        self.device = as_device(device)
        self.data = as_data(data)
        self.model = model
        self.loss_func = loss_func if loss_func is not None else self.data.loss_func
        self.opt_func, self.splitter = opt_func, splitter
        # until the first fit
        self.opt: Optimizer = opt_func if isinstance(opt_func, Optimizer) else None  # type: ignore[assignment]
        self.lr, self.wd, self.bn_wd = lr, check_rate("wd", wd), bn_wd
        self.metrics = as_metrics(metrics, taken=("epoch", "train_loss", "valid_loss", "time"))
        self.path, self.model_dir, self.seed = as_path(path), str(as_path(model_dir)), seed
        self.callbacks: list[Callback] = []
        place(self, self.device)
        layer_groups(model, splitter)  # its errors belong here, not into the first fit

        # One device is a world of one: to_distributed says otherwise.
        self.rank, self.world_size = 0, 1
        self.asked_of_ddp = ""  # options of to_distributed that to_fsdp has not, as they are written
        self.is_spread = False  # whether to_fsdp was called, alone too
        self.ranks: Ranks = Alone()  # what the ranks tell each other; nothing when alone
        self.order_seed = seed  # decides the order of samples; None: each loader's own seed

        # Where the loop is: read by callbacks, put back by nested evaluations.
        self.n_epochs = 0  # of this fit
        self.max_steps: int | None = None  # a limit to them, if fit was given one
        self.n_steps: int | None = None  # optimizer steps planned for this fit; None: a loader has no length
        self.steps_ahead = 0  # schedules are at `step + steps_ahead`: not 0 where the number of ranks has changed
        self.epoch = 0  # of this fit, from 0
        self.step = 0  # optimizer steps done in this fit
        self.n_items_done = 0  # of this epoch's order, trained on: samples, or batches of a loader of batches
        self.first_batch = 0  # of this epoch's training pass; not 0 in an epoch that a checkpoint was taken in
        self.n_fits = 0  # begun in this learner's life
        self.runs: dict[int, str] = {}  # the names that checkpoints have for these fits, by their numbers
        self.resume = False  # whether this fit was asked to go on from a checkpoint
        self.resumed: dict[str, Any] | None = None  # the place that it went on from
        self.wanted: Request | None = None  # after this batch, by this rank: to save, or to leave for a signal
        self.agreed: Request | None = None  # after this batch, by all ranks
        self.epochs_trained = 0  # in this learner's life: decides the order of samples
        self.training = False
        self.training_model = model  # what training batches go through: the model, or a wrapper for a fit's length
        self.evaluated_model = model  # what validation batches go through
        self.saved_weights: Callable[[], AbstractContextManager[Any]] = (
            nullcontext  # in it, the model is what save writes
        )
        self.zero_grad: Callable[[], None] = lambda: None

        # What callbacks that own the gradients put in the place of these, for a fit's length:
        self.differentiate: Callable[[Any], None] = Tensor.backward  # called with the loss
        self.count: Callable[[Any, Any], Any] = (
            count_samples  # (inputs, target) -> what a batch counts for: samples, or tokens
        )
        self.whole: Any = None  # of what, in the same unit, the loss under way is a part; None: it is all there is
        self.in_step: Any = None  # what the step under way counts for; None: this batch alone
        self.n_held = 0  # batches whose gradients wait for a later step
        self.no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext  # in it, gradients stay with this rank
        self.reduce_gradients: Callable[[], None] = lambda: None  # brings those that stayed together
        self.gradient_order: Callable[[], list[str]] = (
            list  # in which ranks add them up from the second step on; all ranks call it
        )
        self.n_of_all: Callable[[int, int], int] = lambda k, own: (
            own
        )  # samples of all ranks in the k-th batch, by this rank's
        self.dl: Any = None  # the loader of the pass under way
        self.batch_index = -1  # within the pass; -1 between passes
        self.inputs: Inputs = ()  # of the batch: by position (tuple) or by keyword (dict)
        self.target: Any = None
        self.pred: Any = None  # the model's output
        self.loss: Any = None  # 0-d tensor with its graph
        self.values: dict[str, float] = {}  # the last train_loss, valid_loss and metrics
        self.failure: BaseException | None = None  # the first error of the session, which is the one that surfaces

        self.running: tuple[Callback, ...] = ()  # the callbacks of the session under way, in their order
        # with their hooks; None outside fit, validate and predict
        self.stages: Stages = None  # type: ignore[assignment]
        self._loss_of: Callable[[Any, Any], Any] = self._first_loss
        self._first_target: Any = (
            None  # of a pass, until its first loss: as the loader gave it, on the device, its version there
        )
        self._evaluated: Any = None  # the loader that the evaluation under way was asked for
        self._labels_read: list[Any] = []  # loaders whose class numbers were checked in this session, the last eight
        self.meter: Measure | Collect = Measure(())  # what the evaluation under way gathers
        self._passes_target = ""  # under this name the model takes the target too, as Hugging Face's do
        self._input_ndim: int | None = None  # dimensions of a batch's first input, for predict
        given = as_callbacks(callbacks)
        defaults = [cls() for cls in (Recorder, Progress) if not any(isinstance(cb, cls) for cb in given)]
        for callback in (*defaults, *given):
            self.add_callback(callback)

    # --- the loop: one method a stage ----------------------------------------
    def _fit(self) -> None:
        for self.epoch in range(self.epoch, self.n_epochs):  # a fit that is resumed begins further on
            self.stages.epoch()
            self.n_items_done = 0

    def _epoch(self) -> None:
        self.values, self.batch_index = {}, -1
        self.dl, self.training = rest_of(private(self.data.train_dl), self.n_items_done), True
        self.first_batch = self.n_items_done // items_per_batch(self.data.train_dl)
        self.model.train()
        self.stages.train()
        self.training, self.batch_index = False, -1
        if self.data.valid_dl is not None:
            evaluate(self, self.data.valid_dl, Measure(self.metrics, self.world_size))

    def _train(self) -> None:
        set_seed_and_epoch(self.dl, self.order_seed, self.epochs_trained)
        self.epochs_trained += 1  # also if a hook stops it early: the next epoch has the next order
        n_before, per_batch = self.n_items_done, items_per_batch(self.data.train_dl)
        seeded = with_seeded_workers(
            self.dl, mix(self.order_seed or 0, self.epochs_trained - 1, self.rank), self.first_batch
        )
        with closing(self._feed(seeded, self.first_batch)) as batches:
            for n, _ in enumerate(batches, 1):
                self.n_items_done = n_before + n * per_batch
                self.stages.batch()
        if self.n_held:
            self.stages.step()  # the data ended earlier than was known

    def _validate(self) -> None:
        set_seed_and_epoch(self.dl, self.order_seed, 0)
        with torch.no_grad(), closing(self._feed(self.dl)) as batches:
            for _ in batches:
                self.stages.batch()
        self.values.update(self.meter.results(self.ranks))

    def _batch(self) -> None:
        self.pred = self.loss = None  # the last graph is free before the next one is built
        happened = self.stages.forward()
        if not happened or self.pred is None:
            return  # nothing to measure, nothing to learn from
        if self.training:
            self.stages.backward()
            self.stages.step()
        else:
            self.meter.update(self.inputs, self.target, self.pred, self.loss)

    def _forward(self) -> None:
        inputs, model = self.inputs, self.training_model if self.training else self.evaluated_model
        self.pred = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        self.loss = self._loss_of(self.pred, self.target)

    def _backward(self) -> None:
        if self.whole is None:
            return self.differentiate(self.loss)
        n = self.count(self.inputs, self.target)  # whole numbers in tensors would divide in float32
        self.differentiate(self.loss * ((count_like(self.loss, n) if isinstance(n, Tensor) else n) / self.whole))

    def _step(self) -> None:
        self.opt.step()
        self.zero_grad()
        self.step += 1

    def _feed(self, loader: Any, first: int = 0) -> Generator[None, None, None]:
        """Put one batch after the other in place, on the device; what the first one tells is found out once a pass."""
        self._loss_of = self._first_loss
        self.batch_index, move, given = first - 1, None, None
        for self.batch_index, batch in enumerate(loader, first):
            if self.batch_index == first:
                given = split_batch(batch)[1]
                if self._see_first(batch):
                    move = mover(self.device)
            if move is not None:
                batch = move(batch)
            self.inputs, self.target = split_batch(batch)
            if self.batch_index == first:
                self._first_target, given = (given, self.target, version_of(self.target)), None
            if self._passes_target:
                self.inputs = {**self.inputs, self._passes_target: self.target}  # type: ignore[dict-item]
            yield
        # A rank's share of an evaluation may be empty, and so may the rest of an epoch that another number of ranks
        # began.
        if self.batch_index < 0 and (not self.n_items_done if self.training else self.world_size == 1):
            raise ValueError(f"the loader of this pass ({type(inner(loader)).__name__}) gave no batch: it is empty.")

    def _see_first(self, batch: Any) -> bool:
        """Remember what a pass's batches look like; return whether they have to be moved to the device."""
        if not tensors_in(batch):
            raise TypeError(
                f"a batch is {describe(batch)}, expected (x, y), (x1, x2, …, y) or a mapping, of tensors: convert what "
                f"the loader gives with torch.as_tensor, in its dataset or collate_fn."
            )
        key = target_key(batch)
        self._passes_target = key if key is not None and accepts(self.model.forward, key) else ""
        tensors = tensors_in(split_batch(batch)[0])
        if tensors:
            self._input_ndim = tensors[0].ndim
        return any(t.device != self.device for t in tensors_in(batch))

    def _first_loss(self, pred: Any, target: Any) -> Any:
        """A pass's first loss: chosen, checked, and then computed by the loss function alone."""
        loss_of = choose_loss(self.loss_func, pred, target, training=self.training, labels=self._labels_to_read(target))
        loss = loss_of(pred, target)
        if loss is not None or self.training:
            check_loss(loss, training=self.training)
        self._loss_of = getattr(loss_of, "plain", loss_of)
        return loss

    def _labels_to_read(self, target: Any) -> Any:
        """Whether the loss reads class numbers to check them: once a session and loader, as that waits for the device;
        or the same target as it came from the loader, if it was on the CPU and no hook has changed it since.
        """
        (given, moved, version), self._first_target = self._first_target or (None, None, None), None
        loader = self.data.train_dl if self.training else self._evaluated
        if any(loader is other for other in self._labels_read):
            return False
        self._labels_read = [*self._labels_read[-7:], loader]  # not all: a hook may make a loader in each epoch
        if not isinstance(given, Tensor) or given.device.type != "cpu":
            return True
        return given if target is moved and version is not None and version == version_of(target) else True

    # --- fitting -------------------------------------------------------------
    @short_traceback
    def fit(
        self,
        epochs: int,
        lr: Rate | None = None,
        *,
        wd: float | None = None,
        callbacks: Iterable[Callback] = (),
        max_steps: int | None = None,
        resume: bool = False,
    ) -> Learner:
        """Train for `epochs` at a constant rate (`lr=None`: the Learner's), but for `max_steps` optimizer steps at
        most.

        `resume=True` goes on from the newest checkpoint that a `Checkpoint` callback wrote in a fit of the same
        arguments, exactly, at the step at which it was taken; begins where there is none; does nothing where that fit
        was finished.
        """
        return run_fit(self, epochs, {"lr": lr}, wd, callbacks, max_steps, resume)

    @short_traceback
    def fit_one_cycle(
        self,
        epochs: int,
        max_lr: Rate | None = None,
        *,
        wd: float | None = None,
        moms: tuple[float, float] | None = (0.95, 0.85),
        div_factor: float = 25.0,
        final_div: float | None = None,
        pct_start: float = 0.3,
        callbacks: Iterable[Callback] = (),
        max_steps: int | None = None,
        resume: bool = False,
    ) -> Learner:
        """One cycle (Smith & Topin, 2018): from max_lr / div_factor by cosine to max_lr, then to max_lr / final_div.

        Of n optimizer steps the peak is at int(n * pct_start); `final_div=None` is div_factor * 1e4. Momentum, or
        Adam's beta1, mirrors it from moms[0] to moms[1] and back; `moms=None` leaves it alone.
        """

        def cycle(peak: float) -> Schedule:
            return one_cycle(peak, div_factor, final_div, pct_start)

        momentum = {} if moms is None else {"mom": one_cycle_momentum(moms, pct_start)}
        return run_fit(self, epochs, {"lr": (max_lr, cycle)} | momentum, wd, callbacks, max_steps, resume)

    @short_traceback
    def fit_flat_cos(
        self,
        epochs: int,
        lr: Rate | None = None,
        *,
        wd: float | None = None,
        div_final: float = 1e5,
        pct_start: float = 0.75,
        callbacks: Iterable[Callback] = (),
        max_steps: int | None = None,
        resume: bool = False,
    ) -> Learner:
        """A flat rate for the first `pct_start` of the steps, then by cosine to lr / div_final."""
        return run_fit(
            self,
            epochs,
            {"lr": (lr, lambda rate: flat_cos(rate, div_final, pct_start))},
            wd,
            callbacks,
            max_steps,
            resume,
        )

    @short_traceback
    def fit_sgdr(
        self,
        n_cycles: int,
        lr: Rate | None = None,
        *,
        cycle_len: int = 1,
        cycle_mult: int = 2,
        wd: float | None = None,
        callbacks: Iterable[Callback] = (),
        max_steps: int | None = None,
        resume: bool = False,
    ) -> Learner:
        """Cosine with warm restarts (Loshchilov & Hutter, 2017): `n_cycles` from lr to 0, the first one `cycle_len`
        epochs long, each next one `cycle_mult` times as long as the one before.
        """
        for name, value in (("n_cycles", n_cycles), ("cycle_len", cycle_len), ("cycle_mult", cycle_mult)):
            check_count(name, value)
        epochs = sum(cycle_len * cycle_mult**i for i in range(n_cycles))
        cycles = partial(cyclic, n_cycles=n_cycles, cycle_mult=cycle_mult)
        return run_fit(self, epochs, {"lr": (lr, cycles)}, wd, callbacks, max_steps, resume)

    @short_traceback
    def fine_tune(
        self,
        epochs: int,
        base_lr: Rate | None = None,
        freeze_epochs: int = 1,
        *,
        lr_mult: float = 100.0,
        pct_start: float = 0.3,
        div_factor: float = 5.0,
        **options: Any,
    ) -> Learner:
        """Train the last layer group for `freeze_epochs`, then everything for `epochs` at half the rate, spread over
        the layer groups from base_lr / lr_mult to base_lr; both as one cycle. `options` are those of fit_one_cycle.
        """
        check_count("epochs", epochs)
        if freeze_epochs < 0:
            raise ValueError(f"freeze_epochs={freeze_epochs}: expected 0 or more.")
        rate = spread(self.lr if base_lr is None else base_lr, 2)[-1]
        one_cycle(rate, div_factor, pct_start=pct_start)  # its errors before anything is frozen
        if freeze_epochs:
            self.freeze()
            self.fit_one_cycle(freeze_epochs, slice(rate), pct_start=0.99, **options)
        self.unfreeze()
        return self.fit_one_cycle(
            epochs, slice(rate / 2 / lr_mult, rate / 2), pct_start=pct_start, div_factor=div_factor, **options
        )

    @short_traceback
    def lr_find(
        self,
        start_lr: float = 1e-7,
        end_lr: float = 10.0,
        num_it: int = 100,
        *,
        sweep: str = "exponential",
        stop_div: bool = True,
    ) -> RateFinder:
        """Train `num_it` optimizer steps with a rate that rises from start_lr to end_lr (sweep="exponential" or
        "linear"), until the loss diverges unless `stop_div=False`: what rates can be used. Afterwards all is bit for
        bit as it was.
        """
        from learnkit.trials.lr_find import find_rate

        return find_rate(self, start_lr, end_lr, num_it, sweep=sweep, stop_div=stop_div)

    @short_traceback
    def fast_run(self) -> dict[str, float]:
        """One optimizer step and one batch of validation through everything, as a fit would: does it run? The values
        measured; afterwards all is bit for bit as it was. Callbacks that decide, write or draw do not take part.
        """
        from learnkit.trials.fast_run import fast_run

        return fast_run(self)

    @short_traceback
    def overfit_batches(self, n: int = 1, steps: int = 100, lr: Rate | None = None) -> list[float]:
        """Train `steps` steps on the same `n` batches: can it learn at all? The loss of each step, which should end
        near 0; afterwards all is bit for bit as it was.
        """
        from learnkit.trials.fast_run import overfit

        return overfit(self, n, steps, lr)

    @staticmethod
    def deterministic(*, warn_only: bool = False) -> AbstractContextManager[None]:
        """For the length of a with block torch computes deterministically, on GPUs too, or raises where it cannot."""
        from learnkit.devices.determinism import deterministic

        return deterministic(warn_only=warn_only)

    # --- evaluating ----------------------------------------------------------
    @short_traceback
    def validate(self, dl: Any = None) -> dict[str, float]:
        """{"valid_loss": …, metric: …} over all of `dl` (None: the data's valid_dl), in evaluation mode, without
        gradients. As with get_preds and predict, nothing is left of it: the global random states are as before.
        """
        kept = self.values
        self.values = {}
        try:
            with unmoved(self.device):
                evaluate(self, evaluation_loader(self, dl, "validate"), Measure(self.metrics, self.world_size))
            return self.values
        finally:
            self.values = kept

    @short_traceback
    def get_preds(self, dl: Any = None, with_loss: bool = False) -> tuple[Any, ...]:
        """(preds, targets[, losses]) of `dl` (None: valid_dl) on the CPU: dataset order, each sample once.

        `with_loss=True` adds each sample's own loss, float (samples,). Targets are None where batches have none.
        """
        dl = evaluation_loader(self, dl, "get_preds")
        collect = Collect(partial(each_loss, self.loss_func) if with_loss else None)
        with unmoved(self.device):
            evaluate(self, dl, collect)
        return collect.joined()

    @short_traceback
    def interpret(self, dl: Any = None) -> Interpretation:
        """What a classifier of pictures gets wrong in `dl` (None: valid_dl), and its pictures; all ranks have the
        whole.
        """
        from learnkit.vision.interpretation import interpret

        return interpret(self, dl)

    @short_traceback
    def tta(self, dl: Any = None, *, n: int = 4, beta: float = 0.5) -> tuple[Tensor, Any]:
        """(probabilities, targets) of `dl` (None: valid_dl): `beta` of them of the pictures as they are, the rest the
        mean over `n` versions with the training transforms (test-time augmentation).
        """
        from learnkit.vision.augmented import tta

        return tta(self, dl, n=n, beta=beta)

    @short_traceback
    def predict(self, x: Any) -> Any:
        """The prediction for one sample or for one batch of them, on the CPU; the model is in evaluation mode, without
        gradients.

        x: a tensor shaped like a batch's first input, or like one sample of it; a tuple for several inputs; a mapping.
        """
        first = next(iter(tensors_in(x)), None)
        if first is None:
            raise TypeError(f"predict takes a tensor, or a tuple or mapping of tensors; got {type(x).__name__}.")
        if self._input_ndim is None:
            self._see_first(first_batch(self.data.train_dl))
        ndim = self._input_ndim
        assert ndim is not None
        if first.ndim not in (ndim, ndim - 1):
            raise ValueError(
                f"predict was given an input of {first.ndim} dimensions (shape {tuple(first.shape)}), expected {ndim} "
                f"for a batch or {ndim - 1} for one sample."
            )
        single = first.ndim == ndim - 1
        batch = as_batch(x, single=single)
        collect = Collect(everywhere=True)
        with unmoved(self.device):
            evaluate(self, [batch if isinstance(batch, Mapping) else (*batch, None)], collect)
        preds = collect.joined()[0]
        return preds[0] if single and isinstance(preds, Tensor) else preds

    def plan_steps(self) -> None:
        """Set `n_steps` from the training loader as it is now."""
        self.n_steps, self.steps_ahead = planned_steps(self)

    @property
    def batches_per_step(self) -> int:
        """How many batches of the training loader an optimizer step learns from."""
        return math.prod(callback.batches_per_step for callback in self.running)

    @property
    def is_running(self) -> bool:
        """Whether a fit, validation or prediction is under way."""
        return self.stages is not None

    def where(self) -> str:
        """The place in the loop, for messages: "epoch 2, training batch 17"."""
        batch = (
            f", {'training' if self.training else 'validation'} batch {self.batch_index}"
            if self.batch_index >= 0
            else ""
        )
        rank = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        return f"epoch {self.epoch}{batch}{rank}"

    # --- callbacks -----------------------------------------------------------
    def add_callback(self, callback: Callback) -> Learner:
        """Add a callback for all fits to come."""
        if self.is_running:
            raise RuntimeError(
                f"{type(callback).__name__} was added while this Learner runs, when its hooks are already resolved. "
                "Add it before, or give it to fit(…, callbacks=[…])."
            )
        check_callbacks([*self.callbacks, callback])
        self.callbacks.append(callback)
        return self

    def remove_callback(self, callback: Callback | type[Callback]) -> Learner:
        """Remove a callback, or all of a class."""
        gone = [cb for cb in self.callbacks if cb is callback or (isinstance(callback, type) and type(cb) is callback)]
        if not gone:
            name = callback.__name__ if isinstance(callback, type) else type(callback).__name__
            raise ValueError(
                f"there is no {name} to remove; this Learner has "
                f"{', '.join(type(cb).__name__ for cb in self.callbacks)}."
            )
        self.callbacks = [cb for cb in self.callbacks if cb not in gone]
        return self

    def on(
        self, hook: str, *, every: int = 1, order: int = 0, in_trials: bool = True
    ) -> Callable[[Callable[..., Any]], Handle]:
        """Make a function a callback: `@learn.on("after_step", every=100)` above `def show(learn): …`, and
        `show.remove()` later.

        every       call it at each so-manieth step of the fit, batch of the pass, or epoch, whichever the hook is of
        order, in_trials    as a Callback's: low is first; whether it takes part in lr_find and the like
        """
        from learnkit.loop.decorator import attach_function, check_event

        check_event(hook, every)
        return lambda function: attach_function(self, hook, function, every=every, order=order, in_trials=in_trials)

    def hooks(self) -> HookTable:
        """Who runs when: print it."""
        return hook_table(sorted(self.callbacks, key=lambda callback: callback.order))

    @property
    def recorder(self) -> Recorder:
        """The callback that keeps losses, rates and metrics of the last fit."""
        from learnkit.callbacks.recorder import Recorder

        found = next((cb for cb in self.callbacks if isinstance(cb, Recorder)), None)
        if found is None:
            raise AttributeError("this Learner has no Recorder: it was removed.")
        return found

    @property
    def value_names(self) -> tuple[str, ...]:
        """The names that `values` has after an epoch, in order."""
        measured = (
            () if self.data.valid_dl is None else ("valid_loss", *(name for m in self.metrics for name in m.names))
        )
        return ("train_loss", *measured)

    @contextmanager
    def no_bar(self) -> Iterator[Learner]:
        """For the length of a with block: no progress bar; one plain line per epoch stays."""
        with self._quieted(bar=False):
            yield self

    @contextmanager
    def no_logging(self) -> Iterator[Learner]:
        """For the length of a with block: nothing is printed."""
        with self._quieted(bar=False, lines=False):
            yield self

    @contextmanager
    def _quieted(self, **switches: bool) -> Iterator[None]:
        from learnkit.callbacks.progress import Progress

        bars = [cb for cb in self.callbacks if isinstance(cb, Progress)]
        kept = [(cb, name, getattr(cb, name)) for cb in bars for name in switches]
        for cb, name, _ in kept:
            setattr(cb, name, switches[name])
        try:
            yield
        finally:
            for cb, name, value in kept:
                setattr(cb, name, value)

    # --- more processes ------------------------------------------------------
    def to_distributed(
        self,
        local_rank: int | str | None = None,
        *,
        algorithm: str | Callable[[Any, Any], Any] = "allreduce",
        period: int | None = None,
        warmup_steps: int | None = None,
        rank: int | None = None,
        sync_bn: bool = False,
        delay_allreduce: bool = False,
        timeout: float | None = None,
        hang_timeout: float | None = 600.0,
        **ddp_options: Any,
    ) -> Learner:
        """Train on all the processes that a launcher started (torchrun, torch.distributed.launch, SLURM, `launch`);
        alone, nothing.

        local_rank      this process's number on its machine; None: from the environment, or --local-rank on the command
                        line
        algorithm       "allreduce", "fp16", "bf16", "powersgd", "bytegrad" (8 bits), "local_sgd", "hierarchical",
                        "decentralized", or a communication hook of DDP, (state, bucket) -> future
        period          steps between two averages of the weights, of the last three; None: 4
        warmup_steps    of plain all-reduce before; None: 100 for local_sgd and hierarchical, 10 for powersgd, 0 for
                        decentralized
        rank            of powersgd's matrices; None: 1
        sync_bn         batch normalization over all ranks' samples while training
        delay_allreduce one reduction of all gradients after the backward pass, instead of several during it
        timeout         seconds for joining the group and for each collective; None: PyTorch's. Of no use to a group
                        that exists
        hang_timeout    seconds without any progress after which all processes end and say where they were; None: never
        ddp_options     DistributedDataParallel's own, such as find_unused_parameters=True

        A process group that exists is used and left alone; else one is made, and destroyed when the process ends. `bs`
        is per process. Fits, `validate` and `get_preds` have to be called by all ranks. Raises RuntimeError where the
        launcher's variables are incomplete, ValueError where the ranks have different models, TypeError for an unknown
        option.
        """
        from learnkit.callbacks.join import attach_distributed
        from learnkit.distributed.algorithms import as_algorithm

        chosen = as_algorithm(algorithm, period=period, warmup_steps=warmup_steps, rank=rank)
        return attach_distributed(
            self,
            local_rank,
            timeout=timeout,
            algorithm=chosen,
            sync_bn=sync_bn,
            delay_allreduce=delay_allreduce,
            hang_timeout=hang_timeout,
            **ddp_options,
        )

    def to_fsdp(
        self,
        local_rank: int | str | None = None,
        *,
        blocks: Any = (),
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        mixed_precision: Any = None,
        timeout: float | None = None,
        hang_timeout: float | None = 600.0,
    ) -> Learner:
        """Train on all the processes that a launcher started, each of which holds its part only of weights, gradients
        and optimizer states (ZeRO-3, Rajbhandari et al., 2020), by PyTorch's fully_shard; alone, nothing.

        local_rank, timeout, hang_timeout   as in `to_distributed`
        blocks          what is gathered at a time, while the rest stays spread: a class such as
                        nn.TransformerEncoderLayer, a module's name (of a ModuleList or Sequential: each member), or
                        several; the next one comes while one is computed. (): all
        activation_checkpointing    compute each block's activations anew in the backward pass, instead of keeping them
        cpu_offload     keep weights, gradients and optimizer states in the CPU's memory, and step there
        mixed_precision torch.bfloat16: gather and compute in it, reduce in float32; or a
        torch.distributed.fsdp.MixedPrecisionPolicy

        The model is spread for good. One that was built on the meta device is given its weights by each module's
        `reset_parameters`, drawn from rank 0's random state: see `init_process_group(seed=…)`. Files and checkpoints
        are those of a plain model. Besides fits, `validate` and `get_preds`, all ranks have to call `predict`, `save`,
        `load` and `summary`.
        """
        from learnkit.callbacks.join import attach_fully_sharded

        return attach_fully_sharded(
            self,
            local_rank,
            timeout=timeout,
            hang_timeout=hang_timeout,
            blocks=blocks,
            activation_checkpointing=activation_checkpointing,
            cpu_offload=cpu_offload,
            mixed_precision=mixed_precision,
        )

    # --- precision and speed -------------------------------------------------
    def to_bf16(self, *, pure: bool = False) -> Learner:
        """Compute in bfloat16, by autocast, with the weights kept in float32; on the CPU too.

        `pure`: cast the weights and inputs whole, batch norm excepted, instead of operation by operation.
        """
        return self._to_half(torch.bfloat16, pure=pure)

    def to_fp16(self, *, pure: bool = False, init_scale: float = 2.0**16, growth_interval: int = 2000) -> Learner:
        """Compute in float16, by autocast, with the weights kept in float32 and the loss scaled; a step whose gradients
        overflow is skipped, and moves nothing. The options are those of torch.amp.GradScaler; `pure` as in
        `to_bf16`.
        """
        return self._to_half(torch.float16, pure=pure, init_scale=init_scale, growth_interval=growth_interval)

    def to_fp32(self, *, tf32: bool | None = None) -> Learner:
        """Compute in float32 (again). `tf32`: whether matrix products and convolutions on CUDA devices may round their
        inputs to TensorFloat-32, for the whole process; None leaves PyTorch's settings alone.
        """
        from learnkit.callbacks.mixed_precision import MixedPrecision

        self._replace(MixedPrecision)
        if tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        return self

    def _to_half(self, dtype: torch.dtype, **options: Any) -> Learner:
        from learnkit.callbacks.mixed_precision import MixedPrecision

        if not options["pure"]:
            check_autocast(self.device, dtype)
        return self._replace(MixedPrecision, MixedPrecision(dtype, **options))

    def to_channels_last(self, *, cudnn_benchmark: bool | None = None) -> Learner:
        """Lay the weights of convolutions, and every batch of pictures, out with their channels last in memory.

        `cudnn_benchmark`: whether cuDNN tries its algorithms out for each new shape and keeps the fastest, for the
        whole process; None leaves PyTorch's setting (off) alone.
        """
        from learnkit.callbacks.channels_last import ChannelsLast

        self._replace(ChannelsLast, ChannelsLast())
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if cudnn_benchmark is not None:
            torch.backends.cudnn.benchmark = cudnn_benchmark
        return self

    def compile(self, **options: Any) -> Learner:
        """Compile the model in place, at its first batch; the names of its parameters stay as they are.

        `options` are torch.compile's, such as mode="max-autotune". It is compiled once for training and once for
        evaluation: a batch of another size than the first goes through the model as it was written, unless
        dynamic=True.
        """
        from learnkit.callbacks.compiled import Compiled

        self._replace(Compiled, *([] if options.get("dynamic") else [Compiled()]))
        self.model.compile(**options)
        return self

    def _replace(self, kind: type[Callback], *callbacks: Callback) -> Learner:
        """Callbacks in the place of those of a kind."""
        if self.is_running:
            raise RuntimeError("a to_* method was called while this Learner runs: call it before.")
        self.callbacks = [cb for cb in self.callbacks if type(cb) is not kind]
        for callback in callbacks:
            self.add_callback(callback)
        return self

    @short_traceback
    def batch_size_find(self, max_bs: int = 65536, *, n_steps: int = 2) -> int:
        """The largest batch size, a power of two, with which `n_steps` optimizer steps fit into memory; `max_bs` at
        most. On several ranks the largest that fits on all. Batches are copies of the first one's samples; the Learner
        is left bit-identical.
        """
        from learnkit.trials.batch_size import find

        return find(self, check_count("max_bs", max_bs), check_count("n_steps", n_steps))

    # --- layer groups --------------------------------------------------------
    def freeze(self) -> Learner:
        """Train the last layer group only."""
        return self.freeze_to(-1)

    def unfreeze(self) -> Learner:
        """Train every layer group."""
        return self.freeze_to(0)

    def freeze_to(self, n: int) -> Learner:
        """Freeze the first n layer groups (all but the last -n, if negative); train the others. Batch norm's running
        statistics still follow the data."""
        groups = layer_groups(self.model, self.splitter)
        if len(groups) == 1 and n != 0:
            raise ValueError(
                "the model is one layer group, so there is nothing to freeze: give Learner(…, splitter=…), for example "
                "splitter=lambda model: [model.body, model.head]."
            )
        if not -len(groups) < n < len(groups):
            raise ValueError(
                f"freeze_to({n}): the model has {len(groups)} layer groups, so n is between {1 - len(groups)} and "
                f"{len(groups) - 1}."
            )
        for i, group in enumerate(groups):
            for p in group:
                p.requires_grad_(i >= n % len(groups))
        return self

    # --- files ---------------------------------------------------------------
    def save(self, name: str, with_opt: bool = True) -> Path:
        """Write the model's state (and the optimizer's) to path/model_dir/name.pt, at once or not at all; return the
        path.

        On several ranks rank 0 writes; the others that call it wait for that, and raise where it fails. After `to_fsdp`
        all must call it.
        """
        path = self.path / self.model_dir / as_path(f"{name}.pt")
        with self.saved_weights():
            state: dict[str, Any] = {"model": whole_on_main(plain_state(self.model), self.rank)}
            if with_opt and self.opt is not None:
                state["opt"] = whole_on_main(self.opt.state_dict(), self.rank)
            self.ranks.on_main(lambda: write_weights(path, state), f"write {path}")
        return path

    def load(self, name: str, strict: bool = True) -> Learner:
        """Take back what `save` wrote. Refuses a file that does not fit, with all differences, before anything is
        changed; `strict=False` takes what fits. Nothing in the file is executed.
        """
        state = read_for(self, self.path / self.model_dir / as_path(f"{name}.pt"))
        fits = "opt" in state and optimizer_fits(optimizer_of(self), state["opt"])
        if strict and "opt" in state and not fits:
            raise ValueError(
                f"the file's optimizer state is not one of this {type(self.opt).__name__} and these parameters; "
                f"nothing was loaded. Use the same opt_func and splitter, or strict=False, which takes the model alone."
            )
        model = state.get("model", state)
        load_model(self.model, model, strict=strict)
        if fits:
            load_optimizer(self.opt, state["opt"], same_dtypes=has_same_dtypes(self.model, model))
        return self

    def export(self, path: str | Path, *, stats: Any = None) -> Path:
        """Write the model for inference without its data and code: to a .pt2 (torch.export), .onnx, or .safetensors
        file (weights alone).

        `stats`: (means, standard deviations) by which pictures in [0, 1] are normalized; None: the data's. Rank 0
        writes. The file is compared with the model before it gets its name; `load_learner(path)` reads it.
        """
        from learnkit.export.write import export_model

        return export_model(self, path, stats)

    @short_traceback
    def summary(self) -> str:
        """A table of the model's layers: output shape, parameters, and whether they are trained. Print it."""
        from learnkit.trials.summary import summarize

        return summarize(self)


def version_of(value: Any) -> int | None:
    """By which a change in place of a tensor is seen; None of what has none."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def as_data(data: Any) -> DataBunch:
    if isinstance(data, DataBunch):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2:
        return DataBunch(*data)
    raise TypeError(f"data is {type(data).__name__}, expected a DataBunch or a pair (train_dl, valid_dl).")
