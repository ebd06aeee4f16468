"""What is said of several seeds: intervals, paired differences, and steps to equal accuracy."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

RESAMPLES = 2000  # of the seeds, for the interval of steps to equal accuracy


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t); NaN for fewer than two values."""
    from scipy.stats import t

    n = len(values)
    centre = mean(values)
    if n < 2:
        return centre, math.nan
    deviation = math.sqrt(sum((value - centre) ** 2 for value in values) / (n - 1))
    return centre, float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def mean(values: Iterable[float]) -> float:
    """Their mean; raises ZeroDivisionError for none."""
    values = list(values)
    return sum(values) / len(values)


def per_seed_mean(by_target: Mapping[str, Sequence[float]]) -> list[float]:
    """Mean over held-out tasks, for every seed."""
    return [mean(values) for values in zip(*by_target.values(), strict=True)]


def paired_differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """one - other, seed by seed: what a seed does to both (its weights, heads, images, batches) cancels."""
    return [a - b for a, b in zip(one, other, strict=True)]


def mean_over_log_steps(curve: Mapping[int, float]) -> float:
    """Mean of a curve, steps to values, along a log axis of steps, straight between its points."""
    steps = sorted(curve)
    if len(steps) == 1:
        return curve[steps[0]]
    pieces = [((curve[a] + curve[b]) / 2, math.log(b / a)) for a, b in pairwise(steps)]
    return sum(value * width for value, width in pieces) / math.log(steps[-1] / steps[0])


def steps_to_reach(curve: Mapping[int, float], level: float) -> float:
    """Steps after which a curve, steps to accuracy, first reaches `level`, interpolated on a log axis of steps.

    A curve that begins there may have reached it before: its first step is an upper bound. inf: it never does.
    """
    before = 0
    for step in sorted(curve):
        if curve[step] >= level:
            if not before:
                return step
            share = (level - curve[before]) / (curve[step] - curve[before])
            return before * (step / before) ** share
        before = step
    return math.inf


@dataclass(frozen=True)
class EqualAccuracy:
    """Steps to equal accuracy. Infinite steps: it was not reached.

    steps: of the mean curves; low, high: 95 % interval, NaN for fewer than two seeds; reached: number of seeds whose
    own curve reaches what the other method has with this seed; seeds: of how many.
    """

    steps: float
    low: float
    high: float
    reached: int
    seeds: int


def steps_to_equal_accuracy(
    one: Mapping[int, Sequence[float]], step: int, other: Mapping[int, Sequence[float]]
) -> EqualAccuracy:
    """How many steps `other` needs to reach what `one` has after `step`; both map steps to accuracies, one per seed.

    The interval is the bootstrap's (percentiles), which draws seeds with replacement, the same ones for both methods.
    A resample in which the accuracy is not reached counts as one with infinitely many steps. With few seeds such an
    interval is too narrow.
    """
    seeds = range(len(one[step]))

    def of(chosen: Sequence[int]) -> float:
        curve = {at: mean(values[i] for i in chosen) for at, values in other.items()}
        return steps_to_reach(curve, mean(one[step][i] for i in chosen))

    low = high = math.nan
    if len(seeds) > 1:
        draw = random.Random(0)
        resampled = sorted(of(draw.choices(seeds, k=len(seeds))) for _ in range(RESAMPLES))
        tail = round(0.025 * RESAMPLES)
        low, high = resampled[tail], resampled[-1 - tail]
    reached = sum(math.isfinite(of([i])) for i in seeds)
    return EqualAccuracy(of(seeds), low, high, reached, len(seeds))
