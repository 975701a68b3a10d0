"""How ranks get the same weights: DDP's communication hooks, and averages of weights, all of them PyTorch's own."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from learnkit.distributed.weights import means
from learnkit.distributed.world import get_local_world_size, get_world_size
from learnkit.optim.state import load_optimizer

Hook = Callable[[Any, Any], Any]
NAMES = ("allreduce", "fp16", "bf16", "powersgd", "bytegrad", "local_sgd", "hierarchical", "decentralized")
AVERAGING = ("local_sgd", "hierarchical", "decentralized")
ABSENT = {
    "qadam": "quantized Adam",
    "async": "asynchronous averaging",
    "low_precision_decentralized": "decentralized averaging in low precision",
}


class Algorithm(NamedTuple):
    """The options of `to_distributed(algorithm=…)`.

    Args:
        name: one of NAMES, or "hook".
        hook: a DDP communication hook, if `name` is "hook".
        period: steps between two averages of the weights, for algorithms that average.
        warmup_steps: steps of plain all-reduce before it begins.
        rank: the rank of powersgd's matrices.
    """

    name: str = "allreduce"
    hook: Hook | None = None
    period: int = 4
    warmup_steps: int = 0
    rank: int = 1

    @property
    def averages(self) -> bool:
        return self.name in AVERAGING

    @property
    def keeps_own(self) -> bool:
        """Whether ranks keep something that differs between them from one step to the next."""
        return self.averages or self.name == "powersgd"


def as_algorithm(
    algorithm: str | Hook, *, period: int | None = None, warmup_steps: int | None = None, rank: int | None = None
) -> Algorithm:
    """Check the options; raises ValueError for an unknown name, with the known ones, and for options of other
    algorithms.
    """
    if not isinstance(algorithm, str):
        if not callable(algorithm):
            raise TypeError(
                f"algorithm={algorithm!r}, expected one of {', '.join(NAMES)}, or a hook (state, bucket) -> future."
            )
        name, hook = "hook", algorithm
    else:
        name, hook = algorithm, None
    if name in ABSENT:
        raise ValueError(f"algorithm={name!r}: PyTorch has no engine for {ABSENT[name]}. It has {', '.join(NAMES)}.")
    if hook is None and name not in NAMES:
        raise ValueError(
            f"algorithm={name!r} is unknown: expected one of {', '.join(NAMES)}, or a DDP communication hook."
        )
    for option, value, takers in (
        ("period", period, AVERAGING),
        ("rank", rank, ("powersgd",)),
        ("warmup_steps", warmup_steps, ("powersgd", "local_sgd", "hierarchical", "decentralized")),
    ):
        if value is None:
            continue
        if name not in takers:
            raise ValueError(
                f"{option}={value} has no meaning for algorithm={name!r}: it is an option of {', '.join(takers)}."
            )
        least = 0 if option == "warmup_steps" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{option}={value!r}: expected a whole number, {least} or more.")
    warmup = (
        {"powersgd": 10, "local_sgd": 100, "hierarchical": 100}.get(name, 0) if warmup_steps is None else warmup_steps
    )
    return Algorithm(name, hook, period or 4, warmup, rank or 1)


class Communication:
    """An algorithm applied to one model in DistributedDataParallel: the state of its hook, and the averager of its
    weights.
    """

    def __init__(self, algorithm: Algorithm, ddp: DistributedDataParallel, *, step: int = 0) -> None:
        """`step`: steps that were done before, for example by one rank alone; they count as warm-up."""
        self.algorithm, self.parameters = algorithm, list(ddp.module.parameters())
        self.state = algorithm_state(algorithm)
        self.averager = averager_of(algorithm) if algorithm.averages else None
        if self.averager is not None:
            self.averager.step = self.state.iter = step
        elif isinstance(self.state, PowerSGD):
            self.state.state.iter = step
        self.n_followed = 0  # optimizers whose steps it follows
        hook = hook_of(algorithm, self.state)
        if hook is not None:
            ddp.register_comm_hook(self.state, hook)

    def follow(self, optimizer: Optimizer) -> Callable[[], None]:
        """Average the weights after this optimizer's steps, if the algorithm does so; returns a function to end it."""
        if self.averager is None:
            return lambda: None
        self.n_followed += 1
        # torch averages weights that have a gradient, so before gradients are set to None.
        return optimizer.register_step_post_hook(self.after_step).remove

    def close(self) -> None:
        """Destroy the groups of some ranks that were made for it, which PyTorch would keep as long as all ranks'."""
        levels = getattr(self.averager, "period_process_group_dict", None) or {}  # of the hierarchical one alone
        for group in (getattr(self.state, "subgroup", None), *levels.values()):
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert self.averager is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        memory = [p.data for p in parameters]
        self.averager.average_parameters(parameters)
        if parameters[0].data_ptr() != memory[0].data_ptr():
            # PyTorch puts views of one flat tensor in their place, which are contiguous: channels last would be lost.
            for p, own in zip(parameters, memory, strict=True):
                p.data = own.copy_(p.data)

    @torch.no_grad()
    def average_now(self) -> None:
        """Put the mean of the weights on all ranks, for an evaluation or a file. With algorithms that do not average,
        they are the same already.
        """
        if self.averager is None:
            return
        for p, value in zip(self.parameters, means(self.parameters), strict=True):
            p.copy_(value)

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """What this rank keeps from step to step: PowerSGD's errors, or its own weights and optimizer state. It differs
        between ranks.
        """
        if isinstance(self.state, PowerSGD):
            return {"powersgd": self.state.state_dict(self.parameters)}
        if self.averager is None:
            return {}
        return {
            "iter": self.state.iter,
            "step": self.averager.step,
            "weights": [p.detach() for p in self.parameters],
            "optimizer": optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        if isinstance(self.state, PowerSGD):
            self.state.load_state_dict(state["powersgd"], self.parameters)
        elif self.averager is not None:
            self.state.iter, self.averager.step = state["iter"], state["step"]
            put_weights(self.parameters, state, optimizer)


def put_weights(parameters: Sequence[Tensor], state: dict[str, Any], optimizer: Optimizer) -> None:
    """A rank's own weights between two averages, and their optimizer's state."""
    for p, value in zip(parameters, state["weights"], strict=True):
        p.data.copy_(value)
    load_optimizer(optimizer, state["optimizer"])


def hook_of(algorithm: Algorithm, state: Any) -> Hook | None:
    """The communication hook to register; None: DDP's own all-reduce."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    if algorithm.hook is not None:
        return algorithm.hook
    if algorithm.name == "fp16":
        return default_hooks.fp16_compress_hook
    if algorithm.name == "bf16":
        return default_hooks.bf16_compress_hook
    if algorithm.name == "bytegrad":
        from torch.distributed.algorithms.ddp_comm_hooks.quantization_hooks import quantization_pertensor_hook

        return each_waited_for(quantization_pertensor_hook)
    if algorithm.name == "powersgd":
        return state.hook
    if algorithm.averages:
        from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import post_localSGD_hook

        return post_localSGD_hook
    return None


def algorithm_state(algorithm: Algorithm) -> Any:
    """What the hook keeps from step to step."""
    if algorithm.name in ("fp16", "bf16", "bytegrad"):
        return dist.group.WORLD
    if algorithm.name == "powersgd":
        return PowerSGD(algorithm)
    if not algorithm.averages:
        return None
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

    # Not for hierarchical: its averages within the machine would be of weights that are equal already.
    groups = machine_group() if algorithm.name == "local_sgd" else None
    return PostLocalSGDState(
        process_group=None,
        subgroup=groups,
        start_localSGD_iter=algorithm.warmup_steps,
        post_local_gradient_allreduce=groups is not None,
    )


def averager_of(algorithm: Algorithm) -> Any:
    """What averages the weights every `period` steps."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager

    n_local, n = get_local_world_size(), get_world_size()
    if algorithm.name != "hierarchical" or n_local in (1, n):
        return PeriodicModelAverager(algorithm.period, algorithm.warmup_steps)
    levels = OrderedDict([(algorithm.period, n_local), (4 * algorithm.period, n)])
    return HierarchicalModelAverager(period_group_size_dict=levels, warmup_steps=algorithm.warmup_steps)


def machine_group() -> Any:
    """This machine's ranks, whose gradients are averaged in every step; None with one machine, or with one rank on each
    machine.
    """
    n_local, n = get_local_world_size(), get_world_size()
    if n_local in (1, n) or n % n_local:
        return None
    return dist.new_subgroups(group_size=n_local)[0]


def each_waited_for(hook: Hook) -> Hook:
    """Wait for each bucket's hook: hooks of several collectives hang or abort on gloo with more than one bucket."""

    def waiting(state: Any, bucket: GradBucket) -> Any:
        future = hook(state, bucket)
        future.wait()
        return future

    waiting.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[torch.Tensor]}
    return waiting


