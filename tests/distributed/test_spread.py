"""What goes beside `to_fsdp` and how much that is DDP's and one process's; what does not is refused before the first
step.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner, Together
from learnkit.callbacks import EMA, SWA, Checkpoint, ClipGradients, Lookahead
from learnkit.devices.dtensor import whole
from learnkit.distributed import get_world_size
from tests.pages import Page

N, GLOBAL = 72, 12  # 6 steps an epoch


class Net(nn.Module):
    """With weights that leave a rank without a part, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.narrow, self.last = (
            nn.Linear(5, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 1),
            nn.Linear(8, 3),
        )
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        if self.training:
            self.seen.add_(1)  # type: ignore[operator]
        return self.last(x) * self.narrow(x)


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)  # type: ignore[assignment]


def learner(how: str, *callbacks: Callback, model: Any = Net, **options: Any) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(N, 5).double()
    y = x[:, :3].argmax(1)
    data = DataBunch.from_tensors((x, y), (x[:15], y[:15]), bs=GLOBAL // get_world_size(), seed=3)
    learn = Learner(
        data, (model if isinstance(model, nn.Module) else model()).double(), lr=0.05, callbacks=callbacks, **options
    )
    return learn if how == "alone" else getattr(learn, how)()


def fit(learn: Learner, n_epochs: int = 2, **options: Any) -> Learner:
    with learn.no_logging():
        return learn.fit(n_epochs, **options)


def numbers(learn: Learner) -> list[float]:
    """The model, what averages keep, and what was measured."""
    averages = [
        cb.average.values.values() for cb in learn.callbacks if isinstance(cb, (EMA, SWA)) and cb.average is not None
    ]
    tensors = [*learn.model.state_dict().values(), *(t for average in averages for t in average)]
    return [
        *torch.cat([whole(t.detach()).double().flatten() for t in tensors]).tolist(),
        *(v for row in learn.recorder.values for v in row[1:]),
    ]  # train_loss is rounded to float32


def close(a: list[float], b: list[float]) -> bool:
    return a == pytest.approx(b, rel=1e-9, abs=1e-9)


def from_readme() -> Any:
    [block] = [block for block in Page("README.md").blocks if "class AverageWeights" in block.code]
    source = block.code[: block.code.index("def net()")]
    namespace: dict[str, Any] = {"torch": torch, "Callback": Callback, "Learner": Learner}
    exec(source, namespace)
    return namespace["AverageWeights"](0.7)


BESIDE: dict[str, Callable[[], list[Callback]]] = {
    "EMA": lambda: [EMA(0.7)],
    "SWA": lambda: [SWA(0.1)],
    "SWA measures": lambda: [SWA(0.1, update_bn=True)],
    "Lookahead": lambda: [Lookahead(2)],
    "README's": lambda: [from_readme()],
    "all": lambda: [Lookahead(2), EMA(0.7), SWA(0.1)],
}


# --- equal to ----------------------------------------------------------------
@pytest.mark.parametrize("beside", BESIDE)
def test_averages_beside_batch_norm_are_those_of_ddp(beside, ranks):
    def fn():
        return [numbers(fit(learner(how, *BESIDE[beside](), model=Normed))) for how in ("to_distributed", "to_fsdp")]

    for n in (2, 3):
        shares = ranks(n, fn, timeout=60)
        for ddp, fsdp in shares:
            assert close(ddp, fsdp) and fsdp == shares[0][1]


@pytest.mark.parametrize("beside", BESIDE)
def test_without_batch_norm_they_are_those_of_one_process(beside, ranks):
    def fn(how: str):
        return numbers(fit(learner(how, *BESIDE[beside]())))

    alone = fn("alone")
    for n in (2, 3):
        for how in ("to_distributed", "to_fsdp"):
            for share in ranks(n, fn, how, timeout=60):
                assert close(share, alone), (n, how)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 0.5, float("inf")])
@pytest.mark.parametrize("n", [2, 3])
def test_gradients_are_clipped_by_every_norm_as_on_one_process(n, norm_type, ranks):
    def fn(how: str):
        clip = ClipGradients(0.02, norm_type=norm_type)
        return numbers(fit(learner(how, clip))), clip.norms

    alone, norms = fn("alone")
    for how in ("to_distributed", "to_fsdp"):
        for found, found_norms in ranks(n, fn, how):
            assert close(found, alone) and close(found_norms, norms)


@pytest.mark.parametrize("norm_type", [0, -1.0, -float("inf"), float("nan")])
def test_what_is_no_norm_to_clip_by_is_refused(norm_type):
    with pytest.raises(ValueError, match=r"norm_type=.*: expected a number above 0, such as 2, 1 or float\('inf'\)"):
        ClipGradients(norm_type=norm_type)


# --- checkpoi ----------------------------------------------------------------
class Killed(Exception):
    pass


class Kill(Callback):
    order = -200

    def before_batch(self, learn: Learner) -> None:
        if learn.training and (learn.epoch, learn.batch_index) == (1, 4):
            raise Killed


