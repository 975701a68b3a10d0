"""A Learner on many ranks: what it costs, how its ranks stay equal, what it leaves behind, who reads and writes."""

from itertools import chain
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; ranks are forked from here, and need not import it each: 1 s
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from learnkit import Callback, DataBunch, Learner, accuracy
from learnkit.callbacks import Distributed
from learnkit.distributed import (
    GlobalBatchNorm,
    all_sum,
    barrier,
    destroy_process_group,
    get_rank,
    get_world_size,
    is_main,
    launch,
)

N, GLOBAL = 41, 12  # three whole global batches and one of 5 samples


def tensors(n: int = N, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def data(n: int = N, *, drop_last: bool = False) -> DataBunch:
    return DataBunch.from_tensors(
        tensors(n), tensors(11, seed=2), bs=GLOBAL // get_world_size(), drop_last=drop_last, seed=3
    )


def net(*extra: nn.Module, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), *extra, nn.Tanh(), nn.Linear(8, 3))


def distributed(
    model: nn.Module | None = None, *, n: int = N, callbacks: Any = (), opt_func: Any = AdamW, **options
) -> Learner:
    return Learner(
        data(n), model or net(), metrics=accuracy, lr=0.02, callbacks=callbacks, opt_func=opt_func
    ).to_distributed(**options)


def state(learn: Learner) -> list[float]:
    return torch.cat([value.detach().double().reshape(-1) for value in learn.model.state_dict().values()]).tolist()


def history(learn: Learner) -> tuple[list[float], ...]:
    return learn.recorder.losses, list(chain(*learn.recorder.values)), state(learn)


def close(a: Any, b: Any) -> bool:
    return all(p == pytest.approx(q, abs=1e-5) for p, q in zip(a, b, strict=True))


# --- co ----------------------------------------------------------------------
def n_collectives() -> int:
    """Of this group so far, those of DDP's C++ included."""
    return dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[union-attr]


class Counts(Callback):
    """Collectives of each training step and of each validation."""

    order = -200

    def __init__(self):
        self.steps: list[int] = []
        self.validations: list[int] = []

    def before_batch(self, learn):
        self.start = n_collectives()

    def after_batch(self, learn):
        if learn.training:
            self.steps.append(n_collectives() - self.start)
        else:
            assert n_collectives() == self.start

    def before_validate(self, learn):
        self.at = n_collectives()

    def after_validate(self, learn):
        self.validations.append(n_collectives() - self.at)


@pytest.mark.parametrize(
    "extra, n", [((), 1), ((nn.BatchNorm1d(8),), 3)], ids=["plain", "batch norm: two more for two dtypes of buffers"]
)
def test_a_training_step_has_the_collectives_of_ddp_and_a_validation_has_one(ranks, extra, n):
    def by_learner() -> Counts:
        counts = Counts()
        distributed(net(*extra), n=48, callbacks=counts).fit(2)
        return counts

    def by_hand() -> list[int]:
        model, found = DistributedDataParallel(net(*extra), gradient_as_bucket_view=True), []
        opt, (x, y) = torch.optim.AdamW(model.parameters(), fused=True), tensors(6)
        for _ in range(8):
            start = n_collectives()
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            found.append(n_collectives() - start)
        return found

    def fn():
        return by_learner().steps, by_learner().validations, by_hand()

    for steps, validations, hand in ranks(2, fn):
        assert steps == hand and hand[-1] == n
        assert validations == [n, n]  # rank 0's buffers first


def test_validation_leaves_ddp_out(ranks, monkeypatch):
    forward, passes = DistributedDataParallel.forward, []

    def counted(self, *inputs):
        passes.append(self.training)
        return forward(self, *inputs)

    def fn():
        monkeypatch.setattr(DistributedDataParallel, "forward", counted)
        distributed().fit(2).validate()
        return passes

    assert ranks(2, fn) == [[True] * 8] * 2


# --- equal replic ------------------------------------------------------------
class States(Callback):
    order = 200

    def __init__(self):
        self.seen: list[list[float]] = []

    def after_epoch(self, learn):
        self.seen.append(state(learn))


@pytest.mark.parametrize("sync_bn", [False, True])
def test_weights_and_buffers_are_equal_bit_for_bit_after_every_epoch(ranks, sync_bn):
    def fn():
        states = States()
        model = net(nn.BatchNorm1d(8), nn.Dropout(0.3), seed=get_rank())
        learn = distributed(model, n=43, callbacks=states, sync_bn=sync_bn)  # 43: batch norm needs 2 samples
        start = state(learn)
        learn.fit(3)
        return start, states.seen

    shares = ranks(3, fn)
    assert shares[0] == shares[1] == shares[2]
    assert len({tuple(s) for s in [shares[0][0], *shares[0][1]]}) == 4


def test_every_rank_starts_from_rank_0s_weights(ranks):
    def fn():
        return state(distributed(net(nn.BatchNorm1d(8), seed=get_rank())))

    expected = state(Learner(data(), net(nn.BatchNorm1d(8), seed=0)))
    assert ranks(3, fn) == [expected] * 3


