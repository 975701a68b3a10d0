"""Parameters without a gradient, frozen or thawed during a fit, and calls of one rank alone: right on ranks, or named
at once.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnkit import Callback, DataBunch, Learner
from learnkit.callbacks import Accumulate
from learnkit.distributed import RankFailed, get_rank, get_world_size, is_main

N, GLOBAL = 72, 12  # 6 steps an epoch


class Halves(nn.Module):
    """`b` is used in those batches alone for which `uses` says so, of (step, rank)."""

    def __init__(self, uses: Any = lambda step: True) -> None:
        super().__init__()
        self.a, self.b, self.uses, self.n = nn.Linear(4, 3), nn.Linear(4, 3), uses, 0

    def forward(self, x: Tensor) -> Tensor:
        self.n += self.training
        return self.a(x) + self.b(x) if self.uses(self.n - 1) else self.a(x)


def learner(*callbacks: Callback, model: nn.Module | None = None, ranks: bool = True, **options: Any) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(N, 4).double()
    y = x[:, :3].argmax(1)
    data = DataBunch.from_tensors((x, y), (x[:15], y[:15]), bs=GLOBAL // get_world_size(), seed=3)
    torch.manual_seed(1)
    model = Halves() if model is None else model
    for p in model.parameters():
        nn.init.uniform_(p, -1, 1)
    learn = Learner(data, model.double(), lr=0.05, callbacks=callbacks)
    return learn.to_distributed(**options) if ranks else learn


def fit(learn: Learner, n_epochs: int = 2, **options: Any) -> Learner:
    with learn.no_logging():
        return learn.fit(n_epochs, **options)


def weights(learn: Learner) -> list[float]:
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist()


def close(a: list[float], b: list[float]) -> bool:
    return a == pytest.approx(b, rel=1e-9, abs=1e-9)


USES: dict[str, Any] = {
    "never": lambda step: False,
    "every other step": lambda step: step % 2 == 0,
    "but for the last step": lambda step: step != 11,
}


@pytest.mark.parametrize("uses", USES)
@pytest.mark.parametrize("options", [dict(delay_allreduce=True), dict(find_unused_parameters=True)])
def test_parameters_without_a_gradient_train_as_on_one_process(options, uses, ranks):
    def fn(many: bool) -> list[float]:
        return weights(fit(learner(model=Halves(USES[uses]), ranks=many, **(options if many else {}))))

    alone = fn(False)
    for n in (2, 3):
        for share in ranks(n, fn, True):
            assert close(share, alone)


def test_a_gradient_that_one_rank_lacks_counts_as_nought(ranks):
    """As with find_unused_parameters: in some steps each rank has one, in some one rank alone, in some none."""

    def uses(step: int) -> bool:
        return step % 3 == 0 or (step % 3 == 1 and get_rank() == 1)

    def fn(**options: Any) -> list[float]:
        return weights(fit(learner(model=Halves(uses), **options)))

    def both() -> Any:
        return fn(delay_allreduce=True), fn(find_unused_parameters=True)

    for n in (2, 3):
        for delayed, found in ranks(n, both):
            assert close(delayed, found)


@pytest.mark.parametrize(
    "uses, step",
    [(lambda step: False, 0), (lambda step: step != 3, 3), (lambda step: step != 11, 11)],
    ids=["never", "amid", "in the last step"],
)
def test_ddp_names_parameters_without_a_gradient_in_their_step_before_it_is_done(uses, step, ranks):
    def fn() -> int:
        learn = learner(model=Halves(uses))
        with pytest.raises(
            ValueError,
            match=r"2 parameters got no gradient: b\.weight, b\.bias\. DDP waits .*find_unused_parameters=True",
        ):
            fit(learn)
        return learn.step

    assert ranks(2, fn) == [step % 12] * 2


class Freezes(Callback):
    """`b` is frozen in the first epoch, by a hook."""

    def __init__(self, hook: str, n_batches: int = 0) -> None:
        self.hook, self.n_batches = hook, n_batches

    def set(self, learn: Learner, hook: str) -> None:
        if hook != self.hook:
            return
        is_first = learn.epoch == 0 or learn.batch_index >= self.n_batches > 0
        for p in learn.model.b.parameters():
            p.requires_grad_(not is_first)  # type: ignore[union-attr]

    def before_fit(self, learn: Learner) -> None:
        self.set(learn, "before_fit")

    def before_epoch(self, learn: Learner) -> None:
        self.set(learn, "before_epoch")

    def before_train(self, learn: Learner) -> None:
        self.set(learn, "before_train")

    def before_batch(self, learn: Learner) -> None:
        if learn.training:
            self.set(learn, "before_batch")

    def after_step(self, learn: Learner) -> None:
        self.set(learn, "after_step")


@pytest.mark.parametrize("hook", ["before_fit", "before_epoch", "before_train", "after_step"])
@pytest.mark.parametrize(
    "options", [{}, dict(delay_allreduce=True), dict(find_unused_parameters=True), dict(static_graph=True)], ids=str
)
def test_parameters_that_are_frozen_and_thawed_during_a_fit_train_as_on_one_process(hook, options, ranks):
    def fn(many: bool) -> list[float]:
        learn = fit(learner(Freezes(hook, n_batches=3), ranks=many, **(options if many else {})), 3)
        for p in learn.model.parameters():
            p.requires_grad_(True)
        return weights(fit(learn, 1))

    alone = fn(False)
    for n in (2, 3):
        for share in ranks(n, fn, True):
            assert close(share, alone)


def test_at_the_starts_of_windows_they_do_too(ranks):
    def fn(many: bool) -> list[float]:
        return weights(fit(learner(Accumulate(2), Freezes("before_epoch"), ranks=many), 3))

    alone = fn(False)
    for share in ranks(2, fn, True):
        assert close(share, alone)


class FreezesAmid(Callback):
    def after_batch(self, learn: Learner) -> None:
        for p in learn.model.b.parameters():
            p.requires_grad_(False)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "callbacks, options",
    [
        (lambda: [Freezes("before_epoch")], dict(algorithm="fp16")),
        (lambda: [Freezes("before_epoch")], dict(algorithm="decentralized")),
        (lambda: [Accumulate(4), FreezesAmid()], {}),
        (lambda: [Freezes("before_batch")], {}),
        (lambda: [Freezes("before_batch")], dict(delay_allreduce=True)),
    ],
    ids=["fp16", "decentralized", "within a step", "within a batch", "within a batch, delayed"],
)
def test_where_ddp_cannot_be_made_anew_they_are_named_at_once(callbacks, options, ranks):
    def fn() -> None:
        learn = learner(*callbacks(), **options)
        with pytest.raises(
            ValueError,
            match=r"2 parameters were frozen or unfrozen during the fit: b\.weight, b\.bias.*(do it between two "
            r"fits|Within a batch DDP does not notice it)",
        ):
            fit(learn)
        assert learn.step == 0

    ranks(2, fn)


# --- what one rank alone ca --------------------------------------------------
def alone_in(place: str) -> None:
    learn = learner(hang_timeout=3)
    if place == "before a fit":
        learn.validate() if is_main() else fit(learn)
    elif place == "beside predictions":
        learn.validate() if is_main() else learn.get_preds()
    else:
        hook = place.split()[-1]

        @learn.on(hook)
        def look(learn: Learner) -> None:
            if is_main() and (hook != "after_step" or learn.step == 3):
                learn.validate()

        fit(learn)


@pytest.mark.parametrize(
    "place, message",
    [
        (
            "before a fit",
            r"rank \d has come to .*(learn\.validate|a fit).*, and rank \d to .*what one rank calls all have to call: "
            r"take it out of `if is_main\(\):`",
        ),
        (
            "beside predictions",
            r"has come to an evaluation \(learn\.\w+\), and rank \d to an evaluation \(learn\.\w+\): what one rank "
            r"calls",
        ),
        ("in after_epoch", r"has come to .*, and rank \d to .*what one rank calls all have to call"),
        (
            "in after_step",
            r"no rank has got on for 3 s[\s\S]*rank 0 \(epoch 0.*waiting for all ranks to come to an evaluation "
            r"\(learn\.validate\); what one rank calls",
        ),
    ],
    ids=["before a fit", "beside predictions", "after_epoch", "after_step"],
)
def test_an_evaluation_by_one_rank_alone_is_named(place, message, ranks, capfd):
    with pytest.raises(RankFailed, match=message):
        ranks(2, alone_in, place)
