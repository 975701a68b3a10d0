"""Every form that a batch may have trains, is measured and is predicted as by hand."""

from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from learnkit import DataBunch, Learner, accuracy

Pair = namedtuple("Pair", "x y")
X, Z, Y, R = torch.randn(8, 3), torch.randn(8, 2), torch.randint(2, (8,)), torch.randn(8, 2)


class OneInput(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)


class TwoInputs(OneInput):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x) + z  # type: ignore[override]


@dataclass
class Output:
    """As models of Hugging Face give it."""

    logits: Tensor
    loss: Tensor | None = None


class TakesLabels(OneInput):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:  # type: ignore[override]
        logits = super().forward(x)
        return Output(logits, None if labels is None else 3 * F.cross_entropy(logits, labels))


class TakesAnything(OneInput):
    def forward(self, **inputs: Tensor) -> Output:  # type: ignore[override]
        assert inputs.keys() <= {"x", "labels", "target"}
        logits = super().forward(inputs["x"])
        return Output(logits, 3 * F.cross_entropy(logits, inputs["labels"]) if "labels" in inputs else None)


class OwnLoss(OneInput):
    def forward(self, x: Tensor) -> Output:  # type: ignore[override]
        logits = super().forward(x)
        return Output(logits, logits.square().mean())


class Nested(OneInput):
    def forward(self, pair: Any) -> Tensor:
        return super().forward(pair[0]) + pair[1]["z"]  # type: ignore[override]


def linear(model: Any, x: Tensor = X) -> Tensor:
    return F.linear(x, model.weight, model.bias)


def entropy(model: Any) -> Tensor:
    return F.cross_entropy(linear(model), Y)


