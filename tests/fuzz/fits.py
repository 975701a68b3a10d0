"""The fit methods, and what they measure."""

from __future__ import annotations

from tests.fuzz.part import Part, part

# schedule    sets the rate at each step
# length      needs the number of steps
# groups      needs layer groups
FITS: dict[str, Part] = {
    "fit": part("learn.fit(epochs, 1e-2, **options)", weight=3),
    "fit, slice": part("learn.fit(epochs, slice(1e-3, 1e-2), wd=0.1, **options)"),
    "fit_one_cycle": part("learn.fit_one_cycle(epochs, 1e-2, **options)", "schedule", "length", weight=4),
    "fit_one_cycle, no momentum": part(
        "learn.fit_one_cycle(epochs, 1e-2, moms=None, pct_start=0.5, **options)", "schedule", "length"
    ),
    "fit_flat_cos": part("learn.fit_flat_cos(epochs, 1e-2, pct_start=0.3, **options)", "schedule", "length"),
    "fit_sgdr": part(
        "learn.fit_sgdr(2, 1e-2, cycle_len=1, cycle_mult=1, **options)", "schedule", "length", "two epochs"
    ),
    "fine_tune": part("learn.fine_tune(epochs, 1e-2, **options)", "schedule", "length", "groups", "two fits"),
}

METRICS: dict[str, Part] = {
    "none": part("()"),
    "accuracy": part("accuracy", weight=2),
    "several": part("[accuracy, error_rate, top_k_accuracy(2)]"),
    "own": part("[lambda pred, target: (pred.argmax(1) == target).double().mean()]"),
    "F1": part("[MulticlassF1Score(num_classes=3, average='macro'), accuracy]", weight=0.5),
    "mean": part("[lambda pred, target: pred.double().pow(2).mean()]"),
}

# Of learnkit's metrics, what is not drawn, and why.
NOT_DRAWN = {
    "mean_squared_error": "of float targets, drawn as `mean`; tests/distributed/test_learner_metrics.py has it on 1 to "
    "3 ranks",
    "mean_absolute_error": "as mean_squared_error",
}
