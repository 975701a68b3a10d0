"""Measures where the time of a fit is spent: data, forward, backward, step, and every callback by its name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learnkit.callbacks.distributed import Distributed
from learnkit.checkpoint.files import as_path
from learnkit.devices.accelerator import wait_for_device
from learnkit.hooks import HOOKS, STAGES, Callback, Run, Stages, overridden
from learnkit.learner import Learner

OF_STAGES = {"forward": "forward", "backward": "backward", "step": "step", "batch": "loop", "epoch": "loop"}


class Profile(Callback):
    """Measure the time of each part of a fit: `print(profile)`, or `profile.seconds`, {part: seconds}.

    Parts are forward, backward, step, data (waiting for a training batch), evaluation data, loop (the rest), and each
    callback's class, without the parts that run inside it. Measuring costs a few microseconds per part.

    Args:
        trace: a file for torch.profiler's trace of `n_steps` training batches after the first `skip` ones, as JSON for
            chrome://tracing or Perfetto; only rank 0 writes it.
        n_steps: number of training batches in the trace.
        skip: number of training batches before the trace.
        wait: wait for the device at the end of each part, so that the device's work counts in the part that started it.
            False: the times are those of Python, which runs ahead of the device; `backward`, or a part that reads from
            the device, then includes all the waiting.

    Raises:
        ValueError: when `n_steps` is below 1, or `skip` below 0.

    Example:
        >>> learn.fit(1, callbacks=[profile := Profile()])  # doctest: +SKIP
        >>> print(profile)  # doctest: +SKIP
    """

    order = Distributed.order + 5
    unique = True
    in_trials = False

    def __init__(
        self, trace: str | Path | None = None, *, n_steps: int = 10, skip: int = 5, wait: bool = False
    ) -> None:
        if n_steps < 1 or skip < 0:
            raise ValueError(f"n_steps={n_steps}, skip={skip}: expected n_steps >= 1 and skip >= 0.")
        self.trace, self.n_steps, self.skip, self.wait = None if trace is None else as_path(trace), n_steps, skip, wait
        self.seconds: dict[str, float] = {}
        self.n_calls: dict[str, int] = {}
        self.n_batches = 0
        self.nested: list[float] = []  # for each current part, the seconds of the parts within it
        self.profiler: Any = None

    def around_fit(self, learn: Learner, run: Run) -> None:
        self.seconds, self.n_calls, self.n_batches, self.nested = {}, {}, 0, []
        stages, timed = learn.stages, [cb for cb in learn.running if cb is not self]
        for callback in timed:
            self.time_hooks(callback, learn)
        bodies = {stage: self.timed(self.part_of(stage, learn), getattr(learn, f"_{stage}"), learn) for stage in STAGES}
        began = time.perf_counter()
        try:
            learn.stages = Stages(learn, learn.running, bodies)
            if self.trace is None or learn.rank:
                run()
            else:
                self.run_traced(run)
        finally:
            self.seconds["loop"] = (
                self.seconds.get("loop", 0.0) + time.perf_counter() - began - sum(self.seconds.values())
            )
            learn.stages = stages
            for callback in timed:
                for hook in HOOKS:
                    vars(callback).pop(hook, None)

    def after_batch(self, learn: Learner) -> None:
        self.n_batches += learn.training
        if self.profiler is not None and learn.training:
            self.profiler.step()

    # --- measuring -----------------------------------------------------------
    def time_hooks(self, callback: Callback, learn: Learner) -> None:
        """During the fit, replace each hook by an attribute of the object that measures the class's hook."""
        name = type(callback).__name__
        for hook in filter(lambda hook: overridden(callback, hook), HOOKS):
            own = getattr(callback, hook)
            setattr(
                callback,
                hook,
                self.timed_around(name, own, learn) if hook.startswith("around_") else self.timed(name, own, learn),
            )

    def timed(self, part: Callable[[], str] | str, work: Callable[..., Any], learn: Learner) -> Callable[..., Any]:
        def run_timed(*args: Any) -> Any:
            self.nested.append(0.0)
            began = time.perf_counter()
            try:
                return work(*args)
            finally:
                self.end(part if isinstance(part, str) else part(), began, learn)

        # The error of a hook names the callback that the hook is bound to.
        run_timed.__self__ = getattr(work, "__self__", self)  # type: ignore[attr-defined]
        return run_timed

    def timed_around(
        self, part: str, work: Callable[[Learner, Run], None], learn: Learner
    ) -> Callable[[Learner, Run], None]:
        def around(learn: Learner, run: Run) -> None:
            work(learn, inner(run))

        def inner(run: Run) -> Run:
            return lambda: self.within(run)

        return self.timed(part, around, learn)

    def within(self, run: Run) -> None:
        """Run the stage inside an around_ hook, whose time must not include the stage's."""
        began = time.perf_counter()
        n = len(self.nested)
        before = self.nested[-1] if n else 0.0
        try:
            run()
        finally:
            if n:
                self.nested[-1] = before + time.perf_counter() - began

    def end(self, part: str, began: float, learn: Learner) -> None:
        if self.wait:
            wait_for_device(learn.device)
        elapsed, inner = time.perf_counter() - began, self.nested.pop()
        self.seconds[part] = self.seconds.get(part, 0.0) + elapsed - inner
        self.n_calls[part] = self.n_calls.get(part, 0) + 1
        if self.nested:
            self.nested[-1] += elapsed

    def part_of(self, stage: str, learn: Learner) -> Callable[[], str] | str:
        if stage == "train":
            return "data"
        if stage == "validate":
            return "evaluation data"
        if stage == "forward":
            return lambda: "forward" if learn.training else "evaluation forward"
        return OF_STAGES.get(stage, "loop")

    def run_traced(self, run: Run) -> None:
        from torch.profiler import profile, schedule

        assert self.trace is not None
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        plan = schedule(wait=max(0, self.skip - 1), warmup=min(1, self.skip), active=self.n_steps, repeat=1)
        with profile(
            schedule=plan, on_trace_ready=lambda made: made.export_chrome_trace(str(self.trace))
        ) as self.profiler:
            try:
                run()
            finally:
                self.profiler = None

    # --- reading -------------------------------------------------------------
    def __str__(self) -> str:
        total, n = sum(self.seconds.values()), max(1, self.n_batches)
        lines = [f"{'part':24}  {'seconds':>8}  {'share':>7}  {'per training batch':>18}  {'calls':>8}"]
        for part, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            share, each = 100 * seconds / (total or 1), 1e6 * seconds / n
            lines.append(f"{part:24}  {seconds:8.3f}  {share:5.1f} %  {each:15,.1f} µs  {self.n_calls.get(part, 0):8,}")
        return "\n".join([*lines, f"{'all':24}  {total:8.3f}  {100:5.1f} %  {1e6 * total / n:15,.1f} µs"])
