"""Training in bfloat16 or float16: autocast, or weights cast whole, and the scaled loss that float16 needs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from learnkit.callbacks.distributed import Distributed
from learnkit.devices.accelerator import can_float64
from learnkit.devices.nested import as_float32, map_tensors
from learnkit.hooks import Callback, Run, SkipStep
from learnkit.learner import Learner

SMALLEST_SCALE = 2.0**-14  # of the loss: gradients that overflow even then are not finite at any


class MixedPrecision(Callback):
    """Compute in `dtype`, torch.bfloat16 or torch.float16, and keep the weights in float32.

    dtype       float16 scales the loss (Micikevicius et al., 2018), by torch.amp.GradScaler. A step whose gradients
                overflow is skipped: schedules, counters and averages stand still
    pure        cast the weights and inputs whole, batch norm excepted (Apex's O2), instead of operation by operation
                (autocast, O1)
    init_scale, growth_interval     GradScaler's: the first scale, and the steps after which it doubles

    Validation and predictions are computed so too, and given as float32. `scales` has the scale of every step that was
    tried, `skips` the numbers of steps at which one was skipped. float16 reads the device once a step. What `to_bf16()`
    and `to_fp16()` add.

    >>> learn.to_bf16()  # doctest: +SKIP
    """

    order = Distributed.order + 50
    unique = True

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        *,
        pure: bool = False,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype}: expected torch.bfloat16 or torch.float16.")
        if not init_scale > 0:
            raise ValueError(f"init_scale={init_scale}: expected a number above 0.")
        self.dtype, self.pure = dtype, pure
        self.init_scale, self.growth_interval = init_scale, growth_interval
        # None: bfloat16 needs none
        self.scaler: torch.amp.GradScaler | None = None  # type: ignore[reportPrivateImportUsage]
        self.scales: list[float] = []
        self.skips: list[int] = []
        self.autocast: Any = None

    # --- forward -------------------------------------------------------------
    def around_forward(self, learn: Learner, run: Run) -> None:
        if self.pure:
            run()
        else:
            if self.autocast is None:
                self.autocast = torch.autocast(learn.device.type, self.dtype)  # type: ignore[reportPrivateImportUsage]
            with self.autocast:
                run()
        if not learn.training:
            learn.pred = map_tensors(as_float32, learn.pred)

    def around_validate(self, learn: Learner, run: Run) -> None:
        if not self.pure:
            return run()
        model, learn.evaluated_model = learn.evaluated_model, InHalf(learn.evaluated_model, self.dtype).eval()
        try:
            run()
        finally:
            learn.evaluated_model = model

    # --- a fit ---------------------------------------------------------------
    def around_fit(self, learn: Learner, run: Run) -> None:
        differentiate, model = learn.differentiate, learn.training_model
        self.scales, self.skips = [], []
        if self.dtype == torch.float16:
            self.scaler = self.next_scaler(learn)
            learn.differentiate = self.differentiate_scaled
        if self.pure:
            learn.training_model = InHalf(model, self.dtype)
        try:
            run()
        finally:
            learn.differentiate, learn.training_model = differentiate, model

    def next_scaler(self, learn: Learner) -> torch.amp.GradScaler:  # type: ignore[reportPrivateImportUsage]
        """One for this fit, with the scale where the last one left it: what is only tried out leaves that one as it
        was.
        """
        scaler = torch.amp.GradScaler(
            learn.device.type,
            init_scale=self.init_scale,  # type: ignore[reportPrivateImportUsage]
            growth_interval=self.growth_interval,
        )
        if self.scaler is not None:
            scaler.load_state_dict(self.scaler.state_dict())
        return scaler

    def differentiate_scaled(self, loss: Tensor) -> None:
        assert self.scaler is not None
        self.scaler.scale(loss).backward()

    def around_step(self, learn: Learner, run: Run) -> None:
        if self.scaler is None or all(p.grad is None for group in learn.opt.param_groups for p in group["params"]):
            return run()
        self.unscale(learn)
        try:
            if self.overflows(learn):
                learn.zero_grad()
                raise SkipStep
            run()
        finally:
            self.scaler.update()

    def unscale(self, learn: Learner) -> None:
        scaler: Any = self.scaler
        scale, kind = scaler._scale, learn.device.type
        if kind == "mps" or can_float64(learn.device):
            return scaler.unscale_(learn.opt)
        # torch takes the reciprocal in float64 on every other device (2.15). The scales are powers of two where
        # init_scale is one: that of a float32 is as exact.
        state = scaler._per_optimizer_states[id(learn.opt)]
        found = torch.zeros((), device=scale.device)
        state["found_inf_per_device"] = scaler._unscale_grads_(learn.opt, scale.reciprocal(), found, False)
        state["stage"] = OptState.UNSCALED

    def overflows(self, learn: Learner) -> bool:
        """Whether the unscaled gradients are not all finite, on any rank; reads the device, once."""
        scaler: Any = self.scaler
        found = [flag.to(learn.device) for flag in scaler._found_inf_per_device(learn.opt).values()]
        *flags, scale = torch.stack([*found, scaler._scale]).tolist()
        self.scales.append(scale)
        overflow = any(flags)
        if learn.ranks.apart and learn.ranks.agree(overflow) != overflow:
            overflow = True  # another rank's own gradients: all skip the step, and lower the scale
            for flag in scaler._found_inf_per_device(learn.opt).values():
                flag.fill_(1.0)
        if not overflow:
            return False
        self.skips.append(learn.step)
        if scale <= SMALLEST_SCALE:
            raise FloatingPointError(
                f"the gradients are not finite, with the loss scaled by {scale:g} as with larger scales, "
                f"{learn.where()}. Look at the loss and the data for NaN, lower the rate, or use to_bf16()."
            )
        return True

    # --- checkpoints ---------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"scaler": scaler, "scales": torch.tensor(self.scales, dtype=torch.float64), "skips": list(self.skips)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scales, self.skips = state["scales"].tolist(), list(state["skips"])
        if (state["scaler"] is None) != (self.scaler is None):
            raise ValueError(
                f"the checkpoint is of a fit {'without' if state['scaler'] is None else 'with'} a scaled loss, which "
                f"this fit in {str(self.dtype).removeprefix('torch.')} is not: resume it in the same precision."
            )
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


class InHalf(nn.Module):
    """A module whose weights, buffers and inputs are cast for each call, batch norm's excepted; its outputs are
    float32.

    Gradients arrive at the module's own weights, in their precision.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype
        self.is_compiled = any(part._compiled_call_impl is not None for part in module.modules())
        spared = {
            f"{prefix}." if prefix else "" for prefix, part in module.named_modules() if isinstance(part, _BatchNorm)
        }
        self.parameter_names = [name for name, p in module.named_parameters() if is_cast(name, p, spared)]
        self.buffer_names = [name for name, b in module.named_buffers() if is_cast(name, b, spared)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        cast = {name: own[name].to(self.dtype) for name in (*self.parameter_names, *self.buffer_names)}
        with quietly() if self.is_compiled else nullcontext():
            outputs = functional_call(
                self.module, cast, map_tensors(self.to_half, args), map_tensors(self.to_half, kwargs)
            )
        return map_tensors(as_float32, outputs)

    def to_half(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.dtype == torch.float32 else tensor


@contextmanager
def quietly() -> Iterator[None]:
    """The compiler asks the cast weights for their gradients (torch 2.15), and PyTorch warns that they have none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        yield


def is_cast(name: str, tensor: Tensor, spared: set[str]) -> bool:
    return tensor.dtype == torch.float32 and not any(
        name.startswith(prefix) and "." not in name[len(prefix) :] for prefix in spared
    )
