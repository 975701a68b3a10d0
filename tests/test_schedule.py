"""Schedules against closed forms and against torch's own schedulers."""

import copy
import doctest
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate, product

import pytest
import torch
from numpy import float64
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    PolynomialLR,
)

from learnkit import schedule as schedule_module
from learnkit.schedule import (
    Schedule,
    check_finite,
    check_positive,
    compose,
    constant,
    cosine,
    cyclic,
    exponential,
    flat_cos,
    linear,
    one_cycle,
    one_cycle_momentum,
    polynomial,
)

CASES: list[Schedule] = [
    constant(0.3),
    linear(0.1, 0.7),
    cosine(0.1, 0.7),
    polynomial(0.1, 0.7, 2),
    exponential(0.1, 0.7),
    one_cycle(0.1),
    one_cycle_momentum(),
    flat_cos(0.1),
    cyclic(0.1, n_cycles=3),
]


def rates_of_torch(scheduler: Callable[[torch.optim.Optimizer], LRScheduler], lr: float, n: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    driver, rates = scheduler(optimizer), []
    for _ in range(n):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        driver.step()
    return rates


def cycle_by_hand(start: float, middle: float, end: float, n: int, pct_start: float) -> list[float]:
    """The table in the API, written as the user would."""
    a = min(int(n * pct_start), n - 1)

    def wave(low: float, high: float, t: float) -> float:
        return low + (high - low) * (1 - math.cos(math.pi * t)) / 2

    up = [wave(start, middle, k / a) for k in range(a)]
    return up + [wave(middle, end, (k - a) / (n - 1 - a) if k > a else 0.0) for k in range(a, n)]


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(schedule_module)
    assert result.attempted >= 5
    assert result.failed == 0


@pytest.mark.parametrize("pct_start", [0.0, 0.01, 0.1, 0.25, 0.29, 0.3, 0.5, 0.7, 0.999, 1.0])
def test_one_cycle_is_the_closed_form_at_every_step(pct_start: float):
    for n in range(1, 51):
        rates = one_cycle(3e-3, div_factor=10, pct_start=pct_start).values(n)
        moms = one_cycle_momentum((0.95, 0.85), pct_start).values(n)
        assert rates == pytest.approx(cycle_by_hand(3e-4, 3e-3, 3e-3 / 1e5, n, pct_start), rel=1e-9)
        assert moms == pytest.approx(cycle_by_hand(0.95, 0.85, 0.95, n, pct_start), rel=1e-12)


def test_one_cycle_is_exact_to_the_bit_at_its_start_peak_and_end():
    for n in range(2, 400):
        for pct_start in (0.29, 0.3, 0.5, 0.57):
            a = int(n * pct_start)
            rates = one_cycle(0.1, pct_start=pct_start).values(n)
            moms = one_cycle_momentum(pct_start=pct_start).values(n)
            assert (rates[a], moms[a]) == (max(rates), min(moms)) == (0.1, 0.85)
            assert a == n - 1 or (rates[-1], moms[-1]) == (0.1 / 25e4, 0.95)
            assert a == 0 or (rates[0], moms[0]) == (0.1 / 25, 0.95)


def test_one_cycle_rises_strictly_then_falls_strictly():
    rates = one_cycle(0.1, pct_start=0.3).values(100)
    assert rates[:31] == sorted(set(rates[:31]))
    assert rates[30:] == sorted(set(rates[30:]), reverse=True)


def test_the_joint_is_int_of_the_floating_product_with_its_error():
    assert int(100 * 0.29) == 28  # not 29
    rates = one_cycle(1.0, pct_start=0.29).values(100)
    assert rates.index(1.0) == 28


def test_a_cycle_too_short_to_rise_begins_at_its_peak():
    assert one_cycle(0.1).values(1) == [0.1]
    assert one_cycle_momentum().values(1) == [0.85]
    assert one_cycle(0.1).values(3) == [0.1, pytest.approx(0.05, rel=1e-4), 0.1 / 25e4]
    assert one_cycle(0.1, pct_start=0.0).values(50)[0] == 0.1


def test_a_cycle_that_only_rises_ends_at_its_peak():
    rates = one_cycle(0.1, pct_start=1.0).values(20)
    assert rates == cosine(0.1 / 25, 0.1).values(20)


def test_final_div_is_the_divisor_of_the_maximum():
    assert one_cycle(1.0, div_factor=10).values(10)[-1] == 1e-5
    assert one_cycle(1.0, div_factor=10, final_div=4).values(10)[-1] == 0.25


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_any_number_of_steps_gives_as_many_plain_floats(schedule: Schedule):
    for n in (0, 1, 2, 3, 4, 5, 7, 100):
        values = schedule.values(n)
        assert len(values) == n
        assert all(type(value) is float and 0 <= value <= 0.95 for value in values)


@pytest.mark.parametrize("schedule", CASES[:5], ids=repr)
def test_the_table_of_one_curve_is_the_function_at_k_over_n_minus_one(schedule: Schedule):
    assert schedule.values(8) == [schedule(k / 7) for k in range(8)]
    assert schedule.values(1) == [schedule(0)]


@pytest.mark.parametrize("schedule", [one_cycle(0.1), one_cycle_momentum(), flat_cos(0.1)], ids=repr)
def test_the_table_of_a_continuous_chain_tends_to_its_function(schedule: Schedule):
    n = 10_001
    table = schedule.values(n)
    assert max(abs(table[k] - schedule(k / (n - 1))) for k in range(0, n, 7)) < 1e-4 * max(table)


def test_a_chain_as_a_function_meets_its_ends_and_joints_exactly():
    for pct_start in (0.0, 0.1, 0.3, 0.7, 1.0):
        schedule = one_cycle(0.1, pct_start=pct_start)
        assert schedule(pct_start) == 0.1
        assert schedule(1) == (0.1 if pct_start == 1 else 0.1 / 25e4)
        assert schedule(0) == (0.1 if pct_start == 0 else 0.1 / 25)


@pytest.mark.parametrize("make", [linear, cosine, exponential, lambda start, end: polynomial(start, end, 0.7)])
def test_both_ends_of_a_curve_are_exact_to_the_bit(make: Callable[[float, float], Schedule]):
    ends = [1e-7, 0.1, 0.3, 1 / 3, 0.7, 10.0]
    for start, end in product(ends, ends):
        values = make(start, end).values(4)
        assert (values[0], values[-1]) == (start, end)


def test_linear_is_the_straight_line_of_torch():
    ours = linear(0.1, 0.5).values(21)
    assert ours == pytest.approx(rates_of_torch(lambda o: LinearLR(o, 0.2, 1.0, total_iters=20), 0.5, 21), rel=1e-9)


def test_cosine_is_the_annealing_of_torch():
    ours = cosine(0.5, 0.01).values(21)
    assert ours == pytest.approx(rates_of_torch(lambda o: CosineAnnealingLR(o, 20, 0.01), 0.5, 21), rel=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.5])
