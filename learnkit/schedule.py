"""Schedules: values over the course of training, as pure functions of progress, computed before the first step."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate, pairwise
from typing import final


class Schedule(ABC):
    """A value as a pure function of progress. It counts no steps, so there is no state to save or to load.

    Example:
        >>> schedule = linear(1.0, 0.0)
        >>> schedule(0.25)
        0.75
        >>> schedule.values(5)
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    @abstractmethod
    def __call__(self, t: float) -> float:
        """Return the value at progress `t`.

        Args:
            t: progress, from 0 (first step) to 1 (last step)

        Raises:
            ValueError: when `t` is outside [0, 1]
        """

    @abstractmethod
    def values(self, n: int) -> list[float]:
        """Return the value at each of `n` optimizer steps.

        The first step has progress 0 (even if it is the only one), the last step has progress 1.

        Args:
            n: number of optimizer steps, 0 or more

        Raises:
            ValueError: when `n` is negative
        """


@final
@dataclass(frozen=True, repr=False)
class Curve(Schedule):
    """One smooth piece. `between(start, end, t)` is called inside (0, 1) only, so both ends are bit-exact.

    Args:
        label: text that `repr` shows
        start: value at progress 0
        end: value at progress 1
        between: function of `(start, end, t)` for the values in between

    Example:
        >>> Curve("square", 0.0, 2.0, lambda start, end, t: start + (end - start) * t * t).values(3)
        [0.0, 0.5, 2.0]
    """

    label: str
    start: float
    end: float
    between: Callable[[float, float, float], float]

    def __call__(self, t: float) -> float:
        t = _check_progress(t)
        if t == 0:
            return self.start
        return self.end if t == 1 else self.between(self.start, self.end, t)

    def values(self, n: int) -> list[float]:
        return [self(k / max(n - 1, 1)) for k in range(_check_steps(n))]

    def __repr__(self) -> str:
        return self.label


@final
@dataclass(frozen=True, repr=False)
class Chain(Schedule):
    """Several schedules in sequence: what `compose` returns. See `compose` for what happens at the joints.

    Args:
        parts: pairs (fraction of training, schedule)

    Example:
        >>> compose([(0.5, constant(1.0)), (0.5, linear(1.0, 0.0))]).values(6)
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """

    parts: tuple[tuple[float | Fraction, Schedule], ...]

    def __call__(self, t: float) -> float:
        t, edges = _check_progress(t), self._edges()
        index = bisect_right(edges[:-1], t) - 1
        start, end = edges[index], edges[index + 1]
        return self.parts[index][1](float((t - start) / (end - start)) if end > start else 0.0)

    def values(self, n: int) -> list[float]:
        first_steps = [min(int(_check_steps(n) * edge), max(n - 1, 0)) for edge in self._edges()[:-1]]
        table: list[float] = []
        for (first, following), (_, schedule) in zip(pairwise(first_steps), self.parts[:-1], strict=True):
            table += schedule.values(following - first + 1)[:-1]  # the value at a joint is the next part's first
        return table + self.parts[-1][1].values(n - first_steps[-1])

    def _edges(self) -> list[float | Fraction]:
        sums = accumulate(fraction for fraction, _ in self.parts[:-1])
        return [0, *(min(edge, 1) for edge in sums), 1]  # the last part absorbs the rounding error of the sum

    def __repr__(self) -> str:
        return f"compose({list(self.parts)})"


def constant(value: float) -> Schedule:
    """Return a schedule that is `value` at every step."""
    value = check_finite("value", value)
    return Curve(f"constant({value})", value, value, _linear)


def linear(start: float, end: float) -> Schedule:
    """Return a straight line from `start` to `end`."""
    return _curve("linear", start, end, _linear)


def cosine(start: float, end: float) -> Schedule:
    """Return half a cosine wave from `start` to `end`: flat at both ends, steepest in the middle."""
    return _curve("cosine", start, end, _cosine)


