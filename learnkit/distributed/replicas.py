"""A Learner's whole model on every rank, during a fit in DistributedDataParallel."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from learnkit.distributed.batchnorm import restore_batchnorm
from learnkit.distributed.prepare import gradient_order_of, parameter_names, prepare_model
from learnkit.distributed.weights import average_gradients

if TYPE_CHECKING:
    from learnkit.learner import Learner

EXAMPLES = ("bucket_cap_mb", "find_unused_parameters", "gradient_as_bucket_view", "static_graph")
BETWEEN_FITS = (
    "With algorithm=…, with pure=True, or between the batches of one step, the model cannot be wrapped in DDP again: "
    "do it between two fits, or with GradualUnfreezing."
)

is_trained = attrgetter("requires_grad")


class Replicas:
    """The model of a Learner and its DDP wrapper. `parameters` and `trained` are [] outside a fit."""

    def __init__(self, *, sync_bn: bool = False, **ddp_options: Any) -> None:
        check_options(ddp_options)
        self.sync_bn, self.ddp_options = sync_bn, ddp_options
        # In a fit:
        self.wrapper: nn.Module | None = None  # DDP, or the model itself where nothing is trained
        # raises RuntimeError where DDP still waits for gradients after a backward pass
        self.check: Callable[[], None] | None = None
        self.names: list[str] = []  # of the model's parameters
        self.parameters: list[nn.Parameter] = []
        self.trained: list[bool] = []  # whether DDP has each of them

    @contextmanager
    def wrapped(self, learn: Learner) -> Iterator[None]:
        before = learn.no_sync, learn.reduce_gradients, learn.gradient_order
        self.names, self.parameters = map(list, zip(*learn.model.named_parameters(), strict=True))
        try:
            self.wrap(learn, gradient_order=(learn.resumed or {}).get("gradient_order", ()))
            learn.reduce_gradients = lambda: average_gradients(learn.model.parameters())
            yield
        finally:
            unwrap(learn)
            self.wrapper, self.check, self.names, self.parameters, self.trained = None, None, [], [], []
            learn.no_sync, learn.reduce_gradients, learn.gradient_order = before

    def wrap(self, learn: Learner, **options: Any) -> None:
        self.trained = [*map(is_trained, self.parameters)]
        ddp = self.wrapper = learn.training_model = prepare_model(
            learn.model, device=learn.device, sync_bn=self.sync_bn, **{**self.ddp_options, **options}
        )
        learn.gradient_order = partial(gradient_order_of, ddp)
        if not isinstance(ddp, DistributedDataParallel):
            return
        learn.no_sync = refused_static_graph if self.ddp_options.get("static_graph") else ddp.no_sync
        waits = not (self.ddp_options.get("find_unused_parameters") or self.ddp_options.get("static_graph"))
        self.check = ddp.reducer._check_reducer_finalized if waits else None

    def wrap_again(self, learn: Learner) -> None:
        """After some parameters were frozen or unfrozen on all ranks: DDP takes those that are trained when it is
        made.
        """
        if learn.n_held or learn.training_model is not self.wrapper or learn.asked_of_ddp.startswith("algorithm"):
            raise self.changed(BETWEEN_FITS)
        if isinstance(self.wrapper, DistributedDataParallel):
            self.wrapper._remove_autograd_hooks()
        self.check = None
        order: Sequence[str] = ()
        if learn.resumed is not None and learn.resumed["step"] == learn.step:
            order = learn.resumed["gradient_order"]  # as the interrupted run knew it
        self.wrap(learn, init_sync=False, gradient_order=order)

    def changed(self, advice: str) -> ValueError:
        names = [
            name
            for name, p, was in zip(self.names, self.parameters, self.trained, strict=True)
            if p.requires_grad is not was
        ]
        return ValueError(
            f"{len(names)} parameters were frozen or unfrozen during the fit: {listed_names(names)}. {advice}"
        )

    def name_unused(self, error: RuntimeError) -> None:
        """Raise an error that names the parameters without a gradient: DDP would wait for them, or fail one step later
        without their names.
        """
        match = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if match is None or not isinstance(self.wrapper, DistributedDataParallel):
            return
        names, in_order = parameter_names(self.wrapper.module), self.wrapper._build_params_for_reducer()[0]
        unused = [names[id(in_order[int(number)])] for number in match[1].split()]
        raise ValueError(
            f"{len(unused)} parameters got no gradient: {listed_names(unused)}. DDP waits for every parameter in each "
            f"step: take them out of the model, freeze them, or use learn.to_distributed(find_unused_parameters=True)."
        ) from error


def unwrap(learn: Learner) -> None:
    """Take DDP off the model; without its hooks, the model can be trained alone or wrapped again."""
    if isinstance(learn.training_model, DistributedDataParallel):
        learn.training_model._remove_autograd_hooks()
    restore_batchnorm(learn.model)
    learn.training_model = learn.model


def check_options(ddp_options: dict[str, Any]) -> None:
    known = list(inspect.signature(DistributedDataParallel).parameters)
    unknown = [name for name in ddp_options if name not in known or name in ("module", "device_ids", "output_device")]
    if unknown:
        raise TypeError(
            f"to_distributed got {', '.join(unknown)}: expected local_rank, algorithm, sync_bn, delay_allreduce, "
            f"timeout, hang_timeout, or an option of DistributedDataParallel such as "
            f"{', '.join(n for n in known if n in EXAMPLES)}."
        )


def refused_static_graph() -> AbstractContextManager[Any]:
    raise ValueError(
        "static_graph=True, with which DDP reduces gradients in every backward pass, cannot be combined with what "
        "keeps them on their rank for a while: Accumulate, AutoMicrobatch or delay_allreduce. Leave static_graph out."
    )


def listed_names(names: list[str]) -> str:
    return ", ".join([*names[:8], *(["…"] if len(names) > 8 else [])])