class Mask(nn.Module):
    """Keeps what dropout does to ones."""

    def __init__(self):
        super().__init__()
        self.seen: list[list[float]] = []

    def forward(self, x):
        if self.training:
            self.seen.append(F.dropout(torch.ones(8), 0.5).tolist())
        return x


@pytest.mark.parametrize("seed", [None, 7])
def test_dropout_differs_by_rank_and_by_epoch(ranks, seed):
    def fn():
        learn = Learner(data(), net(mask := Mask()), seed=seed).to_distributed()
        learn.fit(1).fit(1)
        return mask.seen

    masks = [tuple(mask) for share in ranks(2, fn) for mask in share]
    assert len(masks) == 16 and len(set(masks)) > 12  # of 2**8, two may be equal by chance


def test_sync_bn_of_two_ranks_equals_batch_norm_of_one_with_the_joined_batch(ranks):
    def fn():
        model = net(nn.BatchNorm1d(8))
        learn = distributed(
            model, sync_bn=True, opt_func=SGD
        )  # Adam makes a step of a bias's gradient that is zero but for rounding
        batch_norm, seen = model[1], Kinds()
        learn.callbacks.append(seen)
        learn.fit(2)
        batch_norm.eval()
        learn.fit(1)
        return history(learn), seen.kinds, model[1] is batch_norm, [module.training for module in model.modules()]

    alone, _, _, modes = fn()
    for own, kinds, is_original, trains in ranks(2, fn):
        assert close(own, alone) and kinds == {GlobalBatchNorm} and is_original
        assert trains == modes == [True, True, False, True, True]


class Kinds(Callback):
    def __init__(self):
        self.kinds: set[type] = set()

    def before_batch(self, learn):
        self.kinds.add(type(learn.model[1]))


# --- joining and leavi -------------------------------------------------------
def test_the_launcher_is_all_that_is_needed_and_a_second_call_replaces_the_first():
    def fn():
        learn = distributed()
        first = learn.callbacks[-1]
        learn.to_distributed(sync_bn=True)
        [second] = [cb for cb in learn.callbacks if isinstance(cb, Distributed)]
        assert second is not first and second.replicas.sync_bn and not first.replicas.sync_bn  # type: ignore[attr-defined]
        return history(learn.fit(2)), dist.is_initialized()

    alone = history(distributed().fit(2))
    (own, joined) = launch(fn, 2, timeout=30)
    assert close(own, alone) and joined


def test_a_group_that_exists_is_used_and_left_alone():
    def fn():
        dist.init_process_group("gloo")
        group = dist.group.WORLD
        distributed().fit(1)
        destroy_process_group()  # of ours, of which there is none
        return dist.group.WORLD is group and all_sum(1)

    assert launch(fn, 2, timeout=30) == 2


@pytest.mark.parametrize("local_rank", [None, 0, "0", -1])
def test_alone_nothing_changes(local_rank):
    def fit(*, distributed: bool):
        learn = Learner(data(), net(nn.BatchNorm1d(8), nn.Dropout(0.5)), metrics=accuracy, lr=0.02)
        before = list(learn.callbacks), learn.ranks
        if distributed:
            assert learn.to_distributed(local_rank, sync_bn=True, bucket_cap_mb=1) is learn
        assert (learn.callbacks, learn.ranks) == before
        return history(learn.fit(2)), learn.validate(), torch.get_rng_state().tolist()

    assert fit(distributed=True) == fit(distributed=False)
    assert not dist.is_initialized()


@pytest.mark.parametrize("local_rank", ["cuda:0", 1.5, True, -2, "one"])
def test_a_local_rank_that_is_none_is_refused_alone_and_in_a_group(ranks, local_rank):
    def fn():
        with pytest.raises(ValueError, match=r"local_rank=.*: expected this process's number on its machine"):
            distributed(local_rank=local_rank)

    fn()
    ranks(2, fn)


@pytest.mark.parametrize("local_rank", [None, "RANK", "str"])
def test_a_local_rank_may_be_a_number_a_string_or_none(ranks, local_rank):
    def fn():
        own = {"RANK": get_rank(), "str": str(get_rank())}.get(str(local_rank))
        learn = distributed(local_rank=own).fit(1)
        return learn.rank, learn.world_size, str(learn.device)

    assert ranks(2, fn) == [(0, 2, "cpu"), (1, 2, "cpu")]


def test_an_unknown_option_is_refused_with_the_known_ones():
    for name in ("find_unused", "module", "device_ids"):
        with pytest.raises(
            TypeError,
            match=rf"to_distributed got {name}: expected local_rank, algorithm, sync_bn, .* such as bucket_cap_mb, "
            rf"find_unused_p",
        ):
            distributed(**{name: 1})


def test_to_distributed_within_a_fit_is_refused():
    class Joins(Callback):
        def before_epoch(self, learn):
            learn.to_distributed()

    with pytest.raises(RuntimeError, match="to_distributed was called while this Learner runs"):
        distributed(callbacks=Joins()).fit(1)