def polynomial(start: float, end: float, power: float) -> Schedule:
    """Return `end + (start - end) * (1 - t) ** power`, like torch's `PolynomialLR`.

    Args:
        start: value at the first step
        end: value at the last step
        power: exponent, above 0
    """
    power = check_positive("power", power)
    return _curve("polynomial", start, end, partial(_polynomial, power=power), f", power={power}")


def exponential(start: float, end: float) -> Schedule:
    """Return `start * (end / start) ** t`: a straight line on a logarithmic axis.

    Args:
        start: value at the first step, above 0
        end: value at the last step, above 0
    """
    return _curve("exponential", check_positive("start", start), check_positive("end", end), _exponential)


def compose(parts: Iterable[tuple[float | Fraction, Schedule]]) -> Schedule:
    """Return a schedule that runs several schedules in sequence.

    Part i begins at step `int(n * s)`, where `s` is the floating-point sum of the fractions before it, but never later
    than the last step. At this step the value is the first value of part i, so a joint is neither repeated nor
    interpolated. If `n` is small, a part that gets no step is skipped. Fractions of type `fractions.Fraction` are
    summed without rounding.

    Args:
        parts: pairs (fraction of training, schedule); the fractions must sum to 1

    Raises:
        ValueError: when the fractions do not sum to 1
        TypeError: when an item is not such a pair
    """
    parts = tuple(_check_part(part) for part in parts)
    total = sum(fraction for fraction, _ in parts)
    if abs(total - 1) > 1e-6:
        fractions = [fraction for fraction, _ in parts]
        raise ValueError(f"The fractions of compose must sum to 1, got {fractions}, which sum to {total}.")
    return Chain(parts)


def one_cycle(
    max_value: float, div_factor: float = 25.0, final_div: float | None = None, pct_start: float = 0.3
) -> Schedule:
    """Return the learning rate of the one-cycle policy: it rises to `max_value`, then falls to almost nothing.

    With n steps and `a = int(n * pct_start)`: cosine from `max_value / div_factor` at step 0 to `max_value` at step a,
    then cosine to `max_value / final_div` at step n - 1. The maximum is always reached: if a = 0 it is the first step,
    if a = n - 1 the last. Source: Smith and Topin, arXiv:1708.07120; with cosines as in fastai v1.

    Args:
        max_value: the maximum
        div_factor: the first value is `max_value / div_factor`
        final_div: the last value is `max_value / final_div`; None: `div_factor * 1e4`
        pct_start: fraction of the steps before the maximum
    """
    max_value, div_factor = check_finite("max_value", max_value), check_positive("div_factor", div_factor)
    final_div = div_factor * 1e4 if final_div is None else check_positive("final_div", final_div)
    return _there_and_back(max_value / div_factor, max_value, max_value / final_div, pct_start)


def one_cycle_momentum(moms: tuple[float, float] = (0.95, 0.85), pct_start: float = 0.3) -> Schedule:
    """Return the momentum (or beta1) that mirrors `one_cycle`.

    It falls from `moms[0]` to `moms[1]`, which it reaches when the learning rate is at its maximum, and rises back.

    Args:
        moms: pair (high, low), both below 1
        pct_start: as in `one_cycle`
    """
    high, low = _check_moms(moms)
    return _there_and_back(high, low, high, pct_start)


def flat_cos(value: float, div_final: float = 1e5, pct_start: float = 0.75) -> Schedule:
    """Return `value` up to step `int(n * pct_start)`, then a cosine to `value / div_final` at the last step.

    Source: fastai v2.

    Args:
        value: the constant first part
        div_final: the last value is `value / div_final`
        pct_start: fraction of the steps in the constant part
    """
    value, div_final = check_finite("value", value), check_positive("div_final", div_final)
    pct_start = _check_fraction("pct_start", pct_start)
    return compose([(pct_start, constant(value)), (1 - pct_start, cosine(value, value / div_final))])


