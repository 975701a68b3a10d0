# pyright: reportPrivateImportUsage=false, reportArgumentType=false
"""Rank, world size, device and process group of this process, read from the group, else from the environment."""

from __future__ import annotations

import argparse
import os
import random
import re
import socket
import struct
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from learnkit.devices.accelerator import accelerator
from learnkit.distributed.nodes import warn_where_no_node_can_join
from learnkit.distributed.round import name_of_round

COMMAND = "torchrun --nproc-per-node=2 train.py"
N_ATTEMPTS, RETRY_WITHIN = 3, 10.0  # times that ranks try to connect, where they fail within so many seconds
SPELLINGS = ("--local_rank", "--local-rank")
OUTSIDE = "192.0.2.1"  # reserved for documentation (RFC 5737): whatever leads there is the way out of this machine
SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's address
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: neighbouring ranks get seeds that are far apart

# Whether learnkit made the group (and may destroy it), the stores opened, and how many groups were made over them.
_owns_group = False
_stores: dict[tuple[str, int, int, int], dist.Store] = {}
_n_groups = 0


# --- who am I ----------------------------------------------------------------


def has_group() -> bool:
    """Whether a default process group exists, made by learnkit or not."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return this process's rank: from the group if there is one, else from the launcher's environment, else 0."""
    return dist.get_rank() if has_group() else _integer("RANK", 0)


def get_world_size() -> int:
    """Return how many processes train together: from the group, else from the launcher's environment, else 1."""
    return dist.get_world_size() if has_group() else _integer("WORLD_SIZE", 1)


def get_local_rank() -> int:
    """Return this process's number on its machine.

    From `LOCAL_RANK`, else `--local-rank` or `--local_rank` on the command line, else SLURM's, else 0.
    """
    if not os.environ.get("LOCAL_RANK"):
        from_command_line = _local_rank_in(sys.argv[1:])
        if from_command_line is not None:
            return from_command_line
    return _integer("LOCAL_RANK", 0)


def get_local_world_size() -> int:
    """Return how many processes of this training run on this machine: `LOCAL_WORLD_SIZE`, else SLURM's, else 1."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not given and _n_slurm_tasks(os.environ) > 1:  # such as 2(x3),1: where machines differ, the first ones'
        given = re.split(
            r"\D", os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
        )[0]
    return max(1, int(given)) if given.isdigit() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which prints, draws and writes."""
    return get_rank() == 0


def get_device(local_rank: int | str | None = None) -> torch.device:
    """Return the device of this rank: its accelerator if the machine has any, else the CPU.

    Args:
        local_rank: this process's number on its machine; None: `get_local_rank()`.

    Raises:
        ValueError: when the machine has no accelerator of that number, or the number is not this process's.
    """
    check_local_rank(local_rank)  # a wrong one is an error without GPUs too
    kind = accelerator()
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, _device_index(as_local_rank(local_rank)))


def own_device() -> torch.device:
    """The device on which this rank communicates: the one that the group is bound to, else this process's current
    accelerator.
    """
    bound = dist.distributed_c10d._get_default_group().bound_device_id if has_group() else None
    if bound is not None:
        return bound
    kind = accelerator()
    return torch.device("cpu") if kind is None else torch.device(kind.type, torch.accelerator.current_device_index())


