"""Rank, world, device and group: from the group if there is one, else from the environment, and nothing when alone."""

import argparse
import os
import random
import re
import socket
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from learnkit.distributed import (
    all_sum,
    get_device,
    get_local_rank,
    get_rank,
    get_world_size,
    init_process_group,
    is_main,
    launch,
    seed_by_rank,
)
from learnkit.distributed.world import accept_both_spellings, first_host, launch_environment

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without a launcher; call it with variables to be set."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return lambda **variables: [monkeypatch.setenv(name, str(value)) for name, value in variables.items()]


# --- alone -------------------------------------------------------------------
def test_alone_nothing_is_made_and_all_is_said():
    assert (get_rank(), get_local_rank(), get_world_size(), is_main()) == (0, 0, 1, True)
    assert init_process_group() is False and not torch.distributed.is_initialized()


def test_a_world_of_one_under_a_launcher_makes_no_group(environment):
    environment(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    assert init_process_group() is False and not torch.distributed.is_initialized()


# --- local rank --------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, local_rank",
    [
        (["--local-rank=2"], 2),
        (["--local_rank", "3"], 3),
        (["--lr", "1", "--local-rank", "1", "x"], 1),
        (["--local_rank=1", "--local-rank=4"], 4),
        (["--local_rank=-1"], 0),
        (["--local_ranks=2"], 0),
        ([], 0),
    ],
)
def test_the_local_rank_is_read_from_the_command_line(monkeypatch, arguments, local_rank):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert get_local_rank() == local_rank


def test_the_environment_comes_before_the_command_line(monkeypatch, environment):
    monkeypatch.setattr(sys, "argv", ["train.py", "--local-rank=2"])
    environment(LOCAL_RANK=1)
    assert get_local_rank() == 1


@pytest.mark.parametrize("wrong", ["one", "1.5", True, -2])
def test_a_local_rank_that_is_none_is_told(wrong):
    with pytest.raises(ValueError, match=f"local_rank={re.escape(repr(wrong))}: expected this process's number"):
        get_device(wrong)


def test_local_ranks_may_be_strings_or_missing():
    for given in (0, "0", None, -1, "-1"):
        assert get_device(given) == torch.device("cpu")


# --- SLURM -------------------------------------------------------------------
SLURM = {
    "SLURM_PROCID": 5,
    "SLURM_LOCALID": 1,
    "SLURM_NTASKS": 8,
    "SLURM_STEP_NUM_TASKS": 8,
    "SLURM_JOB_ID": 4242,
    "SLURM_STEP_ID": 0,
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[06-08]",
}


def test_slurms_variables_are_as_good_as_torchruns(environment):
    environment(**SLURM)
    assert (get_rank(), get_local_rank(), get_world_size()) == (5, 1, 8)
    given = launch_environment()
    assert given["MASTER_ADDR"] == "gpu07" and 20_000 <= int(given["MASTER_PORT"]) < 30_000


def test_torchruns_variables_come_before_slurms(environment):
    environment(**SLURM, RANK=1, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="here", MASTER_PORT=1)
    assert (get_rank(), get_local_rank(), get_world_size()) == (1, 0, 2)


@pytest.mark.parametrize(
    "variables",
    [
        {**SLURM, "SLURM_STEP_NUM_TASKS": 1},  # srun --pty bash, in an allocation of 8 tasks
        {"SLURM_NTASKS": 8, "SLURM_JOB_ID": 1},  # a shell of salloc
        {
            "SLURM_NTASKS": 8,
            "SLURM_PROCID": 0,
            "SLURM_LOCALID": 0,
            "ENVIRONMENT": "BATCH",
        },  # a batch script, without srun
    ],
    ids=["one task", "salloc", "batch"],
)
def test_a_process_within_an_allocation_is_not_one_of_its_tasks(environment, variables):
    environment(**variables)
    assert (get_rank(), get_world_size()) == (0, 1)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[07,09]-ib,x", "gpu07-ib"),
        ("a[1-2]b[3-4],c", "a1b3"),
        ("node-a,node-b", "node-a"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodes, first):
    assert first_host(nodes) == first