@pytest.mark.parametrize("async_write", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_averages_resume_as_if_the_fit_had_never_stopped(beside, async_write, ranks, tmp_path):
    def fn(folder: Path, how: str) -> None:
        def checkpoint() -> Checkpoint:
            return Checkpoint(folder / how, every_n_steps=3, async_write=async_write)

        plain = fit(learner(how, *BESIDE[beside](), model=Normed), 3)
        with pytest.raises(Killed):
            fit(learner(how, *BESIDE[beside](), checkpoint(), model=Normed), 3, callbacks=[Kill()])
        again = fit(learner(how, *BESIDE[beside](), checkpoint(), model=Normed), 3, resume=True)
        assert again.resumed is not None and (again.resumed["epoch"], again.resumed["step"]) == (1, 9)
        assert numbers(again) == numbers(plain)

    fn(tmp_path, "alone")
    for how in ("to_distributed", "to_fsdp"):
        ranks(2, fn, tmp_path, how, timeout=60)


def test_a_validation_that_copies_into_the_weights_waits_until_a_checkpoint_has_copied_them(tmp_path):
    """Of the last batch before the validation, in a thread that is late."""
    from learnkit.checkpoint import snapshot as snapshots

    in_memory = snapshots.copied_to_host
    import time

    def late(*args: Any) -> Any:
        time.sleep(0.2)
        return in_memory(*args)

    plain = fit(learner("alone"), 1)
    learn = learner(
        "alone", from_readme(), Checkpoint(tmp_path, every_n_steps=6, every_n_epochs=None, async_write=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learnkit.callbacks.checkpoint.copied_to_host", late)
        fit(learn, 1)
    for path in snapshots.all_in(tmp_path):
        model = snapshots.read_snapshot(path)[0]["model"]
        assert all(torch.equal(value, plain.model.state_dict()[name]) for name, value in model.items())


# --- refus -------------------------------------------------------------------
OPTIMIZERS: dict[str, Any] = {
    "Muon": lambda model: Together(
        torch.optim.Muon([p for p in model.parameters() if p.ndim == 2]),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2]),
    ),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_whole_matrices_are_refused(name, ranks):
    message = f"{name} cannot be combined with to_fsdp: it computes with whole matrices"

    def fn() -> None:
        model = Net()
        with pytest.raises(ValueError, match=message):
            learner("to_fsdp", model=model, opt_func=OPTIMIZERS[name](model.double()))
        if name == "Muon":
            return
        learn = learner("to_fsdp", opt_func=partial(getattr(torch.optim, name)))
        before = numbers(learn)
        with pytest.raises(ValueError, match=message):
            fit(learn)
        assert learn.step == 0 and numbers(learn) == before

    ranks(2, fn)


class SwapsByHand(Callback):
    def before_fit(self, learn: Learner) -> None:
        self.average = [p.detach().clone() for p in learn.model.parameters()]

    def after_step(self, learn: Learner) -> None:
        for p, average in zip(learn.model.parameters(), self.average, strict=True):
            average.lerp_(p.detach(), 0.3)

    def around_validate(self, learn: Learner, run: Any) -> None:
        self.swap(learn)
        try:
            run()
        finally:
            self.swap(learn)

    def swap(self, learn: Learner) -> None:
        for p, average in zip(learn.model.parameters(), self.average, strict=True):
            p.data, average.data = average.data, p.data


class Clamps(Callback):
    def after_step(self, learn: Learner) -> None:
        for p in learn.model.parameters():
            p.data = p.data.clamp(-0.5, 0.5)


class ClampsInPlace(Callback):
    def after_step(self, learn: Learner) -> None:
        for p in learn.model.parameters():
            p.data.clamp_(-0.5, 0.5)


@pytest.mark.parametrize("callback", [SwapsByHand, Clamps])
def test_data_that_is_replaced_by_hand_is_refused_where_weights_are_in_parts_and_works_elsewhere(callback, ranks):
    def fn(how: str):
        return numbers(fit(learner(how, callback())))

    def refused() -> None:
        with pytest.raises(
            RuntimeError, match=r"the data of 8 parameters was replaced: first\.weight.*write p\.copy_\(value\)"
        ):
            fit(learn := learner("to_fsdp", callback()))
        assert learn.step == (1 if callback is Clamps else 6)

    alone = fn("alone")
    for share in ranks(2, fn, "to_distributed"):
        assert close(share, alone)
    for _ in range(3):
        ranks(2, refused)  # a crash is a matter of luck


def test_data_that_is_changed_in_place_is_changed_in_parts_too(ranks):
    def fn(how: str):
        return numbers(fit(learner(how, ClampsInPlace())))

    alone = fn("alone")
    for share in ranks(2, fn, "to_fsdp"):
        assert close(share, alone)


@pytest.mark.parametrize(
    "options",
    [
        dict(algorithm="fp16"),
        dict(algorithm="decentralized", period=2),
        dict(delay_allreduce=True),
        dict(sync_bn=True),
        dict(find_unused_parameters=True),
    ],
)
def test_what_only_ddp_can_do_is_refused_beside_to_fsdp_whichever_came_first_alone_too(options, ranks):
    name = next(iter(options))

    def fn() -> None:
        with pytest.raises(
            ValueError,
            match=rf"to_fsdp after to_distributed\({name}=.*\): fully_shard reduces gradients in its own",
        ):
            learner("alone").to_distributed(**options).to_fsdp()
        with pytest.raises(TypeError, match="sharded already, by to_fsdp"):
            learner("to_fsdp").to_distributed(**options)
        fit(learner("alone").to_distributed(**options).to_distributed().to_fsdp(), 1)

    fn()
    ranks(2, fn)