def take_device(device: torch.device) -> None:
    """Make `device` this process's current one, which collectives, streams and compiled code of a device use.

    Raises RuntimeError when the process group cannot send what is on it, or is bound to another device.
    """
    check_backend(device)
    check_bound(device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def check_backend(device: torch.device) -> None:
    """Raise RuntimeError when the group cannot send what is on `device`, with how to make one that can."""
    pairs = backends_of_group()
    if device.type in pairs and can_send(pairs[device.type], device):
        return
    if device.type != "cpu":
        wanted, advice = default_backend(device), "train on the CPU, with Learner(…, device='cpu')"
    else:
        kind, backend = next(iter(pairs.items()))
        wanted, advice = f"cpu:gloo,{kind}:{backend}", f"put the model on the device, with Learner(…, device={kind!r})"
    raise RuntimeError(
        f"the process group was made with backend {dist.get_backend_config()!r}, which sends nothing that is on "
        f"{device.type}, where this model is. Make it with init_process_group({wanted!r}), let learnkit make it, or "
        f"{advice}."
    )


def default_backend(device: torch.device) -> str:
    """Return gloo for what is on the CPU, so that ranks agree on flags and counts without waiting for a device, and the
    device's own backend.

    Raises RuntimeError when PyTorch has no backend for this kind of device, as for MPS.
    """
    if device.type == "cpu":
        return "gloo"
    backend = dist.Backend.default_device_backend_map.get(device.type)
    if backend is None or not can_send(backend, device):
        raise RuntimeError(
            f"PyTorch {torch.__version__} has no backend that sends what is on {device.type} to other processes: train "
            f"on one process, or on the CPU, with Learner(…, device='cpu')."
        )
    return f"cpu:gloo,{device.type}:{backend}"


def can_send(backend: str, device: torch.device) -> bool:
    """Whether a backend takes tensors of such a device; PyTorch lists gloo for MPS too, but gloo cannot send those."""
    return device.type in dist.Backend.backend_capability.get(backend, [device.type])


def check_bound(device: torch.device) -> None:
    """Raise RuntimeError when the group is bound to another device than the one on which this rank trains."""
    bound = dist.distributed_c10d._get_default_group().bound_device_id
    if bound is not None and device.type == bound.type and device != bound:
        raise RuntimeError(
            f"the process group is bound to {bound} (device_id=…), but this rank trains on {device}: its local_rank is "
            f"{device.index}. Give both the same device."
        )


def backends_of_group() -> dict[str, str]:
    """{device type: backend} of the process group, as PyTorch lists it."""
    return dict(pair.split(":") for pair in dist.get_backend_config().split(","))


def backends() -> dict[str, str]:
    """{device type: backend} of the process group, such as {"cpu": "gloo", "cuda": "nccl"}, without devices that this
    machine does not have.

    A device whose backend is gloo counts only if the CPU has none: gloo sends its tensors through the CPU anyway.
    """
    pairs = backends_of_group()
    kind = torch.accelerator.current_accelerator()  # the one that PyTorch was built for: uses no device
    there = ("cpu",) if kind is None else ("cpu", kind.type)
    return {
        kind: name
        for kind, name in pairs.items()
        if kind in there and (kind == "cpu" or name != "gloo" or "cpu" not in pairs)
    }


def as_local_rank(local_rank: int | str | None) -> int | None:
    """`local_rank` as a number; None for None and for -1, the default that older scripts give their `--local_rank`.

    Raises ValueError when it is not a number of a process.
    """
    if local_rank is None or local_rank in (-1, "-1"):
        return None
    if isinstance(local_rank, bool) or not re.fullmatch(r"\d+", str(local_rank)):
        raise ValueError(
            f"local_rank={local_rank!r}: expected this process's number on its machine (0, 1, …), or None "
            "to read it from LOCAL_RANK or --local-rank."
        )
    return int(local_rank)


def check_local_rank(local_rank: int | str | None) -> None:
    """Raise ValueError when `local_rank` is not this process's: two processes would share a device, and wait for each
    other for ever.
    """
    given = as_local_rank(local_rank)
    if given is None or get_world_size() == 1:
        return
    n_local, told = get_local_world_size(), launch_environment().get("LOCAL_RANK")
    if (
        told is not None
        and told.isdigit()
        and int(told) != given
        and not (given == 0 and _shows_each_process_its_own_device())
    ):
        raise ValueError(
            f"local_rank={given}, but the launcher started this process as LOCAL_RANK={told}: expected {told}. Pass "
            "get_local_rank(), or leave local_rank out. To use other devices, set CUDA_VISIBLE_DEVICES (or your "
            "device's variable) for the launcher."
        )
    if n_local > 1 and given >= n_local:
        raise ValueError(
            f"local_rank={given}, but {n_local} processes run on this machine: expected 0 to {n_local - 1}. Pass "
            "get_local_rank(), or leave local_rank out."
        )


def _local_rank_in(arguments: list[str]) -> int | None:
    for position, argument in reversed(list(enumerate(arguments))):
        name, equals, value = argument.partition("=")
        if name in SPELLINGS:
            following = "".join(arguments[position + 1 : position + 2])
            return as_local_rank(value if equals else following)
    return None


def accept_both_spellings() -> None:
    """Let parsers in this process that know `--local_rank` accept `--local-rank`, and the other way round.

    `torch.distributed.launch` passes one spelling, and older scripts declare the other: argparse would end them.
    """
    add_argument = argparse._ActionsContainer.add_argument

    def add_both(self: Any, *names: Any, **options: Any) -> Any:
        known = self._option_string_actions
        if any(name in SPELLINGS for name in names):
            if all(name in known for name in names):
                return known[names[0]]  # added as the other's twin
            names += tuple(name for name in SPELLINGS if name not in names and name not in known)
        return add_argument(self, *names, **options)

    if add_argument.__name__ != "add_both":
        argparse._ActionsContainer.add_argument = add_both


def _device_index(local_rank: int | None) -> int:
    if local_rank is None and get_world_size() == 1:
        return torch.accelerator.current_device_index()
    index = get_local_rank() if local_rank is None else local_rank
    n_devices = torch.accelerator.device_count()
    if index < n_devices:
        return index
    if n_devices == 1 and _shows_each_process_its_own_device():
        return 0
    raise ValueError(
        f"local_rank={index}, but this machine shows {n_devices} device(s), 0 to {n_devices - 1}: start as many "
        f"processes on a machine as it has devices (--nproc-per-node), or train on the CPU, with device='cpu' for the "
        f"Learner and its data."
    )


def _shows_each_process_its_own_device() -> bool:
    """SLURM's --gpus-per-task and containers hide the other processes' devices: each process then uses number 0."""
    names = (
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
        "ASCEND_RT_VISIBLE_DEVICES",
    )
    return any(os.environ.get(name) and "," not in os.environ[name] for name in names)


# --- the launcher's environment ----------------------------------------------


def launch_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: the launcher's, else from SLURM's variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: environment[name] for name in names if environment.get(name)}
    launched_by_slurm = "RANK" not in given and "WORLD_SIZE" not in given and _n_slurm_tasks(environment) > 1
    return {**_slurm_environment(environment), **given} if launched_by_slurm else given


