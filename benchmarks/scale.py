"""Memory and time of a 12-block transformer with `learn.to_fsdp()`, on two ranks of one thread each.

    python benchmarks/scale.py [--cases memory time] [--runs 3] [--rounds 11] [--width 512] [--tokens 512]
                               [--clock wall]

memory      the largest resident memory of a rank in three training steps with AdamW, minus its memory before the model
            was built; each way in its own processes, `--runs` times. Also the bytes of weights, gradients and optimizer
            states that a rank holds
time        seconds of a fit of `--steps` steps (a model of a quarter of the width) compared with the same fully_shard,
            AdamW and one cycle by hand; both in the same processes, interleaved, round by round. At the end all weights
            must agree to 1e-6, or the script fails
ray         seconds of a fit of `--epochs` epochs of `--steps` steps with to_distributed() in two workers of Ray Train,
            each epoch with RayReport, compared with the same in two processes of torchrun, each epoch with Checkpoint;
            start-up is excluded. Both run all the time and take turns. Needs ray[train]; only on request

`--tokens`, the tokens in a rank's batch, decides the composition of the memory: activations are not sharded, the rest
is. Goals: memory at most 0.65 × DDP's, with activation checkpointing 0.5 ×; time at most 1.03 × by hand; Ray 1.05 ×
torchrun.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it; here it does not count in the memory of any way
import torch.distributed as dist
import torch.distributed.fsdp
from measure import finish, interleave, machine, ratios, spread
from torch import Tensor, nn
from torch.nn import functional as F

from learnkit import DataBunch, Learner, TensorLoader
from learnkit.callbacks import Checkpoint, Progress, Recorder
from learnkit.devices.dtensor import own_part, whole
from learnkit.distributed import get_device, get_rank, init_process_group, launch
from learnkit.ray import RayReport, fit_on_ray

N_RANKS, N_BLOCKS, N_TOKENS, N_CLASSES, LR = 2, 12, 32, 64, 1e-3  # N_TOKENS: per sample
MB = 2**20


class Transformer(nn.Module):
    """A transformer of 12 blocks that classifies each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(N_CLASSES, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(N_BLOCKS)
        )
        self.head = nn.Linear(width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def model(width: int) -> Transformer:
    torch.manual_seed(0)
    return Transformer(width)


def samples(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(N_CLASSES, (n, N_TOKENS), generator=generator), torch.randint(
        N_CLASSES, (n,), generator=generator
    )


def learner(width: int, bs: int, n_steps: int) -> Learner:
    data = DataBunch.from_tensors(samples(bs * N_RANKS * n_steps), bs=bs, seed=0)
    return (
        Learner(data, model(width), loss_func=F.cross_entropy, wd=0.0)
        .remove_callback(Progress)
        .remove_callback(Recorder)
    )


# --- memory ------------------------------------------------------------------
WAYS: dict[str, Callable[[Learner], Learner]] = {
    "to_distributed": lambda learn: learn.to_distributed(),
    "to_fsdp, blocks": lambda learn: learn.to_fsdp(blocks=nn.TransformerEncoderLayer),
    "to_fsdp, blocks, activations anew": lambda learn: learn.to_fsdp(
        blocks=nn.TransformerEncoderLayer, activation_checkpointing=True
    ),
}


def memory_of(way: str, width: int, bs: int) -> tuple[float, float, float]:
    """Return (peak memory in MB, bytes of state in MB, seconds per step) of this rank."""
    init_process_group()
    torch.set_num_threads(1)
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()
    dist.all_reduce(torch.ones(1))
    gc.collect()
    before = resident("VmRSS")
    learn = WAYS[way](learner(width, bs, 3))
    learn.fit(1, LR, max_steps=1)  # creates the optimizer's state; memory that only the first step needs is free again
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.perf_counter()
    learn.fit(1, LR)
    seconds = (time.perf_counter() - start) / 3
    tensors = [*learn.model.parameters(), *(t for values in learn.opt.state.values() for t in values.values())]
    return resident("VmHWM") - before, sum(own_part(t).nbytes for t in tensors) / MB, seconds


def resident(kind: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def memory(args: argparse.Namespace) -> None:
    bs = args.tokens // N_TOKENS
    n = sum(p.numel() for p in model(args.width).parameters())
    print(
        f"\nmemory: width {args.width}, {n / 1e6:.1f} million weights, {bs} samples of {N_TOKENS} tokens a rank; n = "
        f"{args.runs} runs"
    )
    peaks: dict[str, list[float]] = {way: [] for way in WAYS}
    state: dict[str, float] = {}
    for _ in range(args.runs):
        for way in WAYS:
            results = launch(memory_of, N_RANKS, way, args.width, bs, every_rank=True)
            peaks[way].append(max(peak for peak, _, _ in results))
            state[way] = max(held for _, held, _ in results)
    base = peaks["to_distributed"]
    print(f"{'':36} {'MB at most, a rank':24} {'of them state':14} ratio to DDP")
    for way, values in peaks.items():
        ratio = spread([a / b for a, b in zip(values, base, strict=True)])
        print(f"{way:36} {spread(values, 0):24} {state[way]:10.0f}     {ratio}", flush=True)


# --- time --------------------------------------------------------------------
def by_hand(width: int, bs: int, n_steps: int) -> tuple[nn.Module, Callable[[], None]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = get_device()
    net, mesh = model(width).to(device), init_device_mesh(device.type, (N_RANKS,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    opt = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0, fused=True)
    whole_one = TensorLoader(samples(bs * N_RANKS * n_steps), bs=bs, shuffle=True, drop_last=True, seed=0)
    loader = whole_one.to(device).sharded(get_rank(), N_RANKS, even=True)
    epochs = iter(range(10**6))

    def fit() -> None:
        net.train()
        loader.set_epoch(next(epochs))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            opt, LR, total_steps=n_steps, pct_start=(int(n_steps * 0.3) + 1) / n_steps
        )
        for x, y in loader:
            F.cross_entropy(net(x), y).backward()
            opt.step()
            opt.zero_grad()
            schedule.step()

    return net, fit


def by_learnkit(width: int, bs: int, n_steps: int) -> tuple[nn.Module, Callable[[], None]]:
    learn = learner(width, bs, n_steps).to_fsdp(blocks=nn.TransformerEncoderLayer)
    return learn.model, lambda: (learn.fit_one_cycle(1, LR), None)[1]


def time_of(args: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Return (seconds of each round of each way, the largest difference between their weights)."""
    init_process_group()
    torch.set_num_threads(1)
    device = get_device()
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)

    def clock() -> float:
        finish(device)
        dist.barrier()
        return {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]()

    size = args.width // 4, args.tokens // N_TOKENS, args.steps
    made = {"by hand": by_hand(*size), "to_fsdp": by_learnkit(*size)}
    seconds = interleave({name: fit for name, (_, fit) in made.items()}, args.rounds, clock)
    pairs = zip(*(net.parameters() for net, _ in made.values()), strict=True)
    return seconds, max((whole(a.detach()) - whole(b.detach())).abs().max().item() for a, b in pairs)


def timing(args: argparse.Namespace) -> None:
    print(
        f"\ntime: width {args.width // 4}, {args.tokens // N_TOKENS} samples a rank; {args.clock} seconds of "
        f"{args.steps} steps, n = {args.rounds} rounds"
    )
    seconds, difference = launch(time_of, N_RANKS, args)
    for name, values in seconds.items():
        ratio = "" if name == "by hand" else f"  ratio {spread(ratios(seconds, name, 'by hand'))}"
        print(f"{name:36} {statistics.median(values):7.3f}{ratio}", flush=True)
    if difference > 1e-6:
        sys.exit(f"the two did not train alike: {difference:.1e}")
    print(f"the largest difference between their weights: {difference:.0e}")


# --- Ray ---------------------------------------------------------------------
def take_turns(config: dict[str, Any]) -> None:
    """Run a rank of Ray or of torchrun: it fits whenever a file in the folder gives it its turn."""
    folder, kind = Path(config["folder"]), config["kind"]
    init_process_group()
    torch.set_num_threads(1)
    learn = learner(config["width"] // 4, config["tokens"] // N_TOKENS, config["steps"]).to_distributed()
    for i in range(config["rounds"] + 1):
        while not (folder / f"{i} {kind}").exists():
            time.sleep(0.01)
        keep = RayReport() if kind == "ray" else Checkpoint(folder / f"checkpoints {i}")
        dist.barrier()
        start = time.perf_counter()
        learn.fit_one_cycle(config["epochs"], LR, callbacks=[keep])
        dist.barrier()
        if learn.rank == 0:
            write(folder / f"{i} {kind} done", str(time.perf_counter() - start))


def write(path: Path, text: str) -> None:
    """Write a file atomically, because others wait for it."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


def ray_workers(config: dict[str, Any]) -> None:
    """Run both workers until the end of their last turn."""
    import ray  # type: ignore[import-not-found]

    here = str(Path(__file__).resolve().parent)
    variables = {"PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)]), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": variables},
    )
    # imported by its module's name, under which the workers can import it, too
    from scale import take_turns as as_worker  # type: ignore[import-not-found]

    fit_on_ray(
        as_worker, num_workers=2, config={**config, "kind": "ray"}, storage_path=Path(config["folder"]) / "storage"
    )
    ray.shutdown()


def on_ray(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "folder": folder,
            **{name: getattr(args, name) for name in ("width", "tokens", "steps", "rounds", "epochs")},
        }
        by_torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        own = subprocess.Popen(
            [*by_torchrun, __file__, "--rank-of", json.dumps(config)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        ray = subprocess.Popen(
            [sys.executable, __file__, "--ray-of", json.dumps(config)], env={**os.environ, "RAY_AUTH_MODE": "disabled"}
        )
        seconds: dict[str, list[float]] = {"torchrun": [], "ray": []}
        try:
            for i in range(args.rounds + 1):
                for kind in list(seconds)[:: 1 if i % 2 else -1]:
                    write(Path(folder, f"{i} {kind}"), "")
                    done = Path(folder, f"{i} {kind} done")
                    while not done.exists():
                        if own.poll() or ray.poll():
                            sys.exit("one of the two ended before its turns were over")
                        time.sleep(0.01)
                    if i:
                        seconds[kind].append(float(done.read_text()))  # the first round is dropped
            if own.wait() or ray.wait():
                sys.exit("one of the two failed")
        finally:
            for process in (own, ray):
                process.terminate()
                process.wait()
    print(
        f"\nray: width {args.width // 4}, {args.tokens // N_TOKENS} samples a rank; wall seconds of {args.epochs} "
        f"epochs of {args.steps} steps, each kept, n = {args.rounds} rounds"
    )
    print(f"torchrun, Checkpoint {statistics.median(seconds['torchrun']):7.3f}")
    print(
        f"Ray, RayReport       {statistics.median(seconds['ray']):7.3f}  ratio "
        f"{spread(ratios(seconds, 'ray', 'torchrun'))}",
        flush=True,
    )


CASES = {"memory": memory, "time": timing, "ray": on_ray}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["memory", "time"])
    parser.add_argument("--epochs", type=int, default=3, help="epochs in the case of Ray")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--ray-of", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512, help=f"tokens in a rank's batch, a multiple of {N_TOKENS}")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    if args.rank_of:
        return take_turns({**args.rank_of, "kind": "torchrun"})
    if args.ray_of:
        return ray_workers(args.ray_of)
    torch.set_num_threads(1)
    print(machine(), f"{N_RANKS} ranks, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", sep="\n")
    for case in args.cases:
        CASES[case](args)


if __name__ == "__main__":
    # Return free memory to the system at once, so that resident memory is used memory. A process reads these variables
    # when it starts.
    wanted = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    main()
