"""What one rank does alone: all ranks hear of it, in the same words, and none goes on from half a step."""

from dataclasses import replace

import pytest
import torch
from support import rank_checks as checks
from support import rank_faults as faults
from support.step_cases import Case

OPTIONS = dict(lr=0.05, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=4)
PAIR = Case(2, ((5, 3), (7,)), dtype=torch.float64, steps=6, options=OPTIONS)
ONE_EACH = (1, 1)
REFUSED = "Torn: a step broke off half-way: rank 1 raised, so that no rank goes on: ValueError: task 0, parameter '0'"


def case_with(**options):
    return replace(PAIR, options={**OPTIONS, **options})


def close(a, b):
    return (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize(
    ("at", "how"), [(2, "load_state_dict"), (0, "load_state_dict"), (4, "reset_tasks"), (2, "load_initialization")]
)
def test_a_step_that_broke_off_is_refused_until_it_is_mended(pool, at, how):
    _, phi, counters = faults.torn_and_mended(None, PAIR, (2,), at, how)
    for rank, (found, own, counted) in enumerate(pool.values(2, faults.torn_and_mended, PAIR, ONE_EACH, at, how)):
        first, *refused = found[at : at + 4]
        assert first.startswith(
            "ValueError" if rank else "RankError: rank 1 raised, so that no rank goes on: ValueError"
        )
        assert rank or "no rank takes another step before load_state_dict()" in first
        assert all(error.startswith(REFUSED) for error in refused)
        assert not any(found[:at] + found[at + 4 :])
        assert close(own, phi) and counted == counters


@pytest.mark.parametrize("nonfinite", ["ignore", "skip"])
def test_an_option_that_hides_when_the_next_sum_comes_is_told_to_all(pool, nonfinite):
    given = (PAIR, ONE_EACH, checks.bad_horizon, "auto", nonfinite)
    (told, _), (raised, _) = (found[0] for found, *_ in pool.values(2, checks.step_with, *given))
    assert raised.startswith("ValueError: Invalid horizon: 0")
    assert told.startswith("RankError: rank 1 raised, so that no rank goes on: ValueError: Invalid horizon: 0")


@pytest.mark.parametrize("interval", [1, 2])
def test_a_rank_that_raises_within_its_step_is_torn_and_so_are_the_others_when_they_hear(pool, interval):
    case = case_with(meta_interval=interval, horizon=6)
    phi = faults.torn_and_mended(None, case, (2,), 1, "load_state_dict")[1]
    first, second = pool.values(2, faults.broken_at_the_end, case, ONE_EACH)
    assert second[0][0] == "KeyError: 'a method'" and first[0][0] == ""
    told = first[0][1] if interval == 1 else first[0][2]  # the next meta-update
    if interval == 1:
        assert "rank 1 raised" in told and "KeyError: 'a method'" in told
        assert first[0][2].startswith("Torn: a step broke off half-way: rank 1 raised")
    else:
        assert first[0][1] == "" and "rank 1 raised" in told and "KeyError: 'a method'" in told
    assert all(error.startswith("Torn: ") for error in second[0][1:])
    for _, after, own in (first, second):
        assert not any(after) and close(own, phi)


def test_collectives_of_the_program_on_the_same_group_meet_their_own(pool):
    case = Case(2, ((50,),), steps=4, options=dict(lr=0.1, horizon=4))
    first, second = pool.values(2, faults.with_collectives_in_between, case, ONE_EACH, "reptile")
    assert first[:3] == [""] * 3 and "rank 1 raised" in first[3] and "KeyError: 'a batch'" in first[3]
    assert second[0] == "" and second[1] == "KeyError: 'a batch'"
    assert all(error.startswith("Torn: a step of this rank raised, and the others took theirs") for error in second[2:])


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ("strides", "the strides of parameter '0' is (1, 3) on rank 1, but (2, 1) on rank 0"),
        ("group", "lr of shared group 1 is None on rank 1, but 0.1 on rank 0"),
        ("parameter", "the shape of parameter '1' is (5,) on rank 1, but (4,) on rank 0"),
    ],
)
def test_a_layout_that_changes_on_one_rank_alone_is_named_on_all(pool, edit, reason):
    for now, then in pool.values(2, faults.other_layouts, edit, False):
        assert now.startswith(f"RanksDiffer: process_group: {reason}") and then.startswith("Torn: ")
    for now, then in pool.values(2, faults.other_layouts, edit, False, 3):  # the step between talks to nobody
        assert now == "" and then.startswith(f"RanksDiffer: process_group: {reason}")
    for interval in (1, 3):
        assert pool.values(2, faults.other_layouts, edit, True, interval) == [["", ""]] * 2