def test_polynomial_is_the_decay_of_torch(power: float):
    ours = polynomial(0.5, 0.0, power).values(21)
    expected = rates_of_torch(lambda o: PolynomialLR(o, total_iters=20, power=power), 0.5, 21)
    assert ours == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_exponential_is_the_decay_of_torch():
    ours = exponential(0.5, 0.5 * 0.9**20).values(21)
    assert ours == pytest.approx(rates_of_torch(lambda o: ExponentialLR(o, 0.9), 0.5, 21), rel=1e-9)


def test_exponential_spans_what_a_quotient_of_floats_cannot():
    assert exponential(1e-300, 1e300)(0.5) == pytest.approx(1.0)


def test_equal_ends_never_leave_their_value():
    for schedule in (linear(0.9, 0.9), cosine(0.9, 0.9), polynomial(0.9, 0.9, 2), constant(0.9)):
        assert set(schedule.values(100)) == {0.9}


@pytest.mark.parametrize(("cycle_mult", "n_cycles", "n"), [(1, 3, 30), (2, 3, 70), (2, 4, 15), (3, 3, 26)])
def test_cyclic_restarts_as_torch_does(cycle_mult: int, n_cycles: int, n: int):
    """Compared before the last cycle: ours arrives at its minimum, torch's stops one step short."""
    first_length = n // sum(cycle_mult**i for i in range(n_cycles))
    ours = cyclic(0.5, 0.01, n_cycles=n_cycles, cycle_mult=cycle_mult).values(n)
    theirs = rates_of_torch(lambda o: CosineAnnealingWarmRestarts(o, first_length, cycle_mult, 0.01), 0.5, n)
    last = first_length * sum(cycle_mult**i for i in range(n_cycles - 1))
    assert ours[: last + 1] == pytest.approx(theirs[: last + 1], rel=1e-9)
    assert ours[last:] == cosine(0.5, 0.01).values(n - last)


