"""What is said of several seeds, against values by hand and against data whose effect is known."""

import math
import random

import pytest

from cts_fast.experiments.statistics import (
    mean_and_interval,
    mean_over_log_steps,
    paired_differences,
    per_seed_mean,
    steps_to_equal_accuracy,
    steps_to_reach,
)


def test_the_interval_is_students_by_hand():
    centre, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # deviation sqrt(10 / 4), t(0.975, 4) = 2.776445 from a table
    assert centre == 3.0 and half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    assert math.isnan(mean_and_interval([1.0])[1])


def test_differences_are_of_equal_seeds_and_averaged_over_tasks():
    one = {"a": [0.5, 0.7], "b": [0.3, 0.1]}
    other = {"a": [0.4, 0.2], "b": [0.2, 0.2]}
    found = paired_differences(per_seed_mean(one), per_seed_mean(other))
    assert found == pytest.approx([((0.5 - 0.4) + (0.3 - 0.2)) / 2, ((0.7 - 0.2) + (0.1 - 0.2)) / 2])
    with pytest.raises(ValueError):
        paired_differences([0.1, 0.2], [0.1])


def test_pairing_finds_an_effect_that_seeds_would_hide_and_covers_it_in_95_of_100_experiments():
    draw = random.Random(0)
    effect, covered, found, hidden, experiments = 0.02, 0, 0, 0, 600
    for _ in range(experiments):
        of_seed = [draw.gauss(0.5, 0.05) for _ in range(5)]  # what a seed does to both methods
        one = [common + effect + draw.gauss(0, 0.005) for common in of_seed]
        other = [common + draw.gauss(0, 0.005) for common in of_seed]
        centre, half = mean_and_interval(paired_differences(one, other))
        covered += abs(centre - effect) <= half
        found += centre - half > 0
        hidden += mean_and_interval(one)[1] > effect
    assert abs(covered / experiments - 0.95) < 0.03  # three standard errors of a share of 600
    assert found / experiments > 0.9 and hidden / experiments > 0.9


def test_steps_are_interpolated_on_a_log_axis():
    curve = {100: 0.2, 400: 0.6, 1600: 0.6, 6400: 0.8}
    assert steps_to_reach(curve, 0.4) == pytest.approx(200)  # half way up: the geometric mean of 100 and 400
    assert steps_to_reach(curve, 0.6) == pytest.approx(400)  # the first time
    assert steps_to_reach(curve, 0.7) == pytest.approx(3200)
    assert steps_to_reach(curve, 0.1) == 100 and steps_to_reach(curve, 0.2) == 100
    assert steps_to_reach(curve, 0.81) == math.inf
    assert steps_to_reach({1600: 0.6, 100: 0.2, 400: 0.6}, 0.4) == pytest.approx(200)  # in any order


def test_the_mean_of_a_curve_weighs_its_pieces_by_how_often_they_double_the_steps():
    # 0.2 to 0.4 over two doublings, 0.4 to 0.8 over one: (2 * 0.3 + 0.6) / 3
    assert mean_over_log_steps({100: 0.2, 800: 0.8, 400: 0.4}) == pytest.approx(0.4)
    assert mean_over_log_steps({7: 0.3}) == 0.3


def test_a_curve_that_falls_again_has_reached_what_it_had():
    assert steps_to_reach({1: 0.1, 2: 0.5, 4: 0.2, 8: 0.9}, 0.4) == pytest.approx(2**0.75)


STEPS = [2**i for i in range(5, 13)]  # 32 to 4096


def simulated(factor, seeds, noise, seed=0):
    """Two methods whose accuracy grows with log2 of the steps; the second needs `factor` times the steps."""
    draw = random.Random(seed)
    of_seed = [draw.gauss(0, 0.05) for _ in range(seeds)]

    def curves(cost):
        return {n: [0.05 * math.log2(n / cost) + x + draw.gauss(0, noise) for x in of_seed] for n in STEPS}

    return curves(1), curves(factor)


def test_a_known_factor_in_steps_is_found_exactly_without_noise():
    one, other = simulated(3, 4, 0)
    found = steps_to_equal_accuracy(one, 512, other)
    assert [found.steps, found.low, found.high] == pytest.approx([1536] * 3)
    assert (found.reached, found.seeds) == (4, 4)


def test_the_bootstrap_covers_a_known_factor_and_little_else():
    intervals = []
    for seed in range(40):
        one, other = simulated(3, 10, 0.01, seed)
        found = steps_to_equal_accuracy(one, 512, other)
        intervals.append((found.low, found.high))
    covered = sum(low <= 1536 <= high for low, high in intervals)
    assert covered >= 32  # percentiles of ten seeds cover somewhat less than 38 of 40
    assert all(1000 < low <= high < 2400 for low, high in intervals)


def test_what_is_not_reached_is_infinite_and_counted():
    one, other = simulated(4, 5, 0)
    found = steps_to_equal_accuracy(one, 2048, other)
    assert found.steps == found.low == found.high == math.inf and found.reached == 0
    # three of five seeds reach it: the mean does not, resamples of the three alone do
    one, other = {8: [0.5] * 5}, {4: [0.0] * 5, 8: [0.6, 0.6, 0.6, 0.2, 0.1]}
    found = steps_to_equal_accuracy(one, 8, other)
    assert found.steps == math.inf and found.reached == 3
    assert 4 < found.low < 8 and found.high == math.inf


def test_one_seed_has_steps_and_no_interval():
    found = steps_to_equal_accuracy({8: [0.5]}, 8, {4: [0.4], 16: [0.6]})
    assert found.steps == pytest.approx(8) and math.isnan(found.low) and math.isnan(found.high)


def test_the_interval_is_the_same_each_time():
    one, other = simulated(2, 3, 0.02)
    assert steps_to_equal_accuracy(one, 256, other) == steps_to_equal_accuracy(one, 256, other)