def _n_slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of this `srun` step; 1 in a batch script or shell, where SLURM's variables are set too."""
    if not environment.get("SLURM_PROCID"):
        return 1
    of_job = "" if environment.get("ENVIRONMENT") == "BATCH" else environment.get("SLURM_NTASKS", "")
    n_tasks = environment.get("SLURM_STEP_NUM_TASKS") or of_job
    return int(n_tasks) if n_tasks.isdigit() else 1


def _slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((environment[name] for name in names if environment.get(name)), None)
    job_id = environment.get("SLURM_JOB_ID") or environment.get("SLURM_JOBID") or ""
    derived = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(_n_slurm_tasks(environment)),
        "LOCAL_RANK": environment.get("SLURM_LOCALID"),
        "MASTER_ADDR": first_host(nodes) if nodes else None,
        "MASTER_PORT": _slurm_port(int(job_id), environment.get("SLURM_STEP_ID", "")) if job_id.isdigit() else None,
    }
    return {name: value for name, value in derived.items() if value is not None}


def _slurm_port(job_id: int, step_id: str) -> str:
    """A port that a step's tasks agree on: below Linux's ephemeral range, different for neighbouring jobs and steps."""
    return str(20_000 + (job_id * 8 + (int(step_id) % 8 if step_id.isdigit() else 0)) % 10_000)


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list: `gpu[07-09,12]-ib,login` gives `gpu07-ib`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else nodes)


def _integer(name: str, default: int) -> int:
    value = launch_environment().get(name)
    if value is None:
        return default
    if not re.fullmatch(r"\d+", value.strip()):
        raise RuntimeError(f"the environment has {name}={value!r}: expected a whole number, as `{COMMAND}` sets it.")
    return int(value)


def _check_environment() -> None:
    """Raise one error for all that is missing or contradictory, so that it can be corrected at once."""
    given = launch_environment()
    if not (given.get("RANK") or _integer("WORLD_SIZE", 1) > 1):
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if missing and given.get("WORLD_SIZE") != "1":
        present = ", ".join(f"{name}={value}" for name, value in given.items())
        raise RuntimeError(
            f"cannot join a process group: {present} given, but not {', '.join(missing)}. Start the "
            f"script with `{COMMAND}`, which sets them all, or unset {', '.join(given)} to train alone."
        )
    rank, world_size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    if rank >= world_size:
        raise RuntimeError(
            f"cannot join a process group: RANK={rank} with WORLD_SIZE={world_size}, expected a rank "
            f"of 0 to {world_size - 1}. `{COMMAND}` sets both."
        )


