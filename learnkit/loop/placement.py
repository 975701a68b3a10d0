"""Where a model is: on one device, the Learner's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learnkit.devices.accelerator import accelerator
from learnkit.devices.dtensor import is_shard

if TYPE_CHECKING:
    from learnkit.learner import Learner


def as_device(device: torch.device | str | int | None) -> torch.device:
    """The device with its number ("cuda" is the current one, such as cuda:0); None: the accelerator if there is one,
    else the CPU.

    Raises ValueError where there is no such device, and names those that there are.
    """
    if device is None:
        from learnkit.data.loaders import default_device

        return default_device()
    try:
        found = torch.zeros(0, device=device).device
    except (
        RuntimeError,
        AssertionError,
        ValueError,
        TypeError,
    ) as error:  # AssertionError: "Torch not compiled with CUDA enabled"
        raise ValueError(
            f"device={device!r}: PyTorch {torch.__version__} cannot use it here ({first_line(error)}). Expected one of "
            f"{', '.join(devices())}, or None for the first of them."
        ) from error
    if found.type == "meta":
        raise ValueError("device='meta' has no numbers to train on: expected one of " + ", ".join(devices()) + ".")
    return found


def devices() -> list[str]:
    """The devices of this machine, by name, those that are best first."""
    kind = accelerator()
    return [*([] if kind is None else (f"{kind.type}:{i}" for i in range(torch.accelerator.device_count()))), "cpu"]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def place(learn: Learner, device: torch.device) -> None:
    """Make `device` the Learner's, and move the model, a loss function that is a module, and the optimizer's state
    there.

    A model on the meta device, or sharded by to_fsdp, stays where it is.
    """
    learn.device = device
    for module in (learn.model, learn.loss_func):
        if isinstance(module, nn.Module):
            check_one_device(module, "the model" if module is learn.model else "loss_func")
            move(module, device)
    if learn.opt is not None:
        move_state(learn.opt)


def move(module: nn.Module, device: torch.device) -> None:
    """As `module.to(device)`, but parameters are the same objects afterwards, on every device.

    Between the CPU and a device of a backend outside of PyTorch (PrivateUse1), `to` makes new parameters: weights that
    two layers share would be two, and an optimizer that was built before would train the old ones.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if all(t.device == device for t in tensors) or any(t.is_meta or is_shard(t) for t in tensors):
        return
    with swapping() if any(not alike(t, device) for t in tensors) else nullcontext():
        module.to(device)


def alike(tensor: Tensor, device: torch.device) -> bool:
    """Whether a parameter's data can be exchanged for data on `device`."""
    empty = torch.empty(0, device=device)
    return tensor.device == device or torch._has_compatible_shallow_copy_type(tensor, empty)  # type: ignore[reportPrivateImportUsage]


@contextmanager
def swapping() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def move_state(opt: Any) -> None:
    """What a built optimizer remembers of its parameters, to where these are now."""
    for p, state in opt.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and isinstance(p, Tensor) and not is_shard(p):
                state[name] = value.to(p.device)


def check_one_device(module: nn.Module, name: str) -> None:
    """Refuse a module whose parts are on several devices, which moving it would bring together unasked."""
    by_device: dict[str, str] = {}
    for key, tensor in tensors_of(module):
        if not is_shard(tensor) and not tensor.is_meta:
            by_device.setdefault(str(tensor.device), key)
    if len(by_device) > 1:
        found = ", ".join(f"{key} on {device}" for device, key in by_device.items())
        raise ValueError(
            f"{name} ({type(module).__name__}) has its parts on {len(by_device)} devices: {found}. A Learner trains on "
            f"one: call model.to(device) first, or build all of it on one device. For a model that one device cannot "
            f"hold, take to_fsdp."
        )


def check_place(learn: Learner) -> None:
    """Refuse a model that is not on the Learner's device when a session begins. Raises ValueError with the first tensor
    that is not.
    """
    device = learn.device
    for key, tensor in tensors_of(learn.model):
        if tensor.device == device or is_shard(tensor):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"the model ({type(learn.model).__name__}) is on the meta device and has no weights: learn.to_fsdp(…) "
                f"gives it some, on one process too."
            )
        raise ValueError(
            f"the model's {key} is on {tensor.device}, but this Learner trains on {device}, where it had put the "
            f"model: it was moved or replaced afterwards. Call model.to({str(device)!r}), or build the Learner with "
            f"device={str(tensor.device)!r}."
        )


def tensors_of(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """For the length of a with block, `device` is the current one of its kind: streams, events and compiled code go by
    that.
    """
    if device.type == "cpu" or torch.accelerator.device_count() == 1:
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def check_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a precision that the device does not have, where torch.autocast would warn, and compute in float32."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            torch.autocast(device.type, dtype)  # type: ignore[reportPrivateImportUsage]
        except RuntimeError as error:
            told.append(error)  # type: ignore[arg-type]
    if told:
        reason = first_line(told[0] if isinstance(told[0], Exception) else told[0].message)  # type: ignore[union-attr]
        raise ValueError(
            f"{str(dtype).removeprefix('torch.')} was asked for, which PyTorch {torch.__version__} does not compute by "
            f"autocast on {device} ({reason}). Take another precision, to_fp32(), or another device."
        )