def test_ranks_in_different_calls_hear_of_it(pool):
    for error in pool.values(2, faults.other_calls, PAIR, ONE_EACH):
        assert error.startswith("RankError: rank 1 is in load_state_dict(), but rank 0 in step(); every rank makes")


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [{t: 0.5 for t in range(4)}, {3: 0.5}, {t: 0.1 * (t + 1) for t in range(4)}, {2: 0.5, 3: 0.5}, {0: 0.5}],
    ids=["all alike", "one of two", "all apart", "all of one rank", "rank 0's"],
)
def test_weights_loaded_at_a_rounds_start_count_as_in_one_process(pool, changes, interval):
    case = replace(PAIR, tasks=4, steps=10, options={**OPTIONS, "meta_interval": interval, "horizon": 3})
    alone, warned = faults.loaded_weights(None, case, (4,), changes)
    found = pool.values(3, faults.loaded_weights, case, (1, 1, 2), changes)
    at = [n for n in range(case.steps) if (n % 3 + 1) % interval == 0]  # φ is agreed from a round's first sum on
    for phis, _ in found:
        assert all(close(phis[n], alone[n]) and torch.equal(phis[n], found[0][0][n]) for n in at)
    assert bool(warned) == any(warnings for _, warnings in found)


def test_leap_takes_loaded_weights_as_in_one_process(pool):
    case = replace(PAIR, steps=9, options=dict(lr=0.05, meta_lr=0.3, horizon=3))
    for changes in ({0: 0.5, 1: 0.5}, {1: 0.5}):
        alone, _ = faults.loaded_weights(None, case, (2,), changes, "leap")
        for phis, _ in pool.values(2, faults.loaded_weights, case, ONE_EACH, changes, "leap"):
            assert all(close(phis[n], alone[n]) for n in (2, 5, 8))


def test_a_nan_is_reported_though_a_group_was_added_since(pool):
    for found in pool.values(2, faults.nan_and_a_new_group, case_with(meta_interval=3, horizon=6), ONE_EACH):
        assert found[:2] == ["", ""] and not any(found[3:])
        assert found[2].startswith("NonFiniteOnRank: rank 1, task 0, parameter '0': the gradient of the last step held")


@pytest.mark.parametrize("everywhere", [False, True], ids=["its own", "torch's"])
def test_a_hook_that_raises_before_the_step_is_told_to_all(pool, everywhere):
    (first, after), (second, as_well) = pool.values(2, faults.hook_that_raises, PAIR, ONE_EACH, everywhere)
    assert second == "KeyError: 'a hook'" and after == as_well == ""
    assert first == "RankError: rank 1 raised, so that no rank goes on: KeyError: 'a hook'"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("leap", {"measure": "x"}),
        ("reptile", {"horizon": None}),
        ("leap", {"meta_interval": 3}),
        ("no-shift", {"shift": 0.5}),
    ],
    ids=str,
)
def test_options_that_a_method_refuses_on_one_rank_are_refused_by_all(pool, method, options):
    first, second = pool.values(2, faults.refused_options, method, options)
    assert second.startswith("ValueError: ")
    assert first == f"RankError: rank 1 raised, so that no rank goes on: {second}"


@pytest.mark.parametrize("method", ["cts", "reptile"])
def test_a_scaler_on_one_rank_alone_is_an_error_on_all(pool, method):
    for found in pool.values(2, faults.scaler_on_one_rank, PAIR, ONE_EACH, method):
        assert not any(found[:-1])
        assert found[-1].startswith("RanksDiffer: process_group: whether a GradScaler is used is True on rank 1")


def test_a_scaler_may_come_and_go_on_all_ranks(pool):
    phi = faults.scaler_on_and_off(None, PAIR, (2,))[1]
    for errors, own in pool.values(2, faults.scaler_on_and_off, PAIR, ONE_EACH):
        assert not any(errors) and close(own, phi)


def test_a_methods_own_option_is_agreed_on_at_a_load_and_in_every_sum(pool):
    case = Case(2, ((5,),), options=dict(lr=0.1, horizon=2))
    for loaded, first, second in pool.values(2, faults.other_measure, case, ONE_EACH):
        measure = "measure is 'energy' on rank 1, but 'length' on rank 0"
        assert loaded == f"RanksDiffer: process_group: in the loaded state dict, {measure}"
        assert first == "" and second.startswith(f"RanksDiffer: process_group: {measure}")


def test_heads_have_no_say_in_where_shared_parameters_lie(pool):
    assert pool.values(2, faults.heads_first) == [("", 1)] * 2
