# pyright: reportPrivateImportUsage=false, reportArgumentType=false
"""Who am I among how many: rank, world, device and process group, read from the group, else from the environment."""

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

# Whether the group is ours (and may be destroyed), the stores opened, and how many groups were made over them.
_owns_group = False
_stores: dict[tuple[str, int, int, int], dist.Store] = {}
_n_groups = 0


# --- who am I ----------------------------------------------------------------


def has_group() -> bool:
    """Whether a default process group exists, whoever made it."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's rank among all: of the group if there is one, else of the launcher's environment, else 0."""
    return dist.get_rank() if has_group() else _integer("RANK", 0)


def get_world_size() -> int:
    """How many processes train together: of the group if there is one, else of the launcher's environment, else 1."""
    return dist.get_world_size() if has_group() else _integer("WORLD_SIZE", 1)


def get_local_rank() -> int:
    """This process's number on its machine.

    `LOCAL_RANK`, else `--local-rank` or `--local_rank` on the command line, else SLURM's, else 0.
    """
    if not os.environ.get("LOCAL_RANK"):
        from_command_line = _local_rank_in(sys.argv[1:])
        if from_command_line is not None:
            return from_command_line
    return _integer("LOCAL_RANK", 0)


def get_local_world_size() -> int:
    """How many processes of this training run on this machine: `LOCAL_WORLD_SIZE`, else SLURM's, else 1."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not given and _n_slurm_tasks(os.environ) > 1:  # such as 2(x3),1: of a mixed one, the first machines'
        given = re.split(
            r"\D", os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
        )[0]
    return max(1, int(given)) if given.isdigit() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that prints, draws and writes."""
    return get_rank() == 0


def get_device(local_rank: int | str | None = None) -> torch.device:
    """The device of this rank: its accelerator if the machine has any, else the CPU.

    Raises ValueError where the machine has no accelerator of that number.
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
    """Make `device` this process's current one, as collectives, streams and compiled code of a device go by that.

    Raises RuntimeError where the process group cannot send what is on it, or is bound to another one.
    """
    check_backend(device)
    check_bound(device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def check_backend(device: torch.device) -> None:
    """Refuse a group that cannot send what is on `device`: raises RuntimeError that says how to make one that can."""
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
        f"{device.type}, where this model is. Make it with init_process_group({wanted!r}), leave it to learnkit, which "
        f"makes such a one, or {advice}."
    )


def default_backend(device: torch.device) -> str:
    """gloo for what is on the CPU, so that flags and counts are agreed without waiting for a device, and the device's
    own backend.

    Raises RuntimeError where PyTorch has no backend for this kind of device, as for MPS.
    """
    if device.type == "cpu":
        return "gloo"
    backend = dist.Backend.default_device_backend_map.get(device.type)
    if backend is None or not can_send(backend, device):
        raise RuntimeError(
            f"PyTorch {torch.__version__} has no backend by which processes could send what is on {device.type}: train "
            f"on one process, or on the CPU, with Learner(…, device='cpu')."
        )
    return f"cpu:gloo,{device.type}:{backend}"


def can_send(backend: str, device: torch.device) -> bool:
    """Whether a backend takes tensors of such a device; PyTorch lists gloo for MPS too, which it does not send."""
    return device.type in dist.Backend.backend_capability.get(backend, [device.type])


def check_bound(device: torch.device) -> None:
    """Refuse a group that is bound to another device than the one on which this rank trains."""
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
    machine lacks.

    A device whose backend is gloo counts only where the CPU has none: gloo sends its tensors by way of the CPU anyway.
    """
    pairs = backends_of_group()
    kind = torch.accelerator.current_accelerator()  # the one that PyTorch was built for: asks no device
    there = ("cpu",) if kind is None else ("cpu", kind.type)
    return {
        kind: name
        for kind, name in pairs.items()
        if kind in there and (kind == "cpu" or name != "gloo" or "cpu" not in pairs)
    }


def as_local_rank(local_rank: int | str | None) -> int | None:
    """`local_rank` as a number; None for None and for -1, the default that older scripts give their `--local_rank`.

    Raises ValueError where it is no such number, or not the one that the launcher gave this process.
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
    """Refuse a `local_rank` that is not this process's: two processes would share a device, and wait for each other for
    ever.
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
    """Lets parsers that know `--local_rank` take `--local-rank`, and the other way round, in this process.

    `torch.distributed.launch` passes the one, and scripts of old declare the other: argparse would end them.
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
        f"processes a machine as it has devices (--nproc-per-node), or train on the CPU, with device='cpu' for the "
        f"Learner and its data."
    )


def _shows_each_process_its_own_device() -> bool:
    """SLURM's --gpus-per-task and containers hide the other processes' devices: number 0 is then everybody's own."""
    names = (
        "CUDA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
        "ASCEND_RT_VISIBLE_DEVICES",
    )
    return any(os.environ.get(name) and "," not in os.environ[name] for name in names)


