"""One script under every launcher: the losses that it has alone with twice the batch size; and what it says where it
cannot start.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from learnkit import DataBunch, Learner
from learnkit.distributed.world import choose_interface, interface_to, launch_environment
from tests.distributed.processes import PYTHON, SCRIPT, TORCHRUN, Processes, Started, changed, free_port, losses

LAUNCH = (PYTHON, "-m", "torch.distributed.launch")  # deprecated, and in use


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses, and the last epoch's values, of one process with the batch of two."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "train.py").write_text(SCRIPT)
    with Processes(folder) as processes:
        ended = processes.run(PYTHON, str(folder / "train.py"), "16")
    assert ended.err == ""
    return losses(ended)


# --- the same losse ----------------------------------------------------------
def by_launch(start: Callable[..., Started]) -> list[Started]:
    return [start(*LAUNCH, "--nproc-per-node=2", "train.py", "8")]


def by_launch_with_env(start: Callable[..., Started]) -> list[Started]:
    return [start(*LAUNCH, "--nproc-per-node=2", "--use-env", "train.py", "8")]


def by_torchrun(start: Callable[..., Started]) -> list[Started]:
    return [start(*TORCHRUN, "--standalone", "--nproc-per-node=2", "train.py", "8")]


def by_two_agents(start: Callable[..., Started]) -> list[Started]:
    master = ("--master-addr=127.0.0.1", f"--master-port={free_port()}")
    return [
        start(*TORCHRUN, "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", *master, "train.py", "8")
        for rank in range(2)
    ]


def by_slurm(start: Callable[..., Started]) -> list[Started]:
    step = {
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": free_job_id(),
    }
    return [start(PYTHON, "train.py", "8", SLURM_PROCID=rank, SLURM_LOCALID=rank, **step) for rank in range(2)]


def free_job_id() -> str:
    """A job whose port nobody has."""
    for job_id in range(free_port(), 100_000):
        step = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(job_id), "SLURM_STEP_ID": "0"}
        if is_free(int(launch_environment(step)["MASTER_PORT"])):
            return str(job_id)
    raise AssertionError("no port is free")


def is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def by_function(start: Callable[..., Started]) -> list[Started]:
    Path("start.py").write_text(
        "import runpy\nfrom learnkit.distributed import launch\n\n\n"
        "def main(): runpy.run_path('train.py', run_name='__main__')\n\n\n"
        "if __name__ == '__main__': launch(main, 2, timeout=60)\n"
    )
    return [start(PYTHON, "start.py", "8")]


@pytest.mark.parametrize(
    "how",
    [by_launch, by_launch_with_env, by_torchrun, by_two_agents, by_slurm, by_function],
    ids=["torch.distributed.launch", "--use-env", "torchrun", "two agents", "SLURM", "launch()"],
)
def test_two_ranks_train_like_one_process_with_twice_the_batch(how, alone, processes):
    Path("train.py").write_text(SCRIPT)
    started = how(processes.start)
    assert losses(*[one.ended() for one in started]) == pytest.approx(alone, abs=1e-5)
    assert processes.left_after(2) == []


OLDER = (
    changed(
        SCRIPT,
        (
            "local_rank = get_local_rank()\n",
            """\
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
args = parser.parse_args()
if torch.cuda.is_available(): torch.cuda.set_device(args.local_rank)
torch.distributed.init_process_group(backend='gloo', init_method='env://')

""",
        ),
        ("int(sys.argv[-1])", "8"),
        ("to_distributed(local_rank)", "to_distributed(args.local_rank)"),
    )
    + """
total = torch.ones(1)
torch.distributed.all_reduce(total)
if destroy_process_group() or not torch.distributed.is_initialized() or total != 2:
    raise SystemExit("the user's group was touched")
# PyTorch asks for it: without it a rank once aborted at its exit (SIGABRT)
torch.distributed.destroy_process_group()
"""
)


@pytest.mark.parametrize(
    "launcher, spelling",
    [
        ((*LAUNCH, "--nproc-per-node=2"), '"--local_rank"'),  # passes --local-rank=0
        ((*TORCHRUN, "--standalone", "--nproc-per-node=2"), '"--local_rank"'),
    ],
    ids=["torch.distributed.launch", "torchrun"],
)
def test_the_older_introduction_trains_alike_and_keeps_its_group(launcher, spelling, alone, processes):
    Path("older.py").write_text(changed(OLDER, ('"--local_rank"', spelling)))
    assert losses(processes.run(*launcher, "older.py")) == pytest.approx(alone, abs=1e-5)


def test_after_a_restart_a_script_that_failed_trains_alike(alone, processes):
    """With a port of its own, where torchrun keeps the store over the restart."""
    Path("train.py").write_text(
        changed(
            SCRIPT,
            ("metrics=accuracy", "metrics=accuracy, callbacks=FailsOnce()"),
            (
                "local_rank = ",
                """
