"""Memory that runs out: in whatever words torch says so, recognized; nothing else taken for it; and what an attempt
held, freed.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import DataBunch, Learner
from learnkit.callbacks import AutoMicrobatch
from learnkit.loop.memory import forget_tensors, is_out_of_memory

Accelerator = getattr(torch, "AcceleratorError", RuntimeError)
NCCL = torch.distributed.DistBackendError(
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: Call to "
    "CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
)
RAN_OUT: list[BaseException] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB"),
    torch.OutOfMemoryError("twin out of memory. Tried to allocate 64 bytes."),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB). Tried "
        "to allocate 1 GB"
    ),
    RuntimeError("Invalid buffer size: 19.45 GB"),
    Accelerator(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("hipErrorOutOfMemory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM`"),
    RuntimeError(
        "cuDNN SDPA execution failed with error code 3: err 2 != CUDA_SUCCESS\nCUDA ran out of memory outside "
        "PyTorch's allocator."
    ),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    NCCL,
    RuntimeError("Last error:\nFailed to CUDA calloc async 8388608 bytes"),
    RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 "
        "bytes. Error code 12"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 "
        "bytes."
    ),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    RuntimeError("Failed to allocate memory for requested buffer of size 8"),
]
MAY_HAVE: list[BaseException] = [
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
    ),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]
OTHER: list[BaseException] = [
    ValueError("the memory bank holds 4 of 8 keys: out of memory slots"),
    KeyError("memory"),
    TypeError("memory_format is no str"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4): memory layout"),
    OSError(28, "No space left on device"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
    RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
    RuntimeError("unable to write to file </torch_12_34_5>: No space left on device (28)"),
    RuntimeError(
        "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out "
        "of shared memory."
    ),
    torch.OutOfMemoryError(
        "Caught OutOfMemoryError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nCUDA "
        "out of memory."
    ),
    MemoryError("Caught MemoryError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):"),
    Accelerator(
        "Caught AcceleratorError in pin memory thread for device 0.\nOriginal Traceback (most recent call last):\nCUDA "
        "error: out of memory"
    ),
]


def words(error: BaseException) -> str:
    return f"{type(error).__name__} {str(error)[:50]}"


@pytest.mark.parametrize("error", RAN_OUT, ids=words)
def test_memory_that_ran_out_is_recognized_in_all_wordings(error):
    assert is_out_of_memory(error) and is_out_of_memory(error, perhaps=True)


@pytest.mark.parametrize("error", MAY_HAVE, ids=words)
def test_what_torch_also_raises_for_other_reasons_counts_only_where_a_smaller_batch_is_tried(error):
    assert not is_out_of_memory(error) and is_out_of_memory(error, perhaps=True)


@pytest.mark.parametrize("error", OTHER, ids=words)
def test_what_only_speaks_of_memory_and_what_a_loader_lacked_is_not_taken_for_it(error):
    assert not is_out_of_memory(error, perhaps=True)


def test_the_wordings_of_this_torch_are_among_them():
    """A real one, of the CPU's allocator: a petabyte."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    with pytest.raises(MemoryError) as raised:
        bytearray(2**60)
    assert is_out_of_memory(raised.value)


def wrapped(how: str) -> BaseException:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except RuntimeError as error:
            if how == "from":
                raise ValueError("compiling failed") from error
            if how == "while handling":
                raise ValueError("my layer failed")  # noqa: B904
            raise ValueError("asked for this") from None
    except ValueError as error:
        return error


@pytest.mark.parametrize("how, expected", [("from", True), ("while handling", True), ("from None", False)])
def test_an_error_that_was_raised_from_one_of_memory_is_one(how, expected):
    assert is_out_of_memory(wrapped(how)) == expected


def test_causes_that_go_round_in_a_circle_come_to_an_end():
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


def test_a_caught_error_holds_no_tensor_any_more_nor_do_its_causes():
    alive: list[Any] = []

    def allocate() -> None:
        x = torch.zeros(3)
        alive.append(weakref.ref(x))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def handle() -> None:
        y = torch.zeros(3)
        alive.append(weakref.ref(y))
        try:
            allocate()
        except RuntimeError as error:
            raise RuntimeError("the layer failed") from error

    def attempt() -> BaseException:
        try:
            handle()
        except RuntimeError as error:
            assert all(ref() is not None for ref in alive)
            forget_tensors(error)
            return error
        raise AssertionError

    error = attempt()
    assert len(alive) == 2 and all(ref() is None for ref in alive)
    assert any("in handle" in note and "test_memory.py" in note for note in error.__notes__) and is_out_of_memory(error)


# --- what the u --------------------------------------------------------------
class Fails(nn.Linear):
    """Raises `error` in training, or in evaluations."""

    def __init__(self, error: BaseException, *, training: bool = True) -> None:
        super().__init__(3, 1)
        self.error, self.fails_in_training = error, training

    def forward(self, x: Tensor) -> Tensor:
        if self.training == self.fails_in_training:
            raise self.error
        return super().forward(x)


def notes_of_fit(model: nn.Module, **options: Any) -> str:
    data = DataBunch([(torch.randn(8, 3), torch.randn(8, 1))], [(torch.randn(5, 3), torch.randn(5, 1))])
    with pytest.raises(RuntimeError) as raised:
        Learner(data, model, device="cpu", **options).fit(1)
    return "\n".join(raised.value.__notes__)


def test_the_note_says_what_ran_out_with_which_batch_and_what_to_do():
    found = notes_of_fit(Fails(torch.OutOfMemoryError("CUDA out of memory.")))
    assert "memory ran out on the CPU. The last batch: 8 samples, (float32 (8, 3)). Take a smaller batch size" in found
    for way in ("learn.batch_size_find()", "learn.to_bf16()", "AutoMicrobatch()", "Accumulate(n)", "Another process"):
        assert way in found


def test_the_note_does_not_advise_what_is_there_already():
    found = notes_of_fit(Fails(torch.OutOfMemoryError("CUDA out of memory.")), callbacks=[AutoMicrobatch()])
    assert "Accumulate(n)" in found and "AutoMicrobatch()" not in found


def test_the_note_of_an_evaluation_speaks_of_its_batch_size():
    found = notes_of_fit(Fails(torch.OutOfMemoryError("CUDA out of memory."), training=False))
    assert (
        "Take a smaller batch size for evaluations (val_bs)" in found
        and "The last batch" not in found
        and "AutoMicrobatch" not in found
    )


class NoRoom(torch.optim.AdamW):
    """Has no memory for its state."""

    def step(self, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("callbacks", [(), (AutoMicrobatch,)])
def test_memory_that_runs_out_in_the_step_is_said_to_be_the_optimizers_and_no_batch_is_split(callbacks):
    found = notes_of_fit(nn.Linear(3, 1), opt_func=NoRoom, callbacks=[cls() for cls in callbacks])
    assert (
        "in the optimizer's step, whose need depends on the weights and not on the batch" in found
        and "fused=True" in found
    )
    assert "smaller batch size" not in found


def test_an_error_that_may_be_one_of_memory_says_so_and_another_one_does_not():
    assert (
        "torch raises this error where memory runs out, among other reasons: try a smaller batch size"
        in notes_of_fit(Fails(MAY_HAVE[0]))
    )
    assert "memory" not in notes_of_fit(Fails(RuntimeError("CUDA error: device-side assert triggered")))