FORMS: dict[str, tuple[type[OneInput], Any, Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {
    # model, batch, the loss by hand, the prediction by hand
    "(x, y)": (OneInput, (X, Y), entropy, linear),
    "[x, y]": (OneInput, [X, Y], entropy, linear),
    "named tuple": (OneInput, Pair(X, Y), entropy, linear),
    "(x, float y)": (OneInput, (X, R), lambda m: F.mse_loss(linear(m), R), linear),
    "(x1, x2, y)": (TwoInputs, (X, Z, Y), lambda m: F.cross_entropy(linear(m) + Z, Y), lambda m: linear(m) + Z),
    "nested x": (Nested, ((X, {"z": Z}), Y), lambda m: F.cross_entropy(linear(m) + Z, Y), lambda m: linear(m) + Z),
    "mapping with labels": (OneInput, {"input": X, "labels": Y}, entropy, linear),
    "mapping with target": (OneInput, {"input": X, "target": Y}, entropy, linear),
    "mapping with its target first": (
        TwoInputs,
        {"labels": Y, "z": Z, "x": X},
        lambda m: F.cross_entropy(linear(m) + Z, Y),
        lambda m: linear(m) + Z,
    ),
    "mapping that is no dict": (OneInput, UserDict({"input": X, "labels": Y}), entropy, linear),
    "labels for the model too": (TakesLabels, {"x": X, "labels": Y}, lambda m: 3 * entropy(m), linear),
    "labels for a model with **inputs": (TakesAnything, {"x": X, "labels": Y}, lambda m: 3 * entropy(m), linear),
    "an output with .loss": (OwnLoss, (X, Y), lambda m: linear(m).square().mean(), linear),
    "a tensor alone": (OwnLoss, X, lambda m: linear(m).square().mean(), linear),
    "(x,)": (OwnLoss, (X,), lambda m: linear(m).square().mean(), linear),
    "mapping without a target": (OwnLoss, {"x": X}, lambda m: linear(m).square().mean(), linear),
}


def target_of(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, (tuple, list)):
        return batch[-1] if len(batch) > 1 else None
    return batch.get("labels", batch.get("target"))


@pytest.mark.parametrize("make_model, batch, loss_of, pred_of", FORMS.values(), ids=FORMS)
def test_a_batch_of_any_form_trains_is_measured_and_predicted_as_by_hand(
    make_model: type[OneInput], batch: Any, loss_of: Callable[[Any], Tensor], pred_of: Callable[[Any], Tensor]
):
    model, hand = make_model(), make_model()
    hand.load_state_dict(model.state_dict())
    learn = Learner(([batch] * 3, [batch]), model, opt_func=SGD, lr=0.1, wd=0.0).fit(1)
    losses = []
    for _ in range(3):
        loss = loss_of(hand)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, (hand.weight, hand.bias))
        with torch.no_grad():
            for p, grad in zip((hand.weight, hand.bias), grads, strict=True):
                p -= 0.1 * grad
    assert learn.recorder.losses == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(model.weight, hand.weight)
    assert learn.validate()["valid_loss"] == pytest.approx(loss_of(hand).item(), rel=1e-6)
    preds, targets = learn.get_preds()
    torch.testing.assert_close(preds, pred_of(hand).detach())
    expected = target_of(batch)
    assert targets is None if expected is None else torch.equal(targets, expected)


def test_a_loss_function_given_comes_before_an_outputs_own_loss():
    model = OwnLoss()
    expected = F.cross_entropy(linear(model), Y).item()
    learn = Learner(
        ([(X, Y)], None), model, loss_func=lambda output, target: F.cross_entropy(output.logits, target)
    ).fit(1)
    assert learn.recorder.losses == [pytest.approx(expected, rel=1e-6)]


def test_metrics_see_the_logits_of_such_an_output():
    learn = Learner(([{"x": X, "labels": Y}], [{"x": X, "labels": Y}]), model := TakesLabels(), metrics=accuracy)
    assert learn.validate()["accuracy"] == pytest.approx((linear(model).argmax(1) == Y).float().mean().item())


def test_several_targets_reach_the_loss_as_they_are():
    class Loss(nn.Module):
        def forward(self, pred: Tensor, target: Any) -> Tensor:
            return F.cross_entropy(pred, target["a"]) + target["b"].mean()

    model = OneInput()
    expected = (F.cross_entropy(linear(model), Y) + Z.mean()).item()
    learn = Learner(([(X, {"a": Y, "b": Z})], [(X, {"a": Y, "b": Z})]), model, loss_func=Loss())
    assert learn.validate()["valid_loss"] == pytest.approx(expected, rel=1e-6)
    assert learn.fit(1).recorder.losses == [pytest.approx(expected, rel=1e-6)]
    _, targets = learn.get_preds()
    assert torch.equal(targets["a"], Y) and torch.equal(targets["b"], Z)


def test_several_outputs_are_joined_one_by_one():
    class TwoHeads(OneInput):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x.sum(1)  # type: ignore[override]

    dl = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    learn = Learner((dl, dl), model := TwoHeads(), loss_func=lambda pred, y: F.cross_entropy(pred[0], y)).fit(1)
    (scores, sums), targets = learn.get_preds()
    torch.testing.assert_close(scores, linear(model).detach())
    torch.testing.assert_close(sums, X.sum(1))
    assert torch.equal(targets, Y)


def test_a_mean_squared_error_is_chosen_for_float_targets_and_cross_entropy_for_integers():
    model = OneInput()
    assert Learner(([(X, R)], [(X, R)]), model).validate()["valid_loss"] == pytest.approx(
        F.mse_loss(linear(model), R).item(), rel=1e-6
    )
    for dtype in (torch.int64, torch.uint8):
        model = OneInput()
        learn = Learner(([(X, Y.to(dtype))], [(X, Y.to(dtype))]), model)
        assert learn.validate()["valid_loss"] == pytest.approx(entropy(model).item(), rel=1e-6)


def test_cross_entropy_takes_class_probabilities_and_pictures_of_classes():
    probabilities = torch.softmax(R, 1)
    model = OneInput()
    learn = Learner(([(X, probabilities)], [(X, probabilities)]), model, loss_func=F.cross_entropy).fit(1)
    assert learn.validate()["valid_loss"] == pytest.approx(
        F.cross_entropy(linear(model), probabilities).item(), rel=1e-6
    )
    conv = nn.Conv2d(1, 3, 1)
    x, y = torch.randn(4, 1, 5, 5), torch.randint(3, (4, 5, 5))
    learn = Learner(([(x, y)], [(x, y)]), conv, metrics=accuracy).fit(1)
    assert learn.validate()["valid_loss"] == pytest.approx(F.cross_entropy(conv(x), y).item(), rel=1e-6)


# --- predict -----------------------------------------------------------------
PREDICT: dict[str, tuple[type[OneInput], Any, Any, Callable[[Any], Tensor]]] = {
    "sample": (OneInput, (X, Y), X[0], lambda m: linear(m)[0]),
    "batch": (OneInput, (X, Y), X[:5], lambda m: linear(m)[:5]),
    "batch of one": (OneInput, (X, Y), X[:1], lambda m: linear(m)[:1]),
    "tuple of one": (OneInput, (X, Y), (X,), linear),
    "several inputs, one sample": (TwoInputs, (X, Z, Y), (X[2], Z[2]), lambda m: (linear(m) + Z)[2]),
    "several inputs, a batch": (TwoInputs, (X, Z, Y), [X[2:], Z[2:]], lambda m: (linear(m) + Z)[2:]),
    "mapping, one sample": (
        TwoInputs,
        {"x": X, "z": Z, "labels": Y},
        {"x": X[1], "z": Z[1]},
        lambda m: (linear(m) + Z)[1],
    ),
    "mapping, a batch": (TwoInputs, {"x": X, "z": Z, "labels": Y}, {"z": Z, "x": X}, lambda m: linear(m) + Z),
    "labels left out": (TakesLabels, {"x": X, "labels": Y}, {"x": X}, linear),
    "labels left out, one sample": (TakesAnything, {"x": X, "labels": Y}, {"x": X[3]}, lambda m: linear(m)[3]),
}


@pytest.mark.parametrize("trained", [False, True], ids=["before a fit", "after a fit"])
@pytest.mark.parametrize("make_model, batch, x, expected", PREDICT.values(), ids=PREDICT)
def test_predict_takes_a_sample_or_a_batch_in_the_form_of_the_data(
    make_model: type[OneInput], batch: Any, x: Any, expected: Callable[[Any], Tensor], trained: bool
):
    model = make_model()
    learn = Learner(([batch], [batch]), model)
    if trained:
        learn.fit(1)
    pred = learn.predict(x)
    torch.testing.assert_close(pred, expected(model).detach())
    assert not pred.requires_grad and model.training


def test_predict_uses_evaluation_mode_and_leaves_modes_and_random_state():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.9), nn.BatchNorm1d(2))
    model[2].eval()
    state = torch.get_rng_state()
    learn = Learner(([(X, Y)], None), model)
    torch.testing.assert_close(learn.predict(X), model.eval()(X).detach())
    model.train()
    model[2].eval()
    learn.predict(X[0])
    assert [m.training for m in model] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), state)


def test_predict_of_token_numbers_tells_a_sentence_from_a_batch():
    tokens, y = torch.randint(9, (6, 5)), torch.randint(2, (6,))
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(15, 2))
    learn = Learner(DataBunch.from_tensors((tokens, y), bs=2), model)
    torch.testing.assert_close(learn.predict(tokens), model(tokens).detach())
    torch.testing.assert_close(learn.predict(tokens[4]), model(tokens)[4].detach())
