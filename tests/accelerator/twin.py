"""The stand-in accelerator: after `twin.load()` torch has devices "twin:0", "twin:1", ... (see twin.cpp and
README.md).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [Path(__file__).with_name(name) for name in ("twin.cpp", "streams.h", "device.h", "operators.h", "twinccl.h")]
OWN = (str(ROOT / "learnkit") + os.sep, str(ROOT / "callbacks") + os.sep)  # whose lines a wait is put down to
LAUNCH = str(ROOT / "learnkit" / "distributed" / "launch.py")  # everything in a rank is called from there
TORCH = os.path.dirname(torch.__file__) + os.sep
DEFAULT_MEMORY = 1 << 33
_C: Any = None


# Build


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def missing() -> str | None:
    """Why the device cannot be built here, or None."""
    if sys.platform != "linux":
        return f"the stand-in accelerator is built on Linux, and this is {sys.platform}"
    if compiler() is None:
        return "the stand-in accelerator needs a C++ compiler, and there is none: install g++, or set CXX"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"the stand-in accelerator needs Python's headers, and there is no {header}: install python3-dev"
    if not dist.is_available() or not dist.is_gloo_available():
        return "the stand-in accelerator needs a torch with gloo"
    return None


def build() -> Path:
    """The extension's file, compiled when there is none for this source, torch and Python; other processes wait
    meanwhile.
    """
    facts = (
        *[source.read_text() for source in SOURCES],
        torch.__version__,
        sys.version,
        os.environ.get("TWIN_CFLAGS", "-O1"),
    )
    folder = ROOT / "build" / "accelerator" / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    library = folder / "twin_C.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel even where the process is killed
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                compile_to(Path(partial) / "twin_C.so", shlex.split(facts[-1]))
                os.replace(Path(partial) / "twin_C.so", library)
    return library


def compile_to(library: Path, flags: list[str]) -> None:
    torch_folder = Path(torch.__file__).parent
    include = [
        torch_folder / "include",
        torch_folder / "include/torch/csrc/api/include",
        sysconfig.get_paths()["include"],
    ]
    macros = [
        "-DTORCH_EXTENSION_NAME=twin_C",
        "-DUSE_DISTRIBUTED",
        "-DUSE_C10D_GLOO",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
    command = [
        str(compiler()),
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-w",
        *flags,
        *macros,
        *[f"-I{path}" for path in include],
        str(SOURCES[0]),
        "-o",
        str(library),
        *libraries,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the stand-in accelerator does not compile: {shlex.join(command)}\n{done.stderr[-6000:]}")


# The device


def load(devices: int | None = None, memory: int | None = None, float64: bool | None = None) -> None:
    """Registers the device with torch, once in a process; children that are forked have it as well.

    What is not given comes from the environment: TWIN_DEVICES (default 2), TWIN_MEMORY (bytes of each device, default 8
    GiB), TWIN_FLOAT64 (0: the device has no float64). Raises RuntimeError where `missing()` gives a reason.
    """
    global _C
    if devices is None:
        devices = int(os.environ.get("TWIN_DEVICES", "2"))
    if memory is None:
        memory = int(os.environ.get("TWIN_MEMORY", str(DEFAULT_MEMORY)))
    if float64 is None:
        float64 = os.environ.get("TWIN_FLOAT64", "1") != "0"
    if _C is None:
        if (reason := missing()) is not None:
            raise RuntimeError(reason)
        path = str(build())
        loader = importlib.machinery.ExtensionFileLoader("twin_C", path)
        spec = importlib.util.spec_from_loader("twin_C", loader)
        assert spec is not None
        extension: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(extension)
        torch.utils.rename_privateuse1_backend("twin")
        extension.start(devices, float64)
        _C = extension
        torch._register_device_module("twin", make_module())  # type: ignore[attr-defined]
        torch.utils.generate_methods_for_privateuse1_backend()
        dist.Backend.register_backend("twinccl", create_group, extended_api=True, devices=["twin"])
    if devices != _C.device_count():
        raise RuntimeError(f"twin has {_C.device_count()} devices in this process already, not {devices}")
    _C.float64(float64)
    for device in range(devices):
        _C.limit(memory, device)


def index_of(device: Any) -> int:
    if device is None:
        return _C.current_device()
    if isinstance(device, int):
        return _C.current_device() if device < 0 else device
    index = torch.device(device).index
    return _C.current_device() if index is None else index


class device_context:
    """`with torch.twin.device(1):`"""

    def __init__(self, device: Any) -> None:
        self.index = index_of(device)

    def __enter__(self) -> None:
        self.before = torch.accelerator.current_device_index()
        torch.accelerator.set_device_index(self.index)

    def __exit__(self, *_: object) -> None:
        torch.accelerator.set_device_index(self.before)


def make_module() -> types.ModuleType:
    """`torch.twin`, as `torch.cuda`."""
    module: Any = types.ModuleType("torch.twin")

    def generator(device: Any = None) -> torch.Generator:
        return _C.default_generator(index_of(device))

    def manual_seed_all(seed: int) -> None:
        for i in range(_C.device_count()):
            generator(i).manual_seed(seed)

    module.is_available = lambda: True
    module.is_initialized, module._is_in_bad_fork = _C.is_used, _C.is_in_bad_fork
    module.init = lambda: None
    module._lazy_call = lambda call, **_: call()
    module.device_count, module.current_device = _C.device_count, _C.current_device
    module.set_device = lambda device: torch.accelerator.set_device_index(index_of(device))
    module.device = device_context
    module.synchronize = lambda device=None: torch.accelerator.synchronize(index_of(device))
    module.Stream, module.Event = torch.Stream, torch.Event
    module.stream = lambda stream: nullcontext() if stream is None else stream
    module.current_stream = lambda device=None: torch.accelerator.current_stream(index_of(device))
    module.default_stream = lambda device=None: torch.Stream(stream_id=0, device_index=index_of(device), device_type=20)
    module.set_stream = torch.accelerator.set_stream
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.is_bf16_supported = lambda: True
    module.get_rng_state = lambda device=None: generator(device).get_state()
    module.set_rng_state = lambda state, device=None: generator(device).set_state(state)
    module.manual_seed = lambda seed: generator().manual_seed(seed)
    module.manual_seed_all = manual_seed_all
    module.initial_seed = lambda: generator().initial_seed()
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "memory_stats",
        "empty_cache",
        "reset_peak_memory_stats",
        "reset_accumulated_memory_stats",
    ):
        setattr(module, name, getattr(torch.accelerator, name))
    return module


def create_group(options: Any, *_: Any) -> Any:
    """twinccl has a gloo group of its own, through which copies go."""
    store = dist.PrefixStore("twinccl", options.store)  # pyright: ignore[reportPrivateImportUsage]
    gloo = dist.ProcessGroupGloo(store, options.group_rank, options.group_size, options.timeout)
    return _C.make_twinccl(gloo, options.group_rank, options.group_size)


# What tests ask and set


def limit(n_bytes: int | None, device: Any = 0) -> None:
    """The memory of a device from now on, in bytes; None: 8 GiB."""
    _C.limit(DEFAULT_MEMORY if n_bytes is None else n_bytes, index_of(device))


@contextmanager
def without_float64() -> Iterator[None]:
    """Meanwhile making a float64 tensor on the device raises TypeError, as on MPS."""
    had = _C.float64(False)
    try:
        yield
    finally:
        _C.float64(had)


@contextmanager
def unchecked() -> Iterator[None]:
    """Meanwhile a use that is not ordered after another stream's is no error, and sees what is there: poison, say."""
    was = _C.check_races(False)
    try:
        yield
    finally:
        _C.check_races(was)


