"""launch: ranks from a warm process, ended together, none left."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from learnkit.distributed import RankFailed, get_local_rank, get_rank, get_world_size, init_process_group, launch
from learnkit.distributed.launch import in_forked_child
from learnkit.distributed.process import is_alive

ROOT = Path(__file__).resolve().parents[2]


def place() -> tuple[int, int, int]:
    return get_rank(), get_local_rank(), get_world_size()


def test_each_rank_knows_its_place_and_the_caller_gets_rank_0s_answer():
    assert launch(place, 2) == (0, 0, 2)
    assert launch(place, 3, every_rank=True) == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]


def test_one_rank_is_called_in_this_process():
    assert launch(os.getpid, 1) == os.getpid()
    assert launch(os.getpid, 1, every_rank=True) == [os.getpid()]


def test_a_function_that_no_module_holds_can_be_launched():
    scale = 3
    assert launch(lambda x: x * scale + get_rank(), 2, 5, every_rank=True) == [15, 16]


def test_tensors_come_back():
    assert torch.equal(launch(lambda: torch.full((1000, 300), 1.5), 2), torch.full((1000, 300), 1.5))


def matmul_and_backward() -> float:
    x = torch.ones(300, 300, requires_grad=True)
    (x @ x).sum().backward()
    torch.sigmoid(torch.ones(1000, 1000)).sum()
    return x.grad.sum().item()


def test_ranks_compute_after_openmp_threads_ran_in_this_process():
    """A copy of the thread that ran them would hang in its first loop with several threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = matmul_and_backward()
        assert launch(matmul_with_two_threads, 2, timeout=20, every_rank=True) == [expected, expected]
    finally:
        torch.set_num_threads(n_threads)


def matmul_with_two_threads() -> float:
    torch.set_num_threads(2)
    return matmul_and_backward()


def test_ranks_share_the_cores():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        assert launch(torch.get_num_threads, 2) == max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    finally:
        torch.set_num_threads(n_threads)


def test_the_users_own_init_process_group_finds_the_store():
    def old_introduction() -> float:
        torch.distributed.init_process_group(backend="gloo", init_method="env://")
        x = torch.ones(1)
        torch.distributed.all_reduce(x)
        torch.distributed.destroy_process_group()
        return x.item()

    assert launch(old_introduction, 2) == 2


def test_groups_can_be_made_and_destroyed_again_and_again():
    def three_times() -> list[bool]:
        from learnkit.distributed import all_sum, destroy_process_group

        made = []
        for _ in range(3):
            made += [init_process_group(timeout=20), init_process_group(), all_sum(1) == 2, destroy_process_group()]
        return made

    assert launch(three_times, 2, timeout=30) == [True, False, True, True] * 3


# --- failures ----------------------------------------------------------------
def fail_on(rank: int, pids: Path, fail) -> None:
    """One rank fails; the others wait in a collective for it."""
    init_process_group(timeout=60)
    (pids / str(get_rank())).write_text(str(os.getpid()))
    torch.distributed.barrier()
    if get_rank() == rank:
        fail()
    torch.distributed.all_reduce(torch.ones(1))
    time.sleep(60)


def raise_error() -> None:
    raise ValueError("the label of sample 7 is -1")


def pids_in(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.iterdir()]