# --- the process group -------------------------------------------------------


def init_process_group(
    backend: str | None = None,
    seed: int | None = None,
    timeout: float | timedelta | None = None,
    local_rank: int | str | None = None,
) -> bool:
    """Join this process to the others that the launcher started.

    If a process group exists, it is used and never destroyed. In a world of one there is no group.

    Args:
        backend: None: gloo for tensors on the CPU, and the accelerator's own (NCCL on CUDA) for those on a device.
        seed: seeds every rank alike, so that models built afterwards have equal weights; `seed_by_rank` then makes
            dropout differ.
        timeout: seconds for joining and for every collective; None: PyTorch's.
        local_rank: this process's number on its machine; None: `get_local_rank()`.

    Returns:
        Whether a group was made.

    Raises:
        RuntimeError: when variables of the launcher are missing (it names all of them, and the command to use), or the
            other ranks cannot be reached.
    """
    global _owns_group
    if seed is not None:
        seed_everything(seed)
    check_local_rank(local_rank)
    if has_group():
        return False
    _check_environment()
    if agent_serves() and is_main():
        warn_where_no_node_can_join()
    if get_world_size() == 1:
        return False
    device = torch.device("cpu") if backend in ("gloo", "cpu:gloo") else get_device(local_rank)
    backend = _checked_backend(backend, device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    _join(backend, device, _as_timedelta(timeout))
    _owns_group = True
    return True


def destroy_process_group() -> bool:
    """Destroy the group that `init_process_group` has made; returns whether there was one. Other groups are not
    destroyed.
    """
    global _owns_group
    owned, _owns_group = _owns_group and has_group(), False
    if owned:
        dist.destroy_process_group()
    return owned


def get_store() -> dist.Store | None:
    """Return the key-value store that the ranks share, also before a group exists; None in a world of one."""
    if has_group():
        return None if get_world_size() == 1 else dist.distributed_c10d._get_default_store()
    _check_environment()
    return None if get_world_size() == 1 else dist.PrefixStore("before_group", _rendezvous(None))


def _join(backend: str, device: torch.device, timeout: timedelta | None) -> None:
    """Make the group. On a busy machine, once in hundreds of times, gloo's ranks do not connect although all are there:
    then they try again.
    """
    global _n_groups
    choose_interface()
    bound = None if device.type == "cpu" else device
    place = {"rank": get_rank(), "world_size": get_world_size()}
    for attempt in range(N_ATTEMPTS):
        _n_groups += 1  # a second group of the same processes must not find the first one's keys
        store, start, error = dist.PrefixStore(f"group_{_n_groups}", _rendezvous(timeout)), time.monotonic(), None
        try:
            dist.init_process_group(backend, store=store, timeout=timeout, device_id=bound, **place)
        except (dist.DistError, RuntimeError) as raised:
            error = raised
        may_try = (
            error is not None
            and "connectFullMesh" in str(error)
            and time.monotonic() - start < RETRY_WITHIN
            and attempt < N_ATTEMPTS - 1
        )
        store.set(f"joined/{get_rank()}", "yes" if error is None else "again" if may_try else "no")
        if error is not None and not may_try:
            raise _cannot_join(error, timeout) from error
        outcomes = store.multi_get([f"joined/{rank}" for rank in range(get_world_size())])  # waits for each
        if b"again" not in outcomes:
            return
        if has_group():
            dist.destroy_process_group()


def choose_interface() -> None:
    """Make gloo use the network through which this host reaches the first one, unless GLOO_SOCKET_IFNAME is set.

    By default gloo uses the address of this host's own name: often 127.0.1.1, where no other host reaches it.
    """
    address = launch_environment()["MASTER_ADDR"]
    one_host = get_local_world_size() >= get_world_size() or re.fullmatch(r"localhost|127\..*|::1", address)
    if one_host or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    ways = [
        way for way in map(interface_to, (address, OUTSIDE)) if way not in (None, "lo")
    ]  # the first's name may mean lo to it
    if ways:
        os.environ["GLOO_SOCKET_IFNAME"] = ways[0]


def interface_to(address: str) -> str | None:
    """The network interface through which this machine reaches an IPv4 address or name; None where it does not, or the
    interface cannot be found.
    """
    if sys.platform != "linux":
        return None
    from fcntl import ioctl

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # asks the routing table, and sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                if ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return None


def _rendezvous(timeout: timedelta | None) -> dist.Store:
    """Return the store of this launch, opened once: torchelastic's if it serves one, else rank 0's.

    torchelastic keeps its store over restarts, and a gloo group that reads the addresses of dead ranks there fails (4
    of 4 with --master-port, torch 2.15): the ranks of each start use a separate part of it.
    """
    given = launch_environment()
    place = (given["MASTER_ADDR"], _integer("MASTER_PORT", 0), get_rank(), get_world_size())
    if place not in _stores:
        limit = timeout or dist.default_pg_timeout
        _stores[place] = _own_part(_open_store(*place, limit), limit)
    return _stores[place]


def _own_part(store: dist.Store, timeout: timedelta) -> dist.Store:
    if not agent_serves():
        return dist.PrefixStore("learnkit", store)  # it starts and ends with these ranks
    try:
        name = name_of_round(dist.PrefixStore("learnkit/rounds", store), get_rank(), get_world_size(), timeout)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        raise _cannot_join(error, timeout) from error
    return dist.PrefixStore(f"learnkit/{name}", store)


def agent_serves() -> bool:
    """Whether the launcher's process serves the store; else rank 0's does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(address: str, port: int, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    serves = rank == 0 and not agent_serves()
    try:
        return dist.TCPStore(address, port, world_size, serves, timeout, multi_tenant=True)
    except (dist.DistError, RuntimeError) as error:
        raise _cannot_join(error, timeout) from error


def _cannot_join(error: BaseException, timeout: timedelta | None) -> RuntimeError:
    given = launch_environment()
    address = f"{given.get('MASTER_ADDR')}:{given.get('MASTER_PORT')}"
    in_use = re.search(r"EADDRINUSE|address already in use", str(error), re.IGNORECASE)
    if in_use:
        advice = (
            "the port belongs to another program, perhaps to another training: choose another with --master-port, or "
            "use `torchrun --standalone`"
        )
    elif "connectFullMesh" in str(error):  # gloo's, once all have met at the store
        advice = (
            f"the ranks met there, but do not reach each other over "
            f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME')}: set it, on each host, to the interface that "
            f"the other hosts reach (`ip addr` lists them)"
        )
    else:
        advice = f"see that all {get_world_size()} ranks were started, reach {address}, and have not failed before"
    limit = f" within {timeout.total_seconds():g} s" if timeout and not in_use else ""
    return RuntimeError(
        f"rank {get_rank()} of {get_world_size()} could not join the group at {address}{limit}: "
        f"{advice}. {'' if isinstance(error, TimeoutError) else 'PyTorch says: '}{str(error).splitlines()[0]}"
    )


def _checked_backend(backend: str | None, device: torch.device) -> str:
    if backend is None:
        return default_backend(device)
    if "nccl" in backend.lower() and not torch.cuda.is_available():
        raise RuntimeError(
            f"backend={backend!r} needs a CUDA device, and PyTorch sees none here: leave backend out "
            "(gloo is then used), or see that the driver and a CUDA build of PyTorch are installed."
        )
    return backend


def _as_timedelta(seconds: float | timedelta | None) -> timedelta | None:
    return timedelta(seconds=seconds) if isinstance(seconds, (int, float)) else seconds


# --- random numbers ----------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), `random`, and numpy if it is loaded, with the same seed on every rank."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def seed_by_rank(seed: int) -> int:
    """Seed torch (all devices), `random`, and numpy if it is loaded, differently on each rank.

    Call it after the model is built: with the same seed everywhere, dropout would drop the same units on every rank.

    Args:
        seed: the seed of rank 0; the same number on all ranks.

    Returns:
        The seed that this rank uses.
    """
    own = (seed + get_rank() * GOLDEN_RATIO) % 2**63
    seed_everything(own)
    return own