from pathlib import Path

class FailsOnce(Callback):
    def before_step(self, learn):
        if learn.step == 5 and learn.rank == 1 and not Path("failed").exists():
            Path("failed").touch()
            raise ValueError("in the first attempt")

local_rank = """,
            ),
        )
    )
    address = ("--nnodes=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    ended = processes.run(*TORCHRUN, *address, "--nproc-per-node=2", "--max-restarts=1", "train.py", "8")
    assert "ValueError: in the first attempt" in ended.err
    first, restarted = ended.out.splitlines()[0], ended.out.partition("\n")[2]
    assert first.startswith("epoch 1/2")
    assert losses(ended._replace(out=restarted)) == pytest.approx(alone, abs=1e-5)


# --- what cannot be star -----------------------------------------------------
def test_a_script_with_half_an_environment_ends_with_one_error(processes):
    Path("train.py").write_text(SCRIPT)
    ended = processes.run(PYTHON, "train.py", "8", RANK=1)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.splitlines()[-1] == (
        "RuntimeError: cannot join a process group: RANK=1 given, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Start "
        "the script with `torchrun --nproc-per-node=2 train.py`, which sets them all, or unset RANK to train alone."
    )


def test_of_two_jobs_on_one_port_one_is_told_and_the_other_waits_no_longer_than_its_timeout(processes):
    """The second rank of neither ever comes."""
    Path("train.py").write_text(
        changed(SCRIPT, ("to_distributed(local_rank)", "to_distributed(local_rank, timeout=3)"))
    )
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        processes.start(PYTHON, "train.py", "8", RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, **address) for _ in range(2)
    ]
    ended = sorted((one.ended(30) for one in started), key=lambda end: "the port belongs" not in end.err)
    assert [end.code for end in ended] == [1, 1]
    told = f"RuntimeError: rank 0 of 2 could not join the group at 127.0.0.1:{address['MASTER_PORT']}"
    assert (
        ended[0]
        .err.splitlines()[-1]
        .startswith(
            f"{told}: the port belongs to another program, perhaps to another training: choose another with "
            f"--master-port"
        )
    )
    assert (
        ended[1]
        .err.splitlines()[-1]
        .startswith(f"{told} within 3 s: see that all 2 ranks were started, reach 127.0.0.1:")
    )


@pytest.mark.parametrize(
    "local_rank, variables, message",
    [
        (
            "one",
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            "local_rank='one': expected this process's number",
        ),
        (
            None,
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
            "RANK=0, WORLD_SIZE=2, MASTER_PORT=1 given, but not MASTER_ADDR",
        ),
        (None, {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK=3 with WORLD_SIZE=2"),
    ],
)
def test_to_distributed_refuses_and_the_learner_still_trains_alone(monkeypatch, local_rank, variables, message):
    x = torch.randn(8, 2)
    learn = Learner(DataBunch.from_tensors((x, x), bs=4), torch.nn.Linear(2, 2))
    with monkeypatch.context() as within:
        for name, value in variables.items():
            within.setenv(name, value)
        with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
            learn.to_distributed(local_rank)
    assert learn.fit(1).world_size == 1


# --- the way between ---------------------------------------------------------
def test_the_interface_to_an_address_is_the_one_of_the_routing_table():
    assert interface_to("127.0.0.1") == interface_to("localhost") == "lo"
    assert interface_to("no-such-host.invalid") is None


@pytest.mark.parametrize(
    "variables",
    [
        {"MASTER_ADDR": "127.0.0.1"},  # one host
        {"MASTER_ADDR": "no-such-host.invalid", "LOCAL_WORLD_SIZE": "2"},  # one host too
        {"MASTER_ADDR": "no-such-host.invalid", "GLOO_SOCKET_IFNAME": "given"},
    ],
)
def test_the_interface_is_chosen_for_several_hosts_only_and_a_given_one_stays(monkeypatch, variables):
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "1",
        "LOCAL_WORLD_SIZE": "1",
        "GLOO_SOCKET_IFNAME": "",
        **variables,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"]
