"""Training in bfloat16 or float16: autocast or cast weights, and the loss scaling that float16 needs."""

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

SMALLEST_SCALE = 2.0**-14  # loss scale; gradients that overflow even at this one are not finite at any scale


class MixedPrecision(Callback):
    """Compute in bfloat16 or float16, and keep the weights in float32; `to_bf16()` and `to_fp16()` add this callback.

    Validation and predictions are computed in the same precision; their outputs are float32. float16 reads from the
    device once per step.

    Args:
        dtype: torch.bfloat16 or torch.float16. float16 scales the loss (Micikevicius et al., 2018) with
            torch.amp.GradScaler. A step whose gradients overflow is skipped: schedules, counters and averages do not
            change.
        pure: cast all weights and inputs except those of batch norm (Apex's O2), instead of casting in each operation
            (autocast, O1).
        init_scale: GradScaler's first scale.
        growth_interval: GradScaler's number of steps after which the scale doubles.

    Attributes:
        scales: the loss scale of every attempted step, with float16.
        skips: numbers of the steps at which a step was skipped.

    Raises:
        ValueError: when `dtype` is another one, or `init_scale` is not above 0.
        FloatingPointError: in a step, when the gradients are not finite even with the smallest loss scale, 2⁻¹⁴.

    Example:
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
        # None for bfloat16, which needs no scaling
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
        """Return a new scaler for this fit, which begins with the last fit's scale. The last fit's scaler stays
        unchanged, as trial runs require.
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
        # On every other device torch computes the reciprocal in float64 (2.15), which this device does not have. The
        # scales are powers of two if init_scale is one; the reciprocal in float32 is then just as exact.
        state = scaler._per_optimizer_states[id(learn.opt)]
        found = torch.zeros((), device=scale.device)
        state["found_inf_per_device"] = scaler._unscale_grads_(learn.opt, scale.reciprocal(), found, False)
        state["stage"] = OptState.UNSCALED

    def overflows(self, learn: Learner) -> bool:
        """Whether some unscaled gradients are not finite, on any rank; reads from the device, once."""
        scaler: Any = self.scaler
        found = scaler._found_inf_per_device(learn.opt).values()
        *flags, scale = torch.stack([*(flag.to(learn.device) for flag in found), scaler._scale]).tolist()
        self.scales.append(scale)
        overflow = any(flags)
        if learn.ranks.apart and learn.ranks.agree(overflow) != overflow:
            overflow = True  # another rank's own gradients: all skip the step, and lower the scale
            for flag in found:
                flag.fill_(1.0)
        if not overflow:
            return False
        self.skips.append(learn.step)
        if scale <= SMALLEST_SCALE:
            raise FloatingPointError(
                f"the gradients are not finite, with the loss scaled by {scale:g} as with larger scales, "
                f"{learn.where()}. Check the loss and the data for NaN, lower the learning rate, or use to_bf16()."
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
                f"the checkpoint is from a fit {'without' if state['scaler'] is None else 'with'} a scaled loss, but "
                f"this fit uses {str(self.dtype).removeprefix('torch.')}: resume it in the same precision."
            )
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


class InHalf(nn.Module):
    """Wraps a module and casts its weights, buffers and inputs for each call, except those of batch norm; the outputs
    are float32.

    Gradients go to the module's own weights, in their precision.
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
    """Ignore PyTorch's warning that cast weights have no gradients, which the compiler reads from them (torch 2.15)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        yield


def is_cast(name: str, tensor: Tensor, spared: set[str]) -> bool:
    return tensor.dtype == torch.float32 and not any(
        name.startswith(prefix) and "." not in name[len(prefix) :] for prefix in spared
    )
