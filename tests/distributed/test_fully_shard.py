"""`learn.to_fsdp()`: a model spread over two ranks trains, measures, saves and resumes as one that is not."""

import os
import signal
import time
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from learnkit import Callback, DataBunch, Learner, StopFit, StopTrain, Together, accuracy
from learnkit.callbacks import (
    EMA,
    SAM,
    SWA,
    Accumulate,
    AutoMicrobatch,
    Checkpoint,
    ClipGradients,
    FullyShard,
    GradientStats,
    Lookahead,
    SaveBest,
    TerminateOnNaN,
)
from learnkit.devices.dtensor import is_shard, own_part, whole
from learnkit.distributed import RankFailed, ShardedStream, get_rank, get_world_size, init_process_group, shard_model
from learnkit.distributed.request import SAVE
from learnkit.trials.trial import unchanged

N, N_VALID, GLOBAL = 41, 13, 12  # three whole global batches and one of 5 samples


class Block(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    def __init__(self, p: float = 0.0, *, norm: bool = False) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 8), nn.ModuleList(Block(p) for _ in range(3))
        self.norm, self.last = nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x))


def net(p: float = 0.0, **options: Any) -> Net:
    torch.manual_seed(0)
    return Net(p, **options)


def tensors(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def data(n: int = N, n_valid: int = N_VALID, n_batches: int = 1) -> DataBunch:
    bs = GLOBAL // n_batches // get_world_size()
    n += n_batches > 1  # a sample is left out that is alone in its global batch
    return DataBunch.from_tensors(tensors(n), tensors(n_valid, seed=2), bs=bs, drop_last=False, seed=3)


KINDS: dict[str, Any] = {
    "one process": lambda learn: learn,
    "ddp": lambda learn: learn.to_distributed(),
    "fsdp": lambda learn: learn.to_fsdp(blocks=Block),
}


def learner(
    kind: str = "fsdp", callbacks: Any = (), *, model: nn.Module | None = None, n_batches: int = 1, **options: Any
) -> Learner:
    options = {"metrics": accuracy, "lr": 0.02, "data": data(n_batches=n_batches), **options}
    return KINDS[kind](Learner(model=model or net(), callbacks=callbacks, **options))


def fitted(learn: Learner, epochs: int = 2, **options: Any) -> Learner:
    with learn.no_logging():
        return learn.fit(epochs, **options)


def weights(learn: Learner) -> list[list[float]]:
    return [whole(t.detach()).flatten().tolist() for t in learn.model.state_dict().values()]


def history(learn: Learner) -> tuple[list[float], list[float], list[float]]:
    return learn.recorder.losses, list(chain(*learn.recorder.values)), list(chain(*weights(learn)))


def close(a: Any, b: Any, within: float = 1e-6) -> bool:
    return all(p == pytest.approx(q, abs=within) for p, q in zip(a, b, strict=True))


# --- the same train ----------------------------------------------------------
BESIDE: dict[str, Any] = {
    "nothing": list,
    "Accumulate": lambda: [Accumulate(3)],
    "ClipGradients": lambda: [ClipGradients(0.1)],
    "ClipGradients(value)": lambda: [ClipGradients(value=0.01)],
    "ClipGradients(adaptive)": lambda: [ClipGradients(adaptive=0.01)],
    "EMA": lambda: [EMA(0.9)],
    "Lookahead": lambda: [Lookahead(2)],
    "SAM": lambda: [SAM()],
    "SWA": lambda: [SWA(0.1)],
    "TerminateOnNaN": lambda: [TerminateOnNaN()],
    "three": lambda: [Accumulate(2), ClipGradients(0.1), EMA(0.9)],
}


def curves(kinds: list[str]) -> dict[str, Any]:
    """Losses, values and weights, and the predictions of all, of each kind beside each callback."""

    def run(kind: str, beside: str) -> Any:
        learn = fitted(learner(kind, BESIDE[beside](), n_batches=3 if beside in ("Accumulate", "three") else 1))
        norms = [cb.norms for cb in learn.callbacks if isinstance(cb, ClipGradients)]
        return (
            *history(learn),
            learn.get_preds()[0].flatten().tolist(),
            learn.predict(tensors(4)[0]).flatten().tolist(),
            *norms,
        )

    of_ddp = ("nothing", "three")  # what goes beside DDP has tests of its own
    return {
        f"{kind}, {beside}": run(kind, beside)
        for kind in kinds
        for beside in BESIDE
        if kind != "ddp" or beside in of_ddp
    }


def test_curves_weights_and_predictions_are_those_of_ddp_and_of_one_process_beside_all_that_changes_a_step(ranks):
    alone, of_ranks = curves(["one process"]), ranks(2, curves, ["ddp", "fsdp"], timeout=60)
    for result in of_ranks:
        for name, values in result.items():
            expected = alone[f"one process, {name.split(', ')[1]}"]
            assert all(map(close, values, expected)), name
    assert not close(
        alone["one process, nothing"][2], alone["one process, ClipGradients"][2], within=1e-3
    )  # the control


def test_recorded_norms_are_those_of_whole_tensors(ranks):
    def run(kind: str) -> list[float]:
        fitted(learner(kind, seen := GradientStats()))
        return seen.recorded.flatten().tolist()

    alone = run("one process")
    for result in ranks(2, run, "fsdp"):
        assert close(result, alone)


def by_hand(p: float = 0.0, n_steps: int = 6, **policy: Any) -> list[list[float]]:
    """The same by fully_shard, without learnkit: batches by its rule."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, mesh = net(p), init_device_mesh("cpu", (get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(**policy, **({"output_dtype": torch.float32} if policy else {})),
    )
    opt = AdamW(model.parameters(), lr=0.02, weight_decay=1e-2, fused=True)
    x, y = (t[get_rank() * 6 :][:6] for t in tensors(12))
    for _ in range(n_steps):
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return [whole(t.detach()).flatten().tolist() for t in model.state_dict().values()]


def test_weights_are_bit_for_bit_those_of_fully_shard_by_hand_in_float32_bfloat16_and_with_recomputed_activations(
    ranks,
):
    def compare() -> Any:
        found = {}
        for name, options, policy in (
            ("float32", {}, {}),
            ("anew", {"activation_checkpointing": True}, {}),
            ("offload", {"cpu_offload": True}, {}),
            (
                "bfloat16",
                {"mixed_precision": torch.bfloat16},
                {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
            ),
        ):
            x, y = tensors(12)
            learn = Learner((DataLoader(TensorDataset(x, y), batch_size=6), None), net(), lr=0.02, wd=1e-2).to_fsdp(
                blocks=Block, **options
            )
            found[name] = weights(fitted(learn, 6)), by_hand(**policy)
            assert learn.predict(x).dtype == torch.float32
        return found

    for found in ranks(2, compare):
        assert all(own == hand for own, hand in found.values())
        assert found["float32"] == found["anew"] == found["offload"] != found["bfloat16"]


def test_activations_computed_anew_drop_the_same_units_and_give_gradients_without_a_difference(ranks):
    def run() -> Any:
        found = []
        for anew in (False, True):
            learn = Learner(data(), net(0.5), lr=0.02, seed=7).to_fsdp(blocks="blocks", activation_checkpointing=anew)
            seen: list[int] = []
            learn.model.blocks[0].linear.register_forward_hook(lambda *_, seen=seen: seen.append(1))  # type: ignore[union-attr]
            found.append((history(fitted(learn)), len(seen)))
        return found

    for (plain, n), (anew, n_anew) in ranks(2, run):
        assert plain == anew and n_anew - n == 2 * 4  # one forward more a training batch


def test_float16_skips_the_steps_that_ddp_skips_on_all_ranks(ranks):
    class Overflow(Callback):
        """One rank's gradients, of the last layer alone, whose first rows are another rank's part."""

        order = 200

        def after_forward(self, learn):
            if learn.training and learn.step == 2 and learn.rank == 1 and learn.epoch == 0 and not self.done:
                self.done, learn.loss = True, learn.loss + learn.pred[:, 0].sum() * 1e38

        done = False

    def run() -> Any:
        found = []
        for kind in ("ddp", "fsdp"):
            learn = Learner(data(), net(), lr=0.02, callbacks=Overflow()).to_fp16(init_scale=2.0**10)
            fitted(KINDS[kind](learn))
            from learnkit.callbacks import MixedPrecision

            found.append(
                (history(learn), next(cb.skips for cb in learn.callbacks if isinstance(cb, MixedPrecision)), learn.step)
            )
        return found

    for ddp, fsdp in ranks(2, run):
        assert all(close(a, b, within=2e-3) for a, b in zip(ddp[0], fsdp[0], strict=True)) and ddp[1:] == fsdp[1:] == (
            [2],
            7,
        )


@pytest.mark.parametrize("world_size", [2, 3])
def test_batch_norm_and_weights_that_do_not_divide_train_as_under_ddp(ranks, world_size):
    def run() -> Any:
        return [
            history(fitted(KINDS[kind](Learner(data(48), net(norm=True), metrics=accuracy, lr=0.02))))
            for kind in ("ddp", "fsdp")
        ]

    for ddp, fsdp in ranks(world_size, run):
        assert all(map(close, ddp, fsdp))


def test_in_bfloat16_batch_norm_stays_in_float32(ranks):
    def run() -> Any:
        learn = Learner(data(48), net(norm=True), lr=0.02)
        seen: list[torch.dtype] = []
        learn.model.norm.register_forward_hook(
            lambda module, args, output: seen.extend((module.weight.dtype, args[0].dtype))
        )  # type: ignore[union-attr]
        fitted(learn.to_fsdp(blocks=Block, mixed_precision=torch.bfloat16))
        ddp = fitted(KINDS["ddp"](Learner(data(48), net(norm=True), lr=0.02)))
        return history(learn)[0], history(ddp)[0], {*seen}, learn.model.norm.running_mean.dtype  # type: ignore[union-attr]

    for losses, ddp, dtypes, running in ranks(2, run):
        assert (
            close(losses, ddp, within=0.02)
            and losses != ddp
            and dtypes == {torch.float32, torch.bfloat16}
            and running == torch.float32
        )


def test_frozen_layers_stay_and_train_again_when_they_are_unfrozen(ranks):
    def run(kind: str) -> Any:
        learn = learner(kind, splitter=lambda model: [[model.first, model.blocks], [model.norm, model.last]])
        before = weights(learn)
        fitted(learn, 1).freeze()
        after_one = weights(learn)
        fitted(learn, 1)
        assert weights(learn)[:-2] == after_one[:-2] != before[:-2] and weights(learn)[-2:] != after_one[-2:]
        return history(fitted(learn.unfreeze(), 1))

    alone = run("one process")
    for result in ranks(2, run, "fsdp"):
        assert all(map(close, result, alone))


# --- co ----------------------------------------------------------------------
def n_collectives() -> int:
    return dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[union-attr]


class Counts(Callback):
    """Collectives of each training batch, and how many numbers of the model this rank has then."""

    order = -200

    def __init__(self):
        self.batches: list[int] = []
        self.held: list[int] = []

    def before_batch(self, learn):
        self.start = n_collectives()

    def after_batch(self, learn):
        if learn.training:
            self.batches.append(n_collectives() - self.start)

    def after_train(self, learn):
        self.held.append(sum(own_part(p).numel() for p in learn.model.parameters()))

    def after_validate(self, learn):
        self.held.append(sum(own_part(p).numel() for p in learn.model.parameters()))


def test_a_batch_that_waits_for_a_later_step_reduces_nothing_and_a_rank_has_half_of_everything(ranks):
    def run() -> Any:
        counts = Counts()
        learn = fitted(
            learner("fsdp", [counts, Accumulate(3)], data=DataBunch.from_tensors(tensors(36), tensors(13), bs=6))
        )
        state = sum(own_part(t).numel() for values in learn.opt.state.values() for t in values.values() if t.ndim)
        return counts.batches, counts.held, state

    whole_size = sum(p.numel() for p in net().parameters())
    of_ranks = ranks(2, run)
    for batches, held, state in of_ranks:
        # Three blocks and the rest: each gathered forward, the blocks again backward; reduced in each third batch.
        assert batches[1:3] == [7, 7 + 4] and batches[4:5] == [7]
        assert len({*held}) == 1 and held[0] == pytest.approx(whole_size / 2, rel=0.03) and state == 2 * held[0]
    assert sum(held[0] for _, held, _ in of_ranks) == whole_size


# --- evaluati ----------------------------------------------------------------
class Stream(IterableDataset):
    def __init__(self, n: int) -> None:
        self.rows = list(zip(*tensors(n), strict=True))

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("world_size", [2, 3])
def test_metrics_and_predictions_of_any_size_are_those_of_one_process_also_where_a_rank_has_no_batch_or_no_length(
    ranks, world_size
):
    def run(kind: str) -> Any:
        learn, found = learner(kind), []
        for n in (1, 2, 3, 4, 7, 13):
            for dl in (
                DataLoader(TensorDataset(*tensors(n)), batch_size=2),
                DataLoader(ShardedStream(Stream(n), 2, even=False), batch_size=2),
            ):
                found += [*learn.validate(dl).values(), *learn.get_preds(dl, with_loss=True)[0].flatten().tolist()]
        return [*found, *learn.predict(tensors(1)[0][0]).tolist()]

    alone = run("one process")
    for result in ranks(world_size, run, "fsdp"):
        assert close(result, alone)


def test_an_average_is_what_is_evaluated_and_saved_and_the_weights_come_back(ranks, tmp_path: Path):
    def run() -> Any:
        ema = EMA(0.5, saves=True)
        learn = fitted(learner("fsdp", [ema, SaveBest()], path=tmp_path))
        before, measured = weights(learn), learn.validate()
        with ema.swapped(learn):
            inside = weights(learn), learn.validate()
        assert weights(learn) == before != inside[0] and inside[1] == measured
        learn.save("average")
        ema.apply(learn)
        assert weights(learn) == inside[0]
        return inside[0], measured

    [(average, measured), _] = ranks(2, run)
    plain = learner("one process", path=tmp_path).load("average")
    assert weights(plain) == average and plain.validate() == pytest.approx(measured, abs=1e-6)
    assert plain.load("best").validate()["valid_loss"] >= 0


# --- files -------------------------------------------------------------------
def test_a_file_of_each_kind_is_loaded_by_each_other_with_its_optimizer(ranks, tmp_path: Path):
    def save(kinds: list[str]) -> Any:
        found = []
        for kind in kinds:
            learn = fitted(learner(kind, path=tmp_path, opt_func=opt_func), 1)
            learn.save(kind)
            found.append(weights(learn))
        return found

    def load(kinds: list[str]) -> Any:
        found = []
        for kind in kinds:
            for other in KINDS:
                learn = learner(kind, path=tmp_path, opt_func=opt_func).load(other)
                found.append((weights(learn), list(chain(*weights(fitted(learn, 1))))))
        return found

    for opt_func, n_more in ((partial(SGD, momentum=0.9), 3), (AdamW, 0)):
        saved = [*save(["one process"]), *ranks(2, save, ["ddp", "fsdp"])[0]]
        alone, spread = load(["one process"]), ranks(2, load, ["ddp", "fsdp"])[1]
        if n_more:
            spread += ranks(n_more, load, ["fsdp"])[0]
        for i, (own, later) in enumerate(alone + spread):
            assert own == saved[i % 3]
            assert close(later, alone[i % 3][1], within=3e-6)
    files = [torch.load(tmp_path / "models" / f"{kind}.pt", weights_only=True) for kind in KINDS]
    for a, b in pairwise(files):
        assert a["model"].keys() == b["model"].keys() and not any(map(is_shard, b["model"].values()))
        assert [t.shape for t in a["model"].values()] == [t.shape for t in b["model"].values()]
        assert a["opt"]["state"].keys() == b["opt"]["state"].keys()


def test_a_file_that_does_not_fit_is_refused_on_all_ranks_and_nothing_is_changed(ranks, tmp_path: Path):
    Learner(data(), nn.Sequential(nn.Linear(6, 3)), path=tmp_path).save("other")

    def run() -> Any:
        learn = learner("fsdp", path=tmp_path)
        before = weights(learn)
        with pytest.raises(ValueError, match=r"another model; \d+ differences, nothing was loaded"):
            learn.load("other")
        with pytest.raises((FileNotFoundError, RuntimeError), match=r"nothing\.pt does not exist"):
            learn.load("nothing")
        return weights(learn) == before

    assert ranks(2, run) == [True, True]


class Killed(Exception):
    pass


class Kill(Callback):
    order = Checkpoint.order - 1
    in_trials = False

    def __init__(self, at: int) -> None:
        self.at = at

    def after_batch(self, learn):
        if learn.training and learn.step == self.at:
            raise Killed


def resumable(kind: str, folder: Path, model: nn.Module) -> Learner:
    return learner(kind, [Checkpoint(folder, every_n_steps=3), EMA(0.9), Lookahead(2)], model=model, seed=5)


def begin(kind: str, folder: Path, p: float = 0.0) -> None:
    with pytest.raises(Killed):
        fitted(resumable(kind, folder, net(p)), 2, callbacks=[Kill(6)])


def go_on(kind: str, folder: Path, p: float = 0.0) -> Any:
    learn = fitted(resumable(kind, folder, net(p)), 2, resume=True)
    return *history(learn), list(
        chain(*(whole(t).flatten().tolist() for t in learn.callbacks[3].average.values.values()))
    )  # type: ignore[union-attr]


def test_a_fit_goes_on_in_any_other_kind_and_world_with_average_and_optimizer(ranks, tmp_path: Path):
    def begin_all(kinds: list[str]) -> None:
        for of in kinds:
            for kind in KINDS:
                begin(of, tmp_path / f"{of}, {kind}")

    def go_on_all(kinds: list[str]) -> dict[str, Any]:
        return {f"{of}, {kind}": go_on(kind, tmp_path / f"{of}, {kind}") for kind in kinds for of in KINDS}

    _, values, *expected = go_on("one process", tmp_path / "uninterrupted")
    begin_all(["one process"])
    ranks(2, begin_all, ["ddp", "fsdp"])
    for results in (go_on_all(["one process"]), *ranks(2, go_on_all, ["ddp", "fsdp"])):
        for name, (_, own_values, *own) in results.items():
            # Of the epoch that was interrupted on other ranks, each remembers its own losses.
            assert close(own_values[-2:], values[-2:], within=3e-6), name
            assert all(close(a, b, within=3e-6) for a, b in zip(own, expected, strict=True)), name


def test_after_a_kill_of_one_rank_a_fit_goes_on_bit_for_bit_on_as_many_ranks(ranks, tmp_path: Path):
    class Shoot(Callback):
        in_trials = False

        def before_step(self, learn):
            if learn.step == 7 and learn.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        fitted(resumable("fsdp", tmp_path / "killed", net(0.5)), 2, callbacks=[Shoot()])

    def run() -> Any:
        return go_on("fsdp", tmp_path / "killed", 0.5), go_on("fsdp", tmp_path / "whole", 0.5)

    with pytest.raises(RankFailed, match=r"rank 1 of 2 failed: it ended with signal SIGKILL"):
        ranks(2, killed)
    for resumed, expected in ranks(2, run):
        assert resumed == expected


def test_a_save_that_is_asked_for_within_a_window_comes_at_its_end_and_the_resumed_fit_is_the_same_bit_for_bit(
    ranks, tmp_path: Path
):
    class Ask(Callback):
        order = Accumulate.order - 1
        in_trials = False

        def __init__(self, dies: bool) -> None:
            self.dies, self.asked = dies, -1

        def before_batch(self, learn):
            if (
                self.dies
                and learn.training
                and learn.epoch == 1
                and self.asked >= 0
                and learn.batch_index > self.asked + 4
            ):
                raise Killed
            if (
                self.dies
                and learn.training
                and learn.epoch == 1
                and learn.n_held == 1
                and self.asked < 0
                and learn.rank == 1
            ):
                learn.wanted = SAVE
            if self.dies and learn.training and learn.epoch == 1 and learn.n_held == 1 and self.asked < 0:
                self.asked = learn.batch_index

    def fit(folder: Path, dies: bool, **options: Any) -> Any:
        learn = learner("fsdp", [Checkpoint(folder), Accumulate(3), Ask(dies)], model=net(0.5), n_batches=3)
        return history(fitted(learn, 2, **options)), None if learn.resumed is None else (
            learn.resumed["epoch"],
            learn.resumed["n_held"],
            learn.resumed["items"],
        )

    def run() -> Any:
        with pytest.raises(Killed):
            fit(tmp_path / "killed", True)
        return fit(tmp_path / "killed", False, resume=True), fit(tmp_path / "whole", False)

    for (resumed, place), (expected, _) in ranks(2, run):
        assert place is not None and place[:2] == (1, 0) and place[2] > 0
        assert resumed == expected


# --- stops and er ------------------------------------------------------------
def test_a_window_that_a_stop_cuts_off_leaves_no_gradient_to_the_next_one(ranks):
    class Cut(Callback):
        def after_batch(self, learn):
            if learn.training and learn.epoch == 0 and learn.batch_index == 4:
                raise StopTrain

    def run(kind: str) -> Any:
        return history(fitted(learner(kind, [Accumulate(3), Cut()], n_batches=3)))

    alone = run("one process")
    for result in ranks(2, run, "fsdp"):
        assert all(map(close, result, alone))


def test_what_one_rank_stops_all_stop(ranks):
    class Leave(Callback):
        def after_step(self, learn):
            if learn.rank == 1 and learn.step == 3:
                raise StopFit

    def run() -> Any:
        learn = fitted(learner("fsdp", Leave()), 5)
        return learn.step, learn.validate()["valid_loss"]

    (step, loss), other = ranks(2, run)
    assert (step, loss) == other and step in (3, 4, 5)


@pytest.mark.parametrize("hook", ["after_forward", "before_step", "after_batch", "before_validate"])
def test_after_an_error_of_all_ranks_the_model_is_in_parts_and_the_next_fit_is_a_first_one(ranks, hook):
    class Fail(Callback):
        armed = True

    def fail(self, learn):
        if self.armed:
            raise Killed

    setattr(Fail, hook, fail)

    def run() -> Any:
        callback = Fail()
        learn = learner("fsdp", [callback, Accumulate(2)], opt_func=SGD, lr=0.0)
        with pytest.raises(Killed):
            fitted(learn)
        assert all(map(is_shard, learn.model.parameters())) and all(p.grad is None for p in learn.model.parameters())
        callback.armed, fresh = False, learner("fsdp", [callback, Accumulate(2)], opt_func=SGD)
        return history(fitted(learn, 1, lr=0.02))[2], history(fitted(fresh, 1, lr=0.02))[2]

    for again, first in ranks(2, run):
        assert len(again) == len(first)


def test_gradients_of_one_rank_that_are_no_numbers_stop_all_before_the_step(ranks):
    class Poison(Callback):
        def after_forward(self, learn):
            if learn.training and learn.step == 2 and learn.rank == 1:
                learn.loss = learn.loss * torch.nan

    def run() -> Any:
        with pytest.MonkeyPatch.context(), __import__("warnings").catch_warnings(record=True) as told:
            __import__("warnings").simplefilter("always")
            learn = fitted(learner("fsdp", [Poison(), TerminateOnNaN()]))
        return (
            learn.step,
            all(torch.tensor(list(chain(*weights(learn)))).isfinite().tolist()),
            [str(w.message) for w in told],
        )

    (step, finite, told), (other_step, other_finite, _) = ranks(2, run)
    assert (step, finite) == (other_step, other_finite) == (2, True)
    assert any(
        "gradients of 16 parameters are not finite" in message and "losses by rank" in message for message in told
    )


def test_a_prediction_of_one_rank_alone_ends_and_names_those_that_did_not_come(ranks):
    def run() -> None:
        learn = Learner(data(), net()).to_fsdp(hang_timeout=1.0)
        if get_rank() == 0:
            learn.predict(tensors(4)[0])
        else:
            time.sleep(15)

    with pytest.raises(RankFailed, match=r"rank 0 of 2 failed: ranks \[1\] did not come within 1 s"):
        ranks(2, run)


def test_a_trial_leaves_the_parts_as_they_were(ranks):
    def run() -> Any:
        learn = fitted(learner("fsdp"), 1)
        before = weights(learn), [whole(t).tolist() for values in learn.opt.state.values() for t in values.values()]
        with unchanged(learn):
            fitted(learn, 1, lr=1.0)
        with learn.no_logging():
            learn.lr_find(num_it=5)
        return before == (
            weights(learn),
            [whole(t).tolist() for values in learn.opt.state.values() for t in values.values()],
        )

    assert ranks(2, run) == [True, True]


# --- models and op -----------------------------------------------------------
def test_a_model_on_the_meta_device_gets_the_weights_that_it_has_when_it_is_built_with_that_seed(ranks):
    def run() -> Any:
        init_process_group(seed=11)
        plain = Net(norm=True).state_dict()
        init_process_group(seed=11)
        with torch.device("meta"):
            model = Net(norm=True)
        learn = Learner(data(), model, lr=0.02)
        with pytest.raises(ValueError, match=r"on the meta device and has no weights: learn\.to_fsdp"):
            learn.validate()
        learn.to_fsdp(blocks=Block)
        same = all(torch.equal(whole(t), plain[name]) for name, t in learn.model.state_dict().items())
        return same, sum(own_part(p).numel() for p in learn.model.parameters()), fitted(learn).values["valid_loss"]

    (same, n, loss), (other_same, other_n, other_loss) = ranks(2, run)
    assert (
        same
        and other_same
        and loss == other_loss
        and n + other_n == sum(p.numel() for p in Net(norm=True).parameters())
    )
    assert run()[0]  # alone too


def test_a_module_on_the_meta_device_that_cannot_draw_its_weights_is_named(ranks):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 3), Scale())
    with pytest.raises(ValueError, match="Scale has scale on the meta device, and no reset_parameters"):
        Learner(data(), model).to_fsdp()


def test_optimizers_that_exist_go_on_with_their_state_in_parts(ranks):
    def run(kind: str, how: str) -> Any:
        model = net()
        matrices, vectors = (
            [p for p in model.parameters() if p.ndim == 2],
            [p for p in model.parameters() if p.ndim != 2],
        )
        opt_func = {
            "built": lambda: Adam(model.parameters(), lr=0.02),
            "together": lambda: Together(SGD(matrices, lr=0.02, momentum=0.9), Adam(vectors, lr=0.02)),
            "made": lambda: partial(SGD, momentum=0.9),
        }[how]()
        learn = Learner(data(), model, opt_func=opt_func, lr=0.02)
        x, y = tensors(12)
        if how != "made":  # a step by hand, so that there is a state; the same on all ranks
            F.cross_entropy(model(x), y).backward()
            opt_func.step()  # type: ignore[union-attr]
            opt_func.zero_grad()  # type: ignore[union-attr]
        else:
            fitted(learn, 1)
        return history(fitted(KINDS[kind](learn)))

    def run_all() -> Any:
        return [run("fsdp", how) for how in ("built", "together")]

    for result in ranks(2, run_all):
        for how, own in zip(("built", "together"), result, strict=True):
            assert all(map(close, own, run("one process", how))), how

    def made() -> Any:  # its fit before is of each rank alone: rank 0's counts
        return weights(
            fitted(KINDS["fsdp"](fitted(Learner(data(12), net(), opt_func=partial(SGD, momentum=0.9), lr=0.02), 1)), 1)
        )

    first, second = ranks(2, made)
    assert first == second


def test_what_does_not_go_together_is_refused_before_the_first_step(ranks):
    def refused(match: str, make: Any) -> None:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
            make()

    def run() -> None:
        refused(
            r"SGD\(fused=True\) cannot be combined with to_fsdp",
            lambda: learner(model=(m := net()), opt_func=SGD(m.parameters(), lr=0.1, fused=True)),
        )
        refused(
            r"SGD\(fused=True\) cannot be combined with to_fsdp",
            lambda: learner(model=(m := net()), opt_func=Together(SGD(m.parameters(), lr=0.1, fused=True))),
        )
        refused("batch_size_find lets each rank try by itself", lambda: learner().batch_size_find())
        refused("is sharded already", lambda: learner().to_fsdp())
        refused(
            r"export needs the whole model, and this one is sharded: call learn\.save",
            lambda: learner().export("model.pt2"),
        )
        refused("is sharded already", lambda: learner().to_distributed())
        refused(
            "float16 overflows without a scaled loss",
            lambda: Learner(data(), net()).to_fsdp(mixed_precision=torch.float16),
        )
        refused("expected None, torch.bfloat16 or", lambda: Learner(data(), net()).to_fsdp(mixed_precision="bf16"))
        refused(
            "blocks=Conv2d: the model has no such module. Its modules with weights are",
            lambda: Learner(data(), net()).to_fsdp(blocks=nn.Conv2d),
        )
        refused(
            r"blocks='block': the model has no module of this name\. Similar names.* blocks",
            lambda: Learner(data(), net()).to_fsdp(blocks="block"),
        )
        refused("blocks: 3 is int, expected a class or", lambda: Learner(data(), net()).to_fsdp(blocks=[3]))
        refused(
            "activation_checkpointing=True has no blocks",
            lambda: Learner(data(), net()).to_fsdp(activation_checkpointing=True),
        )
        conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        refused(
            r"not contiguous cannot be sharded: weight\. to_channels_last",
            lambda: Learner(data(), conv).to_fsdp(),
        )
        scalar = net()
        scalar.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
        refused("0-d parameters cannot be sharded: scale", lambda: Learner(data(), scalar).to_fsdp())

    ranks(2, run)
    for match, make in (
        (
            "AutoMicrobatch cannot be combined with to_fsdp: where memory",
            lambda: learner("fsdp", AutoMicrobatch()),
        ),
        ("pure=True cannot be combined with to_fsdp", lambda: learner("fsdp").to_bf16(pure=True)),
    ):
        with pytest.raises(RankFailed, match=match):
            ranks(2, lambda make=make: fitted(make()))


def test_alone_nothing_happens():
    model = net()
    learn = Learner(data(), model).to_fsdp(blocks=Block, activation_checkpointing=True, mixed_precision=torch.bfloat16)
    assert learn.model is model and type(model) is Net and not any(isinstance(cb, FullyShard) for cb in learn.callbacks)
    assert shard_model(model, blocks=Block) is model and history(fitted(learn)) == history(
        fitted(Learner(data(), net()))
    )


def test_a_summary_and_names_of_modules_work_in_parts(ranks):
    def run() -> Any:
        learn = Learner(data(), net(), lr=0.02).to_fsdp(blocks=["blocks.0", "blocks.1", nn.Linear])
        return learn.summary(), history(fitted(learn))

    expected = history(fitted(learner("one process", metrics=())))
    for summary, result in ranks(2, run):
        assert summary.splitlines()[-1].startswith(f"{sum(p.numel() for p in net().parameters())} parameters")
        assert all(map(close, result, expected))


@pytest.mark.skipif(
    os.environ.get("RELIABILITY") != "full", reason="RELIABILITY=full: 10 s, nearly all of them Dynamo's"
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own
def test_a_compiled_model_trains_in_parts_as_one_that_is_not(ranks):
    def run() -> Any:
        return history(fitted(Learner(data(), net(), lr=0.02).compile(backend="eager").to_fsdp(blocks=Block)))

    expected = history(fitted(learner("one process", metrics=())))
    for result in ranks(2, run, timeout=60):
        assert all(map(close, result, expected))
