"""The tests of the CPU on the stand-in accelerator: a plugin, `pytest -p tests.accelerator.elsewhere`, which make
test-accelerator runs.

Where a test says nothing of a device, its Learner trains on the accelerator then; what it compares with may be on the
CPU, so values are compared, wherever they are. What cannot run there is in `CANNOT`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimizers import it; tests are forked from here, and need not import it each: 2 s

from tests.accelerator import twin
from tests.accelerator.forks import run_in_a_fork

ROOT = Path(__file__).parents[2]
BY_HAND = "its oracle calls the model, which is on the device here, with tensors of the CPU"
DRAWS = "dropout draws from the device's generator: other numbers than those for which it was written"
COUNTS = "counts what a step costs where batches need not be moved; on a device: tests/accelerator/test_waits.py"
AUTOCAST = "autocast on a device has other lists of operations than on the CPU, with which it compares bits"
FOREACH = "torch steps it by its foreach kernels on a device and one by one on the CPU, which round differently"
ADDS = (
    "it adds a module to the model after the Learner was built, which stays on the CPU: refused, as "
    "test_one_device.py shows"
)
HELD = "its callback holds a module of its own, which stays on the CPU"
ALONE = "starts processes of its own, which do not have the stand-in"
CANNOT = {
    "test_readme.py": ALONE,
    "test_docs.py": COUNTS,
    "test_examples.py": ALONE,
    "test_notebook.py": ALONE,
    "test_packaging.py": ALONE,
    "test_coming_from.py": ALONE,
    "test_step_cost.py": COUNTS,
    "test_scaling.py": "asks no device",
    "test_types.py": "runs a type checker",
    "test_cuda.py": "needs a CUDA device",
    "test_accelerator.py": "is about machines without an accelerator",
    "vision/test_cache.py::test_of_several_independent_processes_one_decodes": ALONE,
    "test_batch_forms.py::test_predict": BY_HAND,
    "test_batch_forms.py::test_metrics_see": BY_HAND,
    "test_batch_forms.py::test_several_outputs": BY_HAND,
    "test_batch_forms.py::test_a_mean_squared_error": BY_HAND,
    "test_batch_forms.py::test_cross_entropy_takes": BY_HAND,
    "test_data.py::test_predictions_come": BY_HAND,
    "test_data.py::test_validation_of_a_shuffled": BY_HAND,
    "test_data.py::test_a_sampler_of_the_users_own_is_kept": BY_HAND,
    "test_data.py::test_the_datas_loss_function": BY_HAND,
    "test_evaluation.py::test_regression_metrics": BY_HAND,
    "test_evaluation.py::test_validation_batches_without": BY_HAND,
    "test_evaluation.py::test_an_evaluation_leaves_modes": BY_HAND,
    "test_evaluation.py::test_an_evaluation_in_the_middle": BY_HAND,
    "callbacks/test_label_smoothing.py::test_training_has_the_smoothed_loss_and_evaluation_the_plain_one[weights]": BY_HAND,
    "test_fit_by_hand.py::test_a_fit_equals_the_loop_by_hand_over": BY_HAND,
    "test_fit_by_hand.py::test_a_fit_with_any_optimizer_equals_the_loop_by_hand_with_decoupled_weight_decay[RAdam]": FOREACH,
    "test_fit_by_hand.py::test_a_fit_with_any_optimizer_equals_the_loop_by_hand_with_decoupled_weight_decay[NAdam]": FOREACH,
    "vision/test_data.py::test_batches_are_normalized": BY_HAND,
    "test_files.py::test_a_file_of_plain_torch": BY_HAND,
    "callbacks/test_channels_last.py::test_inputs_that_are_no_pictures": "a batch that is moved is another object",
    "callbacks/test_recorder.py::test_a_float64_models": BY_HAND,
    "test_trial.py::test_what_callbacks_and_losses_keep": HELD,
    "callbacks/test_checkpoint.py::test_early_stopping_remembers": DRAWS,
    "callbacks/test_ema.py::test_apply_makes_the_average_the_weights_for_good[in a wrapper]": "wraps the model in "
    "DataParallel, which is CUDA's alone",
    "callbacks/test_mixed_precision.py::test_a_fit_has_the_numbers": AUTOCAST,
    "callbacks/test_mixed_precision.py::test_only_float16": COUNTS,
    "callbacks/test_looking_inside.py::test_each_part": ADDS,
    "test_optim.py::test_weights_without": ADDS,
    "test_optim.py::test_a_layer_replaced": ADDS,
    "test_tensor_rates.py": "compares with rates of the CPU's optimizers; on the device: "
    "tests/accelerator/test_waits.py",
}


def why_not(item: pytest.Item) -> str | None:
    """Why a test cannot run here: the reason of the longest name in `CANNOT` with which its own begins."""
    name = item.nodeid.removeprefix("tests/")
    found = [key for key in CANNOT if name.startswith(key)]
    return CANNOT[max(found, key=len)] if found else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = twin.missing() or why_not(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    return None if twin.missing() is not None else run_in_a_fork(item, twin.load)


@pytest.fixture(autouse=True)
def compare_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.equal of tensors on two devices is an error; here a value on the device may equal one on the CPU."""
    equal: Callable[..., bool] = torch.equal
    close: Callable[..., None] = torch.testing.assert_close

    def equal_values(a: Any, b: Any) -> bool:
        return equal(a.cpu(), b.cpu())

    def close_values(a: Any, b: Any, **options: Any) -> None:
        close(a, b, **{"check_device": False, **options})

    monkeypatch.setattr(torch, "equal", equal_values)
    monkeypatch.setattr(torch.testing, "assert_close", close_values)


# Only built here: test files that train something when they are imported would begin autograd's threads where there is
# a device.
if twin.missing() is None:
    twin.build()