class PowerSGD:
    """torch's PowerSGD with a memory that can be saved: by parameter, because DDP changes its buckets after a fit's
    first step.

    Each rank has its own errors; the matrices are the same on all ranks.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

        # With 0, the default, a layer with gradient 0 gets NaN.
        self.state = PowerSGDState(
            None,
            matrix_approximation_rank=algorithm.rank,
            start_powerSGD_iter=max(2, algorithm.warmup_steps),
            orthogonalization_epsilon=1e-8,  # type: ignore[arg-type]
        )
        self.compress = each_waited_for(powerSGD_hook)
        self.layouts: dict[int, Sequence[Tensor]] = {}  # bucket -> its parameters, in the current memory
        self.errors: dict[int, Tensor] = {}  # by id of the parameter, of earlier layouts
        self.qs: dict[int, Tensor] = {}
        self.hook = self.hook_of_ddp()

    def hook_of_ddp(self) -> Hook:
        def hook(state: Any, bucket: GradBucket) -> Any:
            parameters = bucket.parameters()
            if not same(parameters, self.layouts.get(bucket.index())):
                self.lay_out(bucket, parameters)
            return self.compress(self.state, bucket)

        hook.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[torch.Tensor]}
        return hook

    def lay_out(self, bucket: GradBucket, parameters: Sequence[Tensor]) -> None:
        """Bring the memory into the order of a bucket that is new or has changed."""
        self.take_apart()
        self.layouts[bucket.index()] = parameters
        if any(id(p) in self.errors for p in parameters):
            self.state.error_dict[bucket.index()] = torch.cat(
                [self.errors.get(id(p), torch.zeros_like(p)).flatten() for p in parameters]
            )
        compressed = self.compressed(parameters)
        if compressed and all(id(p) in self.qs for p in compressed):
            self.state.q_memory_dict[bucket.index()] = torch.cat([self.qs[id(p)].flatten() for p in compressed])
            self.state.p_memory_dict[bucket.index()] = torch.cat(
                [p.new_empty(self.rank_of(p) * len(p)) for p in compressed]
            )

    def take_apart(self) -> None:
        """Store the memory of all buckets by parameter."""
        for index, parameters in self.layouts.items():
            if index in self.state.error_dict:
                parts = self.state.error_dict[index].split([p.numel() for p in parameters])
                self.errors |= {id(p): part.view_as(p).clone() for p, part in zip(parameters, parts, strict=True)}
            compressed = self.compressed(parameters)
            if index in self.state.q_memory_dict:
                parts = self.state.q_memory_dict[index].split(
                    [self.rank_of(p) * (p.numel() // len(p)) for p in compressed]
                )
                self.qs |= {id(p): part.clone() for p, part in zip(compressed, parts, strict=True)}

    def compressed(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The parameters that it compresses, in the order of its memory: grouped by shape, in order of first use."""
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _should_compress

        by_shape: dict[Any, list[Tensor]] = defaultdict(list)
        for p in parameters:
            n, m = len(p) if p.ndim else 1, p.numel() // (len(p) if p.ndim else 1)
            if _should_compress(n, m, min(n, m, self.state.matrix_approximation_rank), self.state.min_compression_rate)[
                0
            ]:
                by_shape[n, m].append(p)
        return [p for group in by_shape.values() for p in group]

    def rank_of(self, p: Tensor) -> int:
        return min(len(p), p.numel() // len(p), self.state.matrix_approximation_rank)

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        self.take_apart()
        return {
            "iter": self.state.iter,
            "errors": [self.errors.get(id(p)) for p in parameters],
            "qs": [self.qs.get(id(p)) for p in parameters],
        }

    def load_state_dict(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        self.state.iter, self.layouts = state["iter"], {}
        for own, given in ((self.errors, state["errors"]), (self.qs, state["qs"])):
            own.clear()
            own.update(
                {id(p): value.to(p.device) for p, value in zip(parameters, given, strict=True) if value is not None}
            )


def same(a: Sequence[Tensor], b: Sequence[Tensor] | None) -> bool:
    return b is not None and len(a) == len(b) and all(p is q for p, q in zip(a, b, strict=True))