# --- what the launcher said --------------------------------------------------


def launch_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT: a launcher's, else derived from SLURM's variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: environment[name] for name in names if environment.get(name)}
    launched_by_slurm = "RANK" not in given and "WORLD_SIZE" not in given and _n_slurm_tasks(environment) > 1
    return {**_slurm_environment(environment), **given} if launched_by_slurm else given


def _n_slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of this `srun` step; 1 in a batch script or shell, which see SLURM's variables too."""
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
    """A port that a step's tasks agree on: below Linux's ephemeral range, apart for neighbouring jobs and steps."""
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
    """One error for all that is missing or contradictory, so that it is repaired in one go."""
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
    """Joins this process to the others that the launcher started; returns whether a group was made.

    Makes none where one exists (it is used and left alone) or in a world of one. `backend`: by default gloo for tensors
    on the CPU and the accelerator's own (NCCL on CUDA) for those on a device. `timeout` in seconds, for joining and for
    every collective; by default PyTorch's. `seed` seeds every rank alike, so that models built afterwards have equal
    weights; `seed_by_rank` then makes dropout differ. Raises RuntimeError that names all missing variables and the
    command to use.
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
    """Leaves the group that `init_process_group` made; returns whether it did. A group made by others is left alone."""
    global _owns_group
    owned, _owns_group = _owns_group and has_group(), False
    if owned:
        dist.destroy_process_group()
    return owned


def get_store() -> dist.Store | None:
    """The key-value store that the ranks share, before a group exists too; None in a world of one."""
    if has_group():
        return None if get_world_size() == 1 else dist.distributed_c10d._get_default_store()
    _check_environment()
    return None if get_world_size() == 1 else dist.PrefixStore("before_group", _rendezvous(None))


def _join(backend: str, device: torch.device, timeout: timedelta | None) -> None:
    """Once in hundreds of times, on a busy machine, gloo's ranks do not connect although all are there: then they try
    again.
    """
    global _n_groups
    choose_interface()
    bound = None if device.type == "cpu" else device
    place = {"rank": get_rank(), "world_size": get_world_size()}
    for attempt in range(N_ATTEMPTS):
        _n_groups += 1  # a second group of the same processes must not meet the first one's keys
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
    """Lets gloo use the network by which this host reaches the first one, unless GLOO_SOCKET_IFNAME says otherwise.

    Left to itself it takes the address that this host's own name has: often 127.0.1.1, where no other host reaches it.
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
    """The network interface by which this machine reaches an IPv4 address or name; None where it does not, or cannot
    tell.
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
    """The store of this launch, opened once: torchelastic's if it runs one, else rank 0's.

    torchelastic keeps its store over restarts, and a gloo group that reads a dead one's addresses there fails (4 of 4
    with --master-port, torch 2.15): the ranks of each start have a part of their own in it.
    """
    given = launch_environment()
    place = (given["MASTER_ADDR"], _integer("MASTER_PORT", 0), get_rank(), get_world_size())
    if place not in _stores:
        limit = timeout or dist.default_pg_timeout
        _stores[place] = _own_part(_open_store(*place, limit), limit)
    return _stores[place]


def _own_part(store: dist.Store, timeout: timedelta) -> dist.Store:
    if not agent_serves():
        return dist.PrefixStore("learnkit", store)  # it begins and ends with these ranks
    try:
        name = name_of_round(dist.PrefixStore("learnkit/rounds", store), get_rank(), get_world_size(), timeout)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        raise _cannot_join(error, timeout) from error
    return dist.PrefixStore(f"learnkit/{name}", store)


def agent_serves() -> bool:
    """Whether the launcher's process serves the store, else rank 0's."""
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
    """Seeds torch (all devices), `random`, and numpy where it is loaded: alike on every rank."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def seed_by_rank(seed: int) -> int:
    """Seeds like `seed_everything`, but differently on each rank (rank 0: `seed` itself); returns the seed used.

    For after the model is built: the same seed everywhere would drop the same units on every rank.
    """
    own = (seed + get_rank() * GOLDEN_RATIO) % 2**63
    seed_everything(own)
    return own
