"""Memory that runs out: how it is recognized, what to do about it, and how to free what a failed attempt still
holds.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from learnkit.data.batch import count_samples
from learnkit.devices.nested import describe
from learnkit.hooks import add_note

if TYPE_CHECKING:
    from learnkit.learner import Learner

# What torch and the libraries under it write where they cannot allocate. Most raise a RuntimeError with one of these
# texts, not torch.OutOfMemoryError, which is of torch's own caching allocators alone.
RAN_OUT = re.compile(
    "|".join(
        (
            # caching allocators
            r"(?:CUDA|HIP|XPU|MTIA|NPU|HPU|MPS backend) out of memory|out of memory\. Tried to allocate",
            # "CUDA error:", "CUDA driver error:", "HIP error:", "Triton Error [CUDA]:"
            r"error(?: \[\w+\])?: out of memory",
            # cuBLAS, cuBLASLt, cuDNN, cuSOLVER, cuSPARSE, cuFFT, and HIP's
            r"\w+_STATUS_ALLOC_FAILED|\w+FFT_ALLOC_FAILED",
            r"CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
            r"CUDNN_STATUS_INTERNAL_ERROR_\w+_ALLOCATION_FAILED",  # cuDNN 9
            r"CUDA ran out of memory",  # cuDNN's attention, torch 2.15
            r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory|miopenStatusAllocFailed|rocblas_status_memory_error",
            r"failure (?:\d+ )?'out of memory'|Failed to CUDA (?:host )?\w*alloc",  # NCCL
            # Level Zero: github.com/intel/torch-xpu-ops/issues/1170
            r"OUT_OF_(?:DEVICE|HOST)_MEMORY|UR_RESULT_ERROR_OUT_OF_RESOURCES",
            r"Invalid buffer size: ",  # MPS, for one tensor that is larger than a buffer may be
            r"PT_DEVMEM Allocation failed",  # HPU
            r"DefaultCPUAllocator|bad_alloc|Failed to allocate memory",
        )
    ),
    re.IGNORECASE,
)
ON_CPU = re.compile("DefaultCPUAllocator|bad_alloc", re.IGNORECASE)

# What may be that too. cuDNN: github.com/pytorch/pytorch/issues/4107 and 44473; Lightning (is_cudnn_snafu), Accelerate
# and Composer take it for that. "Unable to find an engine": torch tries cuDNN's engines and passes over those that
# cannot get their workspace (github.com/pytorch/pytorch/issues/108645), but also says so of a shape that has none
# (issues/103665). cuBLAS's handle: most often memory (github.com/pytorch/serve/issues/1993), or an earlier assertion on
# the device, of which the next operation then tells.
MAY_HAVE_RUN_OUT = re.compile(
    r"CUDNN_STATUS_NOT_SUPPORTED|unable to find an engine to execute this computation|"
    r"CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublas(?:Lt)?Create",
    re.IGNORECASE,
)

# A loader's process or thread, whose memory is not what a batch's size decides: torch writes so in front of the
# original error.
OF_LOADER = re.compile(r"in DataLoader worker process|in pin memory thread|DataLoader worker \(pid")
PLACE = re.compile(
    r"learnkit: raised in (?:the stage |\w+\.(?:before|around|after)_)(\w+), "
)  # as hooks.blame notes it


def is_out_of_memory(error: BaseException, *, perhaps: bool = False) -> bool:
    """Whether memory, a device's or the CPU's, has run out, as `error` or one of its causes says.

    `perhaps`: also where the error is one that torch raises for that among other reasons. For those who then try a
    smaller batch and, where that does not help, raise the error itself.
    """
    return any(_is_of_memory(link, perhaps) for link in _chain(error))


def _is_of_memory(error: BaseException, perhaps: bool) -> bool:
    text = str(error)
    if not isinstance(error, (RuntimeError, MemoryError)) or OF_LOADER.search(text):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or RAN_OUT.search(text):
        return True
    return perhaps and MAY_HAVE_RUN_OUT.search(text) is not None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: compilers, and users, wrap the allocator's error into one of theirs."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ if error.__cause__ is not None or error.__suppress_context__ else error.__context__


def stage_of(error: BaseException) -> str | None:
    """The stage of the loop in which an error was raised, or whose hook raised it: "forward", "step", …; None: outside
    of them.
    """
    return next((found[1] for note in getattr(error, "__notes__", ()) if (found := PLACE.match(note))), None)


def note_out_of_memory(learn: Learner, error: BaseException) -> None:
    """Where an error that ends a fit or an evaluation is one of memory, or may be: note what ran out, and what to
    do.
    """
    if is_out_of_memory(error):
        add_note(error, f"learnkit: {advice(learn, error)} Another process may hold memory too.")
    elif is_out_of_memory(error, perhaps=True):
        add_note(
            error,
            "learnkit: torch raises this error where memory runs out, among other reasons: try a smaller batch size.",
        )


def advice(learn: Learner, error: BaseException) -> str:
    on_cpu = any(isinstance(link, MemoryError) or ON_CPU.search(str(link)) for link in _chain(error))
    where = f"memory ran out on {'the CPU' if on_cpu else in_use(learn.device)}"
    if stage_of(error) == "step":
        return (
            f"{where}, in the optimizer's step, whose need depends on the weights and not on the batch. The step was "
            f"interrupted: load the weights from a file. Take fused=True or an optimizer with less state, freeze "
            f"layers, take a smaller model, or several devices with learn.to_fsdp()."
        )
    if not learn.training:
        return f"{where}. Take a smaller batch size for evaluations (val_bs), or learn.to_bf16()."
    if learn.inputs:
        where += f". The last batch: {count_samples(learn.inputs, learn.target)} samples, {describe(learn.inputs)}"
    used = {type(callback).__name__ for callback in learn.running}
    ways = {
        "": "a smaller batch size (learn.batch_size_find() measures what fits)",
        "MixedPrecision": "learn.to_bf16()",
        "AutoMicrobatch": "AutoMicrobatch(), which splits batches that do not fit",
        "Accumulate": "Accumulate(n) of smaller batches",
    }
    return f"{where}. Take {', or '.join(way for callback, way in ways.items() if callback not in used)}."


def in_use(device: torch.device) -> str:
    """The device, and how much of its memory is in use now, by all processes and by this one, where the backend
    knows.
    """
    if device.type == "cpu":
        return "the CPU"
    try:
        free, total = torch.accelerator.get_memory_info(device)
        own = torch.accelerator.memory_allocated(device)
    except (RuntimeError, AttributeError):
        return str(device)  # not every backend counts, nor every torch
    in_use = f"{as_words(total - free)} of {as_words(total)} are in use, {as_words(own)} by this process's tensors"
    return f"{device} (now {in_use})"


def as_words(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def forget_tensors(error: BaseException) -> None:
    """Let go of what the frames of a caught error and of its causes hold; a note says where it was raised.

    They would keep the failed attempt's tensors in memory: github.com/pytorch/pytorch/issues/18853.
    """
    links = [error]
    for link in links:
        links += [
            other
            for other in (link.__cause__, link.__context__)
            if other is not None and all(other is not known for known in links)
        ]
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        add_note(error, f"learnkit: raised at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}")
    for link in links:
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None


def free_cached(device: torch.device) -> None:
    """Give back to the device what torch keeps of tensors that are gone; waits for it."""
    if device.type == "cpu":
        return
    gc.collect()  # a graph with a Python function in it may be a cycle
    torch.accelerator.memory.empty_cache()