# --- fil ---------------------------------------------------------------------
def test_one_file_with_plain_keys_is_written_and_loaded_by_all(ranks, tmp_path):
    def fn():
        learn = distributed(net(nn.BatchNorm1d(8)), callbacks=SavesOnce()).fit(2)
        path, kept = learn.save("m"), state(learn)
        files = sorted(file.name for file in path.parent.iterdir())
        trained = history(learn.fit(1))
        learn.load("m")
        assert state(learn) == kept
        assert history(learn.fit(1)) != trained  # a third epoch has another order
        other = distributed(net(nn.BatchNorm1d(8), seed=get_rank())).load("m")
        return files, list(torch.load(path, weights_only=True)["model"]), kept == state(other), kept

    shares = ranks(2, fn)
    assert shares[0] == shares[1]
    files, keys, loaded, kept = shares[0]
    assert files == ["first.pt", "m.pt"] and loaded and keys == list(net(nn.BatchNorm1d(8)).state_dict())
    alone = Learner(data(), net(nn.BatchNorm1d(8))).load("m")
    assert state(alone) == kept
    alone.load("first")  # written within the fit, when the model was wrapped


class SavesOnce(Callback):
    def after_epoch(self, learn):
        if learn.epoch == 0:
            learn.save("first")


def test_a_file_may_be_written_by_rank_0_alone(ranks):
    class SavesOnMain(Callback):
        def after_epoch(self, learn):
            if is_main():
                learn.save("main")

    def fn():
        learn = distributed(callbacks=SavesOnMain()).fit(2)
        if is_main():
            learn.save("main")
        barrier()
        learn.load("main")
        return state(learn)

    shares = ranks(2, fn)
    assert shares[0] == shares[1]


def test_a_write_that_fails_on_rank_0_raises_on_all_that_called_it(ranks, tmp_path):
    (tmp_path / "models").write_text("not a folder")

    def fn():
        learn = distributed()
        with pytest.raises((OSError, RuntimeError)) as caught:
            learn.save("m")
        return type(caught.value).__name__, str(caught.value), all_sum(1)

    (kind, text, n), (other, told, m) = ranks(2, fn)
    assert kind == "FileExistsError" and n == m == 2
    assert other == "RuntimeError" and told == f"rank 0 failed to do this: write models/m.pt: FileExistsError: {text}"


def test_all_hear_of_a_failed_write_after_one_of_rank_0_alone(ranks, tmp_path):
    def fn():
        learn = distributed()
        if is_main():
            learn.save("m")
            (tmp_path / "models" / "m.pt").unlink()
            (tmp_path / "models" / "m.pt").mkdir()
        barrier()
        with pytest.raises((OSError, RuntimeError)):
            learn.save("m")

    ranks(2, fn)


def test_a_failed_write_of_rank_0_alone_is_not_taken_for_the_next_one_of_all(ranks, tmp_path):
    def fn():
        learn = distributed()
        if is_main():
            (tmp_path / "models").write_text("not a folder")
            with pytest.raises(FileExistsError):
                learn.save("m")
            (tmp_path / "models").unlink()
        learn.fit(1)
        learn.save("m")
        return (tmp_path / "models" / "m.pt").exists()

    assert ranks(2, fn) == [True, True]


# --- who does wha ------------------------------------------------------------
def test_only_rank_0_prints_and_every_rank_records_the_same(ranks, capfd, tmp_path):
    def fn():
        learn = distributed().fit_one_cycle(2)
        learn.recorder.to_csv(tmp_path / f"{get_rank()}.csv")
        recorder = learn.recorder
        return recorder.losses, recorder.values, recorder.lrs, recorder.moms, recorder.counts, recorder.ends

    shares = ranks(3, fn)
    assert shares[0] == shares[1] == shares[2] and shares[0][4] == [12, 12, 12, 5] * 2
    printed = capfd.readouterr()
    assert [line.split()[:2] for line in printed.out.splitlines()] == [
        ["epoch", "1/2"],
        ["epoch", "2/2"],
    ] and "[learnkit]" not in printed.err
    assert [file.name for file in tmp_path.glob("*.csv")] == ["0.csv"]


def test_predict_is_for_one_rank_too_also_within_a_fit(ranks):
    class PredictsOnMain(Callback):
        def after_batch(self, learn):
            if learn.training and is_main():
                learn.predict(tensors()[0])

    def fn():
        learn = distributed(callbacks=PredictsOnMain())
        first = learn.predict(tensors()[0][0]) if get_rank() == 1 else None
        learn.fit(1)
        x = tensors()[0]
        own = learn.predict(x) if is_main() else learn.model(x).detach()
        return history(learn), own.tolist(), first is None or first.shape == (3,)

    shares = ranks(2, fn)
    assert shares[0] == shares[1] and shares[0][2]
    assert close(shares[0][0], history(distributed().fit(1)))