# --- wrong setting -----------------------------------------------------------
def test_all_missing_variables_are_named_in_one_error_with_the_command(environment):
    environment(RANK=1)
    with pytest.raises(RuntimeError) as caught:
        init_process_group()
    assert str(caught.value) == (
        "cannot join a process group: RANK=1 given, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Start the "
        "script with `torchrun --nproc-per-node=2 train.py`, which sets them all, or unset RANK to train alone."
    )


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": 2}, "WORLD_SIZE=2 given, but not RANK, MASTER_ADDR, MASTER_PORT"),
        (
            {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "h"},
            "RANK=0, WORLD_SIZE=2, MASTER_ADDR=h given, but not MASTER_PORT",
        ),
        (
            {"RANK": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "h", "MASTER_PORT": 1},
            "RANK=2 with WORLD_SIZE=2, expected a rank of 0 to 1",
        ),
        ({"RANK": "x", "WORLD_SIZE": 2, "MASTER_ADDR": "h", "MASTER_PORT": 1}, "RANK='x': expected a whole number"),
        (
            {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "h", "MASTER_PORT": "http"},
            "MASTER_PORT='http': expected a whole number",
        ),
    ],
)
def test_incomplete_or_contradictory_environments_are_told(environment, variables, message):
    environment(**variables)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        init_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nccl_without_cuda_is_told(environment):
    environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=1)
    with pytest.raises(
        RuntimeError, match=r"backend='nccl' needs a CUDA device, and PyTorch sees none here: leave backend out"
    ):
        init_process_group("nccl")


def test_a_rank_that_never_comes_is_told_within_the_timeout(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(
        RuntimeError, match=r"rank 0 of 2 could not join the group at 127.0.0.1:\d+ within 1 s: see that all 2 ranks"
    ):
        init_process_group(timeout=1)


def test_a_port_that_is_taken_is_told(environment):
    with socket.create_server(("", 0)) as server:
        environment(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=server.getsockname()[1])
        with pytest.raises(
            RuntimeError, match="the port belongs to another program, perhaps to another training: choose another"
        ):
            init_process_group(timeout=5)


# --- the gro -----------------------------------------------------------------
def test_a_group_that_exists_is_used_and_left_alone():
    from learnkit.distributed import destroy_process_group

    def fn():
        torch.distributed.init_process_group("gloo")
        return init_process_group(), destroy_process_group(), torch.distributed.is_initialized(), get_world_size()

    assert launch(fn, 2) == (False, False, True, 2)


def test_on_a_cpu_the_backend_is_gloo(ranks):
    assert ranks(2, torch.distributed.get_backend) == ["gloo"] * 2


# --- see ---------------------------------------------------------------------
def draws() -> list[float]:
    return [torch.rand(()).item(), random.random(), np.random.rand()]


def test_a_seed_makes_equal_weights_and_then_unequal_dropout():
    def fn():
        init_process_group(seed=3)
        weights = draws()
        seed_by_rank(3)
        return weights, draws()

    weights, dropout = zip(*launch(fn, 3, every_rank=True), strict=True)
    assert weights[0] == weights[1] == weights[2]
    assert all(len(set(values)) == 3 for values in zip(*dropout, strict=True))


def test_rank_0_draws_what_one_process_alone_draws():
    init_process_group(seed=3)
    alone = draws()
    assert seed_by_rank(3) == 3 and draws() == alone


# --- parsers of scripts of old -----------------------------------------------
@pytest.mark.parametrize("declared", [["--local_rank"], ["--local-rank"], ["--local_rank", "--local-rank"]])
@pytest.mark.parametrize("passed", [["--local-rank=3"], ["--local_rank", "3"]])
def test_a_parser_of_one_spelling_takes_the_other(declared, passed, monkeypatch):
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", argparse._ActionsContainer.add_argument)
    for _ in range(2):
        accept_both_spellings()
    parser = argparse.ArgumentParser()
    for name in declared:
        parser.add_argument(name, type=int, default=-1)
    parser.add_argument("--other")
    assert parser.parse_args(passed).local_rank == 3
    assert parser.parse_args([]).local_rank == -1


def test_ranks_that_did_not_connect_try_again_together():
    def fn():
        real, tries = dist.init_process_group, []

        def fails_once(*args, **options):
            tries.append(1)
            real(*args, **options)
            if os.environ["RANK"] == "1" and len(tries) == 1:
                dist.destroy_process_group()
                raise RuntimeError("Gloo connectFullMesh failed with … Connection closed by peer")

        dist.init_process_group = fails_once
        init_process_group(timeout=20)
        return len(tries), all_sum(1)

    assert launch(fn, 2, every_rank=True, timeout=60) == [(2, 2), (2, 2)]