@pytest.mark.parametrize(
    "fail, reason",
    [
        (raise_error, r"rank 1 of 2 failed: ValueError: the label of sample 7 is -1\n\nTraceback .*in raise_error"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 of 2 failed: it ended with signal SIGKILL"),
        (lambda: os._exit(0), "rank 1 of 2 failed: it ended with exit code 0"),
        (lambda: sys.exit("no data"), "rank 1 of 2 failed: SystemExit: no data"),
    ],
    ids=["raises", "killed", "exits", "sys.exit"],
)
def test_a_failing_rank_ends_all_and_is_named(tmp_path, fail, reason):
    start = time.monotonic()
    with pytest.raises(RankFailed, match=f"(?s){reason}"):
        launch(fail_on, 2, 1, tmp_path, fail)
    assert time.monotonic() - start < 10
    pids = pids_in(tmp_path)
    assert len(pids) == 2 and not any(map(is_alive, pids))


def test_an_exit_with_code_0_is_an_answer():
    assert launch(sys.exit, 2) is None


def test_a_hang_ends_with_the_time_limit_and_the_stacks_are_shown(tmp_path, capfd):
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 were still running after 2 s"):
        launch(fail_on, 2, None, tmp_path, None, timeout=2)
    assert "in fail_on" in capfd.readouterr().err
    assert not any(map(is_alive, pids_in(tmp_path)))


def test_ctrl_c_ends_the_ranks(tmp_path):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launch(fail_on, 2, None, tmp_path, None, timeout=30)
    assert not any(map(is_alive, pids_in(tmp_path)))


def test_a_killed_parent_leaves_no_rank(tmp_path):
    script = f"""
import os, time
from pathlib import Path
from learnkit.distributed import launch, get_rank
def sleep():
    (Path({str(tmp_path)!r}) / str(get_rank())).write_text(str(os.getpid()))
    time.sleep(60)
launch(sleep, 2)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    parent.kill()
    parent.wait()
    time.sleep(2)
    assert len(pids_in(tmp_path)) == 2 and not any(map(is_alive, pids_in(tmp_path)))


def test_an_answer_that_cannot_be_pickled_is_named():
    with pytest.raises(RankFailed, match=r"returned a function that cannot be sent back.*Return numbers, tensors"):
        launch(lambda: lambda: 0, 2)


def test_wrong_arguments_are_told():
    with pytest.raises(ValueError, match="nprocs=0, expected a whole number of 1 or more"):
        launch(place, 0)
    with pytest.raises(TypeError, match="fn is 3, expected a function"):
        launch(3, 2)  # type: ignore[arg-type]


def test_a_rank_launches_no_ranks():
    def nested() -> None:
        launch(place, 2)

    with pytest.raises(RankFailed, match=r"launch would start 2 ranks inside rank \d of 2"):
        launch(nested, 2)


def test_spawned_ranks_give_the_same_answer():
    assert launch(get_world_size, 2, start_method="spawn", timeout=60, every_rank=True) == [2, 2]
    assert not multiprocessing.active_children()


# --- an accelerator ----------------------------------------------------------
NVML = "int nvmlInit(){return 0;} int nvmlDeviceGetCount_v2(int* n){*n = 2; return 0;}"
RANK = "import torch\ndef is_lost(): return torch.cuda._is_in_bad_fork()\n"
ASK = """
import os, torch, learnkit, learnkit.vision
from torch.utils.data import TensorDataset
from learnkit.distributed import launch
from learnkit.distributed.launch import choose_start_method
from rank import is_lost
data = TensorDataset(torch.randn(8, 2), torch.randn(8, 2))
{ask}
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"   # there are devices, from here on
assert not torch.cuda.is_initialized()
print(choose_start_method(is_lost), launch(is_lost, 2, timeout=60, every_rank=True), launch(lambda: 5, 1))
try: launch(lambda: 5, 2)
except RuntimeError as error: print(error)
try: launch(is_lost, 2, start_method="fork")
except RuntimeError as error: print(error)
"""


@pytest.fixture
def two_gpus(tmp_path: Path) -> dict[str, str]:
    """An environment in which the driver lists two GPUs; what torch does about them and about forks is torch's."""
    (tmp_path / "nvml.c").write_text(NVML)
    (tmp_path / "rank.py").write_text(RANK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"], cwd=tmp_path, check=True)
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "LD_LIBRARY_PATH": str(tmp_path)}


with_cuda = pytest.mark.skipif(
    not torch.cuda._is_compiled() or sys.platform != "linux" or not shutil.which("gcc") or torch.cuda.is_available(),
    reason="for builds with CUDA where there is no GPU; needs gcc",
)


def asked(ask: str, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(ask=ask)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@with_cuda
@pytest.mark.parametrize("ask", ["torch.cuda.is_available()", "torch.accelerator.is_available()"])
def test_after_somebody_has_asked_torch_for_a_gpu_ranks_are_spawned_and_can_use_it(ask, two_gpus):
    chosen, *errors = asked(ask, two_gpus)
    assert chosen == "spawn [False, False] 5"
    assert (
        "cuda is in use in this process already, or was started by a question" in errors[0] and "a lambda" in errors[0]
    )
    assert errors[1].startswith("launch cannot fork: cuda is in use") and len(errors) == 2


@with_cuda
@pytest.mark.parametrize(
    "ask",
    [
        "pass",
        "torch.cuda.device_count()",
        "learnkit.DataBunch.create(data, data, bs=4); learnkit.devices.accelerator.accelerator()",
    ],
    ids=["nothing", "device_count", "create"],
)
def test_what_learnkit_asks_itself_leaves_ranks_forked_and_able_to_use_the_gpu(ask, two_gpus):
    assert asked(ask, two_gpus) == ["fork [False, False] 5"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_without_an_accelerator_ranks_are_forked_whoever_has_asked(tmp_path):
    script = (
        "import torch; torch.cuda.is_available()\nfrom learnkit.distributed import launch, get_rank\n"
        "print(launch(lambda: get_rank(), 2, every_rank=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["[0,", "1]"]


def test_what_a_forked_child_answers_is_its_own_state():
    here = os.getpid()
    assert in_forked_child(lambda: os.getpid() != here) and not in_forked_child(lambda: os.getpid() == here)
    assert in_forked_child(lambda: [][0]) and not multiprocessing.active_children()  # one that fails is lost