def test_cycles_restart_at_exactly_the_maximum_on_whole_steps():
    for cycle_mult, n_cycles, steps in product((1, 2, 3), (1, 2, 3, 7), (2, 3, 7, 10, 49)):
        lengths = [steps * cycle_mult**i for i in range(n_cycles)]
        rates = cyclic(0.3, n_cycles=n_cycles, cycle_mult=cycle_mult).values(sum(lengths))
        assert [k for k, rate in enumerate(rates) if rate == 0.3] == [0, *accumulate(lengths[:-1])]
        assert rates[-1] == 0.0


def test_cycle_lengths_are_in_the_ratio_asked_for():
    rates = cyclic(1.0, n_cycles=2, cycle_mult=1.5).values(100)
    assert [k for k, rate in enumerate(rates) if rate == 1.0] == [0, 40]


def test_flat_cos_is_flat_then_cosine():
    rates = flat_cos(0.2, div_final=100, pct_start=0.75).values(101)
    assert rates[:76] == [0.2] * 76
    assert rates[75:] == cosine(0.2, 0.2 / 100).values(26)


def test_joints_of_many_parts_are_cumulative_and_each_part_starts_on_its_own_value():
    schedule = compose([(0.25, linear(0, 1)), (0.25, constant(2)), (0.5, linear(3, 5))])
    assert schedule.values(8) == [0.0, 0.5, 2.0, 2.0, 3.0, 3 + 2 / 3, 3 + 4 / 3, 5.0]
    assert [schedule(t) for t in (0, 0.125, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 2, 3, 4, 5]


def test_a_part_without_a_step_is_left_out():
    schedule = compose([(0.01, constant(1)), (0.98, constant(2)), (0.01, constant(3))])
    assert schedule.values(10) == [2.0] * 9 + [3.0]
    assert schedule.values(1) == [3.0]


def test_a_chain_may_hold_a_chain():
    inner = compose([(0.5, constant(1)), (0.5, constant(2))])
    assert compose([(0.2, constant(0)), (0.8, inner)]).values(10) == [0.0] * 2 + [1.0] * 4 + [2.0] * 4


def test_fractions_with_rounding_errors_still_cover_the_whole():
    tenth = compose([(0.1, linear(i, i + 1)) for i in range(10)])
    assert tenth(1) == 10.0
    assert tenth.values(100)[-1] == 10.0
    with_nothing_last = compose([(0.7, constant(1)), (0.1, constant(2)), (0.2, constant(3)), (0.0, constant(4))])
    assert with_nothing_last(1) == 4.0
    exact = compose([(Fraction(1, 3), constant(i)) for i in range(3)])
    assert exact.values(9) == [0.0] * 3 + [1.0] * 3 + [2.0] * 3


def test_a_schedule_says_what_it_is():
    assert repr(polynomial(1, 0, 2)) == "polynomial(1.0, 0.0, power=2.0)"
    assert repr(one_cycle(0.5, 5, 50)) == "compose([(0.3, cosine(0.1, 0.5)), (0.7, cosine(0.5, 0.01))])"


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_copies_pickles_and_repr_give_the_same_schedule(schedule: Schedule):
    assert pickle.loads(pickle.dumps(schedule)).values(9) == schedule.values(9)
    assert copy.deepcopy(schedule).values(9) == schedule.values(9)
    again = eval(repr(schedule), {**vars(schedule_module), "Fraction": Fraction})
    assert again.values(9) == pytest.approx(schedule.values(9), rel=1e-12)


@pytest.mark.parametrize(("attribute", "schedule"), [("start", linear(0, 1)), ("parts", one_cycle(0.1))])
def test_a_schedule_cannot_be_changed(attribute: str, schedule: Schedule):
    with pytest.raises(AttributeError, match="cannot assign"):
        setattr(schedule, attribute, 2.0)


def test_numbers_of_other_types_become_plain_floats():
    values = [*linear(float64(0.5), 1).values(3), linear(0, 1)(float64(0.5))]
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rates_that_are_not_finite_are_refused_when_made(bad: float):
    for make in (constant, one_cycle, flat_cos, lambda v: linear(0, v), lambda v: cyclic(v, n_cycles=2)):
        with pytest.raises(ValueError, match=rf"must be finite, got {bad!r}"):
            make(bad)


def test_what_is_not_a_number_is_refused_by_name():
    with pytest.raises(TypeError, match=r"max_value must be a number, got slice\(1, 2, None\)"):
        one_cycle(slice(1, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"value must be a number, got None"):
        flat_cos(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pct_start", [-0.1, 1.1, 30])
def test_pct_start_outside_the_unit_interval_is_refused(pct_start: float):
    for make in (one_cycle, flat_cos):
        with pytest.raises(ValueError, match=rf"pct_start must be a fraction in \[0, 1\], got {pct_start}"):
            make(0.1, pct_start=pct_start)
    with pytest.raises(ValueError, match="pct_start must be a fraction"):
        one_cycle_momentum(pct_start=pct_start)


def test_what_must_be_above_zero_is_refused_by_name():
    for name, make in {
        "start": lambda: exponential(0, 1),
        "end": lambda: exponential(1, -1),
        "power": lambda: polynomial(1, 0, 0),
        "div_factor": lambda: one_cycle(0.1, div_factor=0),
        "final_div": lambda: one_cycle(0.1, final_div=-1),
        "div_final": lambda: flat_cos(0.1, div_final=0),
        "cycle_mult": lambda: cyclic(0.1, n_cycles=2, cycle_mult=0),
        "lr": lambda: check_positive("lr", 0.0),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be above 0, got"):
            make()


def test_fractions_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match=r"must sum to 1, got \[0\.5, 0\.4\], which sum to 0\.9"):
        compose([(0.5, constant(1)), (0.4, constant(2))])
    with pytest.raises(ValueError, match=r"must sum to 1, got \[\]"):
        compose([])
    with pytest.raises(ValueError, match=r"fraction must be a fraction in \[0, 1\], got 1\.5"):
        compose([(1.5, constant(1)), (-0.5, constant(2))])


def test_parts_that_are_not_schedules_are_refused():
    with pytest.raises(TypeError, match=r"pairs \(fraction, schedule\).*got \(0\.5, 3\)"):
        compose([(0.5, 3)])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("t", [-0.01, 1.0000001, math.nan])
def test_progress_outside_the_unit_interval_is_refused(t: float):
    for schedule in (linear(0, 1), one_cycle(0.1)):
        with pytest.raises(ValueError, match=r"Progress must be in \[0, 1\], got"):
            schedule(t)


def test_a_negative_number_of_steps_is_refused():
    for schedule in (linear(0, 1), one_cycle(0.1)):
        with pytest.raises(ValueError, match="number of optimizer steps, 0 or more, got -3"):
            schedule.values(-3)


def test_less_than_one_cycle_is_refused():
    with pytest.raises(ValueError, match="n_cycles must be 1 or more, got 0"):
        cyclic(0.1, n_cycles=0)


@pytest.mark.parametrize("moms", [0.9, (0.9,), (0.9, 0.8, 0.7)])
def test_moms_that_are_no_pair_are_refused(moms: object):
    with pytest.raises(TypeError, match=r"moms must be a pair \(high, low\)"):
        one_cycle_momentum(moms)  # pyright: ignore[reportArgumentType]


def test_momentum_of_one_or_below_zero_is_refused():
    with pytest.raises(ValueError, match="moms must be below 1"):
        one_cycle_momentum((1.0, 0.85))
    with pytest.raises(ValueError, match=r"moms must be a fraction in \[0, 1\], got -0\.1"):
        one_cycle_momentum((0.95, -0.1))


def test_a_checked_number_comes_back_as_a_float():
    assert check_finite("lr", 1) == 1.0
    assert type(check_finite("lr", 1)) is float
    assert check_finite("lr", -2.0) == -2.0