def races() -> list[str]:
    """What was found where nothing could be raised, since it was last asked: memory freed or pinned memory changed too
    early.
    """
    return _C.races()


class Wait(NamedTuple):
    """One wait of the host for the device."""

    kind: str  # "item", "device to host", "host to device", "op" or "synchronize"
    op: str
    place: str  # file:line function, of the innermost frame in learnkit or callbacks


def place() -> str:
    """Of the innermost frame in learnkit or callbacks, else of the innermost one outside of torch."""
    frame, outside = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OWN) and name != LAUNCH:
            break
        if outside is None and name != __file__ and not name.startswith(TORCH):
            outside = frame
        frame = frame.f_back
    frame = frame or outside
    if frame is None:
        return "a thread without Python"  # autograd's
    return f"{frame.f_code.co_filename.removeprefix(str(ROOT) + os.sep)}:{frame.f_lineno} {frame.f_code.co_name}"


class Waits:
    """See `waits`."""

    def __init__(self, error: bool) -> None:
        self.error = error
        self.events: list[Wait] = []

    def __call__(self, kind: str, op: str) -> str | None:
        wait = Wait(kind, op, place())
        self.events.append(wait)
        return f"the host waits for the device: {kind} ({op}) at {wait.place}" if self.error else None

    def __len__(self) -> int:
        return len(self.events)

    def __iter__(self) -> Iterator[Wait]:
        return iter(self.events)

    def counted(self) -> Counter[Wait]:
        return Counter(self.events)


@contextmanager
def waits(error: bool = False) -> Iterator[Waits]:
    """Counts where the host waits for the device, in any thread; `error=True` raises RuntimeError at the place instead.

    >>> with twin.waits() as seen: loss.item()
    >>> seen.counted()
    Counter({Wait(kind='item', op='float[]', place='tests/…:12 test_…'): 1})
    """
    seen = Waits(error)
    before = _C.on_wait(seen)
    try:
        yield seen
    finally:
        _C.on_wait(before)