def cyclic(max_value: float, min_value: float = 0.0, *, n_cycles: int, cycle_mult: float = 2) -> Schedule:
    """Return a cosine from `max_value` with warm restarts; each cycle is `cycle_mult` times as long as the one before.

    Every cycle begins at exactly `max_value`. A cycle of L steps stops before `min_value`, at (L - 1) / L of the way,
    as in torch's `CosineAnnealingWarmRestarts`; only the very last step is exactly `min_value`. Source: SGDR,
    Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983.

    Args:
        max_value: value at the beginning of each cycle
        min_value: value at the very last step
        n_cycles: number of cycles, 1 or more
        cycle_mult: length of a cycle relative to the one before, above 0

    Raises:
        ValueError: when an argument is outside its range
    """
    if n_cycles < 1:
        raise ValueError(f"n_cycles must be 1 or more, got {n_cycles}.")
    ratio = Fraction(check_positive("cycle_mult", cycle_mult))
    lengths = [ratio**i for i in range(n_cycles)]  # exact: 7 steps restart at 1 and 3, not one step early
    return compose([(length / sum(lengths), cosine(max_value, min_value)) for length in lengths])


def check_finite(name: str, value: float) -> float:
    """Return `value` as a float; raise ValueError for nan and infinity, TypeError for what is not a number."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, got {value!r}.") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}: it would turn every weight into nan.")
    return number


def check_positive(name: str, value: float) -> float:
    """Like `check_finite`, but also raise ValueError for 0 and below."""
    number = check_finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be above 0, got {value!r}.")
    return number


def _curve(
    name: str, start: float, end: float, between: Callable[[float, float, float], float], options: str = ""
) -> Curve:
    start, end = check_finite("start", start), check_finite("end", end)
    return Curve(f"{name}({start}, {end}{options})", start, end, between)


def _linear(start: float, end: float, t: float) -> float:
    return start + (end - start) * t


def _cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def _polynomial(start: float, end: float, t: float, power: float) -> float:
    return end + (start - end) * (1 - t) ** power


def _exponential(start: float, end: float, t: float) -> float:
    return start ** (1 - t) * end**t  # end / start could overflow


def _there_and_back(start: float, middle: float, end: float, pct_start: float) -> Schedule:
    pct_start = _check_fraction("pct_start", pct_start)
    return compose([(pct_start, cosine(start, middle)), (1 - pct_start, cosine(middle, end))])


def _check_steps(n: int) -> int:
    if n < 0:
        raise ValueError(f"n must be the number of optimizer steps, 0 or more, got {n}.")
    return n


def _check_progress(t: float) -> float:
    if not 0 <= t <= 1:
        raise ValueError(f"Progress must be in [0, 1], got {t}: pass step / (n - 1), or use values(n).")
    return float(t)


def _check_fraction(name: str, value: float) -> float:
    number = check_finite(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be a fraction in [0, 1], got {value!r}.")
    return number


def _check_part(part: tuple[float | Fraction, Schedule]) -> tuple[float | Fraction, Schedule]:
    if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], Schedule)):
        raise TypeError(f"compose takes pairs (fraction, schedule) such as (0.3, linear(0, 1)), got {part!r}.")
    fraction, schedule = part
    number = _check_fraction("fraction", float(fraction))
    return (fraction if isinstance(fraction, Fraction) else number), schedule


def _check_moms(moms: tuple[float, float]) -> tuple[float, float]:
    if not (isinstance(moms, (tuple, list)) and len(moms) == 2):
        raise TypeError(f"moms must be a pair (high, low) such as (0.95, 0.85), got {moms!r}.")
    high, low = (_check_fraction("moms", mom) for mom in moms)
    if 1 in (high, low):
        raise ValueError(f"moms must be below 1, got {moms!r}: a momentum of 1 never forgets a gradient.")
    return high, low
